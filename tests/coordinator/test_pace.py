"""A machine's pace follows what is measured, at once where it must and never for noise."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.division import divide
from coordinator.pace import SLOWEST_FACTOR, Pace, Speed

SPEED = Speed(0.05, 1e-4)
POSITIONS = 8000


def after(pace: Pace, *ratios: float) -> Pace:
    for ratio in ratios:
        pace = pace.observed(POSITIONS, pace.speed.predict(POSITIONS) * ratio)
    return pace


def test_an_empty_share_costs_and_teaches_nothing() -> None:
    assert SPEED.predict(0) == 0
    pace = after(Pace(SPEED), 1.1, 1.2)
    assert pace.observed(0, 3.0) == pace
    assert pace.observed(100, 0.0) == pace
    assert pace.observed(100, math.nan) == pace


@pytest.mark.parametrize("change", [3.0, 1 / 3, 10.0])
def test_a_change_of_speed_shows_within_three_steps(change: float) -> None:
    pace = after(Pace(SPEED), *[1.0] * 10, *[change] * 3)
    assert pace.predict(POSITIONS) == pytest.approx(SPEED.predict(POSITIONS) * change, rel=0.05)


@pytest.mark.parametrize("outlier", [20.0, 0.05])
def test_a_single_outlier_changes_nothing(outlier: float) -> None:
    assert after(Pace(SPEED), outlier).factor == pytest.approx(1)
    assert after(Pace(SPEED), 1.0, 1.0, outlier, 1.0, 1.0).factor == pytest.approx(1)


@given(st.lists(st.floats(1e-9, 1e9), max_size=20))
def test_the_factor_stays_bounded(ratios: list[float]) -> None:
    pace = after(Pace(SPEED), *ratios)
    assert 1 / SLOWEST_FACTOR <= pace.factor <= SLOWEST_FACTOR
    assert pace.now.seconds_per_position == pytest.approx(SPEED.seconds_per_position * pace.factor, rel=0.011)


def test_noise_hardly_changes_the_speed_that_is_used() -> None:
    random = np.random.default_rng(1)
    pace = Pace(SPEED)
    used = []
    for _ in range(200):
        pace = after(pace, float(random.lognormal(0, 0.05)))
        used.append(pace.now.seconds_per_position / SPEED.seconds_per_position)
    assert 0.9 < min(used) <= max(used) < 1.1


def test_speeds_are_fitted() -> None:
    exact = Speed.fitted([(1000, 0.15), (3000, 0.35), (8000, 0.85)])
    assert exact.overhead_seconds == pytest.approx(0.05)
    assert exact.seconds_per_position == pytest.approx(1e-4)
    assert Speed.fitted([(1000, 0.1), (1000, 0.3)]).overhead_seconds == 0
    below_zero = Speed.fitted([(1000, 0.1), (2000, 0.3)])
    assert below_zero.overhead_seconds == 0
    assert 1e-4 < below_zero.seconds_per_position < 1.5e-4
    assert Speed.fitted([(1000, 0.3), (2000, 0.2)]) == Speed(0, 1e-4)
    with pytest.raises(ValueError, match="not empty"):
        Speed.fitted([(0, 1.0)])


def test_steps_of_one_size_do_not_tell_what_starting_costs() -> None:
    alike = [(1000, 0.15), (1001, 0.12), (1100, 0.16)]
    speed = Speed.of_steps(alike)
    assert speed.overhead_seconds == 0
    assert speed.seconds_per_position == pytest.approx(0.16 / 1100)
    telling = [(1000, 0.15), (3000, 0.35), (8000, 0.85)]
    assert Speed.of_steps(telling) == Speed.fitted(telling)


@pytest.mark.parametrize("arguments", [(-1.0, 1.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)])
def test_impossible_speeds_are_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Speed(*arguments)


@pytest.mark.parametrize("believed_overhead", [0.0, 0.1, 0.2])
def test_shares_follow_a_limit_that_moves_without_swinging(believed_overhead: float) -> None:
    """Two equal machines, one of them held to a third; the limit moves to the other one. Steps are sent 4 ahead."""
    random = np.random.default_rng(7)
    lengths = np.full(32, 257, np.int32)
    true = Speed(0.1, 2e-4)
    paces = [Pace(Speed(believed_overhead, 2e-4)) for _ in range(2)]
    under_way: deque[list[int]] = deque()
    rows: list[int] = []
    for step in range(80):
        under_way.append([256 * len(own) for own in divide(lengths, 2048, [pace.now for pace in paces])])
        if len(under_way) <= 4:
            continue
        shares = under_way.popleft()
        slow = 0 if step < 40 else 1
        for member, positions in enumerate(shares):
            seconds = true.predict(positions) * (3 if member == slow else 1) * float(random.lognormal(0, 0.03))
            paces[member] = paces[member].observed(positions, seconds)
        rows.append(shares[0] // 256)
    ideal = [len(own) for own in divide(lengths, 2048, [true.times(3), true])]
    # 4 steps after the start or the change are under way already.
    for settled, expected in ((rows[10:36], ideal[0]), (rows[46:], ideal[1])):
        assert all(abs(row - expected) <= 0.1 * 32 for row in settled), (rows, ideal)
