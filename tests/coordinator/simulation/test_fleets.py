"""Fleets that grow."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.planner import JobFacts
from coordinator.simulation.fleets import Fleet, Kind, growth, speed_of, typical_rows
from coordinator.simulation.words import USUAL_WIRES


def fleet(*kinds: Kind, wire: str = "ethernet", rows: int = 64, gradient_bytes: int = 20 << 20) -> Fleet:
    return Fleet(kinds, JobFacts(typical_rows(rows, 256, 2048), 2048, rows, 1, gradient_bytes), USUAL_WIRES[wire])


def test_rows_are_typical() -> None:
    steps = typical_rows(64, 256, 2048)
    lengths = np.concatenate(steps)
    assert lengths.mean() == pytest.approx(256, rel=0.01)
    assert np.median(lengths) < 240
    assert all((one == other).all() for one, other in zip(steps, typical_rows(64, 256, 2048), strict=True))
    assert np.concatenate(typical_rows(8, 2, 2048)).min() >= 2


def test_equal_machines_stop_paying_at_some_number() -> None:
    found = growth(fleet(Kind("mini", speed_of(2500), 3)))
    assert [row.machines for row in found.rows] == [
        ("mini 1",),
        ("mini 1", "mini 2"),
        ("mini 1", "mini 2", "mini 3"),
    ]
    assert [row.pays for row in found.rows] == [True, True, True]
    assert found.rows[-1].speed_up == pytest.approx(
        found.rows[-1].outcome.tokens_per_second / found.rows[0].outcome.tokens_per_second
    )
    (more,) = found.more
    assert more.pays
    assert more.stops_at is not None
    # What is told of the number stands in the table of a fleet of so many.
    longer = growth(fleet(Kind("mini", speed_of(2500), more.stops_at)))
    assert [row.pays for row in longer.rows] == [True] * (more.stops_at - 1) + [False]
    assert longer.more[0].stops_at == more.stops_at


def test_a_slow_machine_by_a_slow_link_does_not_pay_and_is_not_planned_with() -> None:
    found = growth(fleet(Kind("Studio", speed_of(12000)), Kind("Air", speed_of(1500)), wire="wifi", rows=8))
    assert not found.rows[-1].pays
    assert found.rows[-1].speed_up < 1
    assert [member.candidate.name for member in found.plan.members] == ["Studio"]
    assert {more.kind for more in found.more} == {"Studio", "Air"}


def test_links_of_kinds_hold_for_each_of_their_machines() -> None:
    wires = {("Studio", "mini"): USUAL_WIRES["thunderbolt"]}
    kinds = (Kind("Studio", speed_of(9000)), Kind("mini", speed_of(3000), 2))
    network = dataclasses.replace(fleet(*kinds), wires=wires).network
    assert network.medium("mini 2", "Studio") == "cable"
    assert network.medium("mini 1", "mini 2") == "switch"
    assert network.links["Studio", "mini 1"] == USUAL_WIRES["thunderbolt"].link


def test_one_more_has_its_kinds_links() -> None:
    wires = {("Studio", "mini"): USUAL_WIRES["thunderbolt"]}
    larger = dataclasses.replace(fleet(Kind("Studio", speed_of(9000)), Kind("mini", speed_of(3000))), wires=wires)
    assert larger.with_more("mini").network.medium("Studio", "mini 2") == "cable"


def test_of_many_machines_some_numbers_are_shown() -> None:
    found = growth(fleet(Kind("mini", speed_of(100), 20), rows=40))
    assert [len(row.machines) for row in found.rows] == [*range(1, 13), 16, 20]
    assert found.more[0].stops_at is not None


def test_a_speed_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        speed_of(0)
