"""Packets around a ring, by hand, and against the planner's formula."""

from __future__ import annotations

import itertools

import pytest

from coordinator.ring_order import BUCKET_BYTES, Link, ring_seconds, streams_seconds
from coordinator.simulation.network import Network
from coordinator.simulation.sums import Costs, packets, sum_seconds
from tests.coordinator.simulation.made import FREE, job, names, network

KIB, MIB = 1 << 10, 1 << 20
RATE = MIB * 8.0
"""Bits per second: 1 MiB in a second."""


@pytest.mark.parametrize(
    ("size", "ranks", "directions", "segment"),
    [
        (384 * KIB, 3, 1, [128 * KIB]),
        (MIB, 2, 2, [128 * KIB, 128 * KIB]),
        (48 * MIB, 3, 2, [4 * MIB, 4 * MIB]),
        (256 * MIB, 4, 2, [8 * MIB] * 4),
        (1000, 64, 1, [1000 / 64]),
    ],
)
def test_numbers_are_cut_as_the_ring_cuts_them(size: int, ranks: int, directions: int, segment: list[float]) -> None:
    assert packets(size, ranks) == (directions, segment)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_one_packet_a_turn_costs_every_turn_its_latency(ranks: int) -> None:
    size = ranks * 128 * KIB
    found = sum_seconds(names(ranks), job(gradient_bytes=size), network(names(ranks), RATE, 0.25, "cable"), FREE)
    assert found == pytest.approx(2 * (ranks - 1) * (0.125 + 0.25))


def test_two_ranks_send_everything_once_each_way() -> None:
    found = sum_seconds(names(2), job(gradient_bytes=4 * MIB), network(names(2), RATE, 0.0, "cable"), FREE)
    assert found == pytest.approx(4.0)


def test_in_the_air_two_ranks_take_turns() -> None:
    found = sum_seconds(names(2), job(gradient_bytes=4 * MIB), network(names(2), RATE, 0.0, "air"), FREE)
    assert found == pytest.approx(8.0)


def test_with_cables_both_directions_of_three_ranks_go_at_once() -> None:
    ids, size = names(3), 6 * MIB
    cables = sum_seconds(ids, job(gradient_bytes=size), network(ids, RATE, 0.0, "cable"), FREE)
    assert cables == pytest.approx(2 * 2 / 3 * 6 / 2), "each cable carries half of it each way"
    ports = sum_seconds(ids, job(gradient_bytes=size), network(ids, RATE, 0.0, "switch"), FREE)
    assert 8.0 <= ports <= 9.0, "a machine's port carries all of it, and the directions wait for each other a little"


def test_one_slow_link_holds_up_all() -> None:
    ids, size = names(4), 4 * MIB
    links = {pair: Link(RATE, 0.0) for pair in itertools.combinations(ids, 2)}
    fast = sum_seconds(ids, job(gradient_bytes=size), Network(links, usual="cable"), FREE)
    slow = sum_seconds(
        ids, job(gradient_bytes=size), Network({**links, ("m01", "m02"): Link(RATE / 4, 0.0)}, usual="cable"), FREE
    )
    # The slow link's own part, and never all of the ring at its rate.
    assert fast * 3 < slow <= fast * 4 + 1e-9


def test_costs_beside_the_network() -> None:
    ids, size = names(2), 8 * MIB
    costs = Costs(sum_seconds=0.5, memory_bytes_per_second=8 * MIB)
    free = sum_seconds(ids, job(gradient_bytes=size), network(ids, 1e15), FREE)
    found = sum_seconds(ids, job(gradient_bytes=size), network(ids, 1e15), costs)
    # To the reducer and back a second each; of what arrives half is added, packet by packet in two directions at once.
    assert found - free == pytest.approx(0.5 + 2.0 + 0.25, rel=0.01)


@pytest.mark.parametrize("buckets", [2, 4, 9])
def test_buckets_follow_each_other(buckets: int) -> None:
    ids = names(3)
    one = sum_seconds(ids, job(gradient_bytes=BUCKET_BYTES), network(ids, 1e9, 1e-4), Costs())
    all_of_them = sum_seconds(ids, job(gradient_bytes=buckets * BUCKET_BYTES), network(ids, 1e9, 1e-4), Costs())
    assert all_of_them == pytest.approx(buckets * one, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [10 * MIB, 40 * MIB, 300 * MIB])
def test_at_a_switch_it_takes_about_what_the_planner_says(ranks: int, size: int) -> None:
    """A little longer with more ranks: packets of the two directions wait for each other at a port."""
    ids = names(ranks)
    found = sum_seconds(ids, job(gradient_bytes=size), network(ids, 1e9, 3e-4), Costs(memory_bytes_per_second=1e12))
    planned = ring_seconds(ids, network(ids, 1e9, 3e-4).links, size, 0.005)
    assert 0.97 * planned < found < 1.15 * planned


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_more_bandwidth_is_never_slower_and_more_latency_never_faster(ranks: int) -> None:
    ids, work = names(ranks), job(gradient_bytes=24 * MIB)
    for medium in ("cable", "switch", "air"):
        seconds = [sum_seconds(ids, work, network(ids, rate, 1e-3, medium), FREE) for rate in (1e8, 3e8, 1e9, 1e10)]
        assert seconds == sorted(seconds, reverse=True)
        seconds = [sum_seconds(ids, work, network(ids, 1e9, late, medium), FREE) for late in (0.0, 1e-3, 1e-2)]
        assert seconds == sorted(seconds)


def test_streams_carry_all_numbers_to_the_hub_and_back() -> None:
    ids, size = names(3), 64 * MIB
    work = job(gradient_bytes=size, streams=True, hub="m00")
    found = sum_seconds(ids, work, network(ids, 1e9, 1e-3), FREE)
    one_way = 2 * 8 * size / 1e9  # of the two machines that are not the hub, through its port
    planned = streams_seconds(ids, network(ids, 1e9, 1e-3).links, "m00", size, 0.0)
    assert one_way < found < planned, "the planner has nothing go both ways at once"


def test_a_coordinator_of_its_own_is_reached_by_the_best_links() -> None:
    ids, size = names(2), 32 * MIB
    beside = sum_seconds(ids, job(gradient_bytes=size, streams=True), network(ids, 1e9, 1e-3), FREE)
    among = sum_seconds(ids, job(gradient_bytes=size, streams=True, hub="m00"), network(ids, 1e9, 1e-3), FREE)
    assert beside > 1.5 * among
