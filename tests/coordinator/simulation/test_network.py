"""Which transfers take turns."""

from __future__ import annotations

import math

import pytest

from coordinator.ring_order import Link
from coordinator.simulation.network import Medium, Network, Traffic
from tests.coordinator.simulation.made import network

MEGABYTE_A_SECOND = 8e6


def arrivals(medium: Medium, *transfers: str, latency: float = 0.0) -> list[float]:
    """When transfers of 1 MB arrive that are all begun at once."""
    traffic = Traffic(network(["a", "b", "c"], MEGABYTE_A_SECOND, latency, medium), ["a", "b", "c"])
    return [round(traffic.send(pair[0], pair[1], 1e6, 0.0)[1], 9) for pair in transfers]


def test_a_cable_carries_both_directions_and_is_nobody_elses() -> None:
    assert arrivals("cable", "ab", "ba", "ac", "ab") == [1.0, 1.0, 1.0, 2.0]


def test_a_machine_has_one_port_at_a_switch() -> None:
    assert arrivals("switch", "ab", "ba", "ac", "bc") == [1.0, 1.0, 2.0, 3.0], "the last one waits for c's port"


def test_the_air_carries_one_transfer_at_a_time() -> None:
    assert arrivals("air", "ab", "ba", "ca") == [1.0, 2.0, 3.0]


def test_latency_delays_arrivals_and_occupies_nothing() -> None:
    assert arrivals("cable", "ab", "ab", latency=0.5) == [1.5, 2.5]


def test_a_fast_port_serves_a_slow_neighbour_beside_a_fast_one() -> None:
    links = {("a", "b"): Link(MEGABYTE_A_SECOND, 0.0), ("a", "c"): Link(10 * MEGABYTE_A_SECOND, 0.0)}
    traffic = Traffic(Network(links), ["a", "b", "c"])
    assert traffic.send("a", "b", 1e6, 0.0) == (1.0, 1.0)
    assert traffic.send("a", "c", 1e6, 0.0)[1] == pytest.approx(0.2), "behind a tenth of a second of the port's time"


def test_over_a_cut_link_nothing_arrives() -> None:
    traffic = Traffic(network(["a", "b"], 0.0), ["a", "b"])
    assert traffic.send("a", "b", 1.0, 0.0)[1] == math.inf
