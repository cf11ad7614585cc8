"""Rows are divided so that the slowest member is done as early as possible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.data.padding import padded_length
from coordinator.division import AFFINITY_SLACK, cost_positions, divide, group_rows, padded_lengths
from coordinator.pace import Speed
from node.spec import Int32

lengths_of = st.lists(st.integers(1, 3000), min_size=0, max_size=40).map(lambda values: np.array(values, np.int32))
speed_of = st.builds(Speed, st.floats(0, 0.2), st.floats(1e-5, 1e-3))
speeds_of = st.lists(speed_of, min_size=1, max_size=9)


def seconds(lengths: Int32, speed: Speed, rows: list[int]) -> float:
    padded = padded_lengths(lengths, 2048)
    return speed.predict(cost_positions(sorted(padded[rows].tolist(), reverse=True)))


def slowest(lengths: Int32, speeds: list[Speed], division: list[list[int]]) -> float:
    return max(seconds(lengths, speed, rows) for speed, rows in zip(speeds, division, strict=True))


def brute_force(lengths: Int32, speeds: list[Speed]) -> float:
    best = float("inf")
    for owners in itertools.product(range(len(speeds)), repeat=len(lengths)):
        division = [[row for row, owner in enumerate(owners) if owner == member] for member in range(len(speeds))]
        best = min(best, slowest(lengths, speeds, division))
    return best


def as_lists(lengths: Int32, speeds: list[Speed], **options: object) -> list[list[int]]:
    return [rows.tolist() for rows in divide(lengths, 2048, speeds, **options)]  # type: ignore[arg-type]


@given(lengths_of, speeds_of)
def test_every_row_is_given_once_and_always_to_the_same(lengths: Int32, speeds: list[Speed]) -> None:
    division = as_lists(lengths, speeds)
    assert len(division) == len(speeds)
    assert sorted(itertools.chain(*division)) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in division)
    assert as_lists(lengths, speeds) == division


@given(lengths_of, speeds_of)
def test_it_is_never_slower_than_the_best_member_alone(lengths: Int32, speeds: list[Speed]) -> None:
    alone = min(seconds(lengths, speed, list(range(len(lengths)))) for speed in speeds)
    # Rows of the whole step are grouped together; what a member's part then costs differs by a few micro-batches.
    slack = 8 * 64 * max(speed.seconds_per_position for speed in speeds)
    assert slowest(lengths, speeds, as_lists(lengths, speeds)) <= alone + slack


@settings(max_examples=40)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.lists(speed_of, min_size=2, max_size=3))
def test_a_few_rows_are_divided_as_well_as_can_be(values: list[int], speeds: list[Speed]) -> None:
    lengths = np.array(values, np.int32)
    assert slowest(lengths, speeds, as_lists(lengths, speeds)) == pytest.approx(brute_force(lengths, speeds))


@settings(max_examples=15)
@given(st.lists(st.integers(20, 1000), min_size=7, max_size=8), st.lists(speed_of, min_size=2, max_size=2))
def test_more_rows_are_divided_nearly_as_well(values: list[int], speeds: list[Speed]) -> None:
    lengths = np.array(values, np.int32)
    assert slowest(lengths, speeds, as_lists(lengths, speeds)) <= 1.25 * brute_force(lengths, speeds)


@pytest.mark.parametrize("members", [2, 3, 8, 64])
def test_many_rows_come_close_to_the_sum_of_the_speeds(members: int) -> None:
    lengths = np.full(1024, 257, np.int32)
    speeds = [Speed(0, 1e-4 * (1 + member % 3)) for member in range(members)]
    ideal = 1024 * 256 / sum(1 / speed.seconds_per_position for speed in speeds)
    assert slowest(lengths, speeds, as_lists(lengths, speeds)) <= 1.15 * ideal


def test_a_third_of_the_speed_gets_a_quarter_of_the_rows() -> None:
    assert [len(rows) for rows in as_lists(np.full(8, 100, np.int32), [Speed(0, 1e-4), Speed(0, 3e-4)])] == [6, 2]


def test_long_rows_go_where_there_is_room_if_that_takes_no_longer() -> None:
    equal = [Speed(0, 1e-4)] * 2
    assert as_lists(np.array([1500, 100, 100], np.int32), equal, limits=[512, None]) == [[1, 2], [0]]
    lengths = np.array([1500] + [100] * 14, np.int32)
    small, large = as_lists(lengths, equal, limits=[512, None])
    assert 0 in large
    assert small
    # With one member there is no choice: a row over its limit is computed all the same.
    assert as_lists(lengths, equal[:1], limits=[512]) == [list(range(15))]


def test_rows_go_where_they_would_rather_be() -> None:
    lengths = np.full(32, 200, np.int32)
    speeds = [Speed(0, 1e-4)] * 2
    wanted = {row: row % 2 for row in range(32)}
    division = as_lists(lengths, speeds, affinity=wanted)
    assert [row % 2 for row in division[0]] == [0] * 16
    assert [row % 2 for row in division[1]] == [1] * 16


@given(lengths_of, st.lists(speed_of, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_wishes_cost_little(lengths: Int32, speeds: list[Speed], random: object) -> None:
    wishes = {row: random.randrange(len(speeds)) for row in range(len(lengths))}  # type: ignore[attr-defined]
    plain = slowest(lengths, speeds, as_lists(lengths, speeds))
    division = as_lists(lengths, speeds, affinity=wishes)
    assert sorted(itertools.chain(*division)) == list(range(len(lengths)))
    assert slowest(lengths, speeds, division) <= AFFINITY_SLACK * plain * (1 + 1e-9)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(8, 5000), st.integers(1, 12))
def test_groups_keep_their_limits(values: list[int], limit: int, most_rows: int) -> None:
    padded = sorted(padded_lengths(np.array(values, np.int32), None).tolist(), reverse=True)
    sizes = group_rows(padded, limit, most_rows)
    assert sum(sizes) == len(padded)
    starts = itertools.accumulate(sizes, initial=0)
    for start, size in zip(starts, sizes, strict=False):
        assert 1 <= size <= most_rows
        assert size == 1 or size * padded[start] <= limit


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.sampled_from([None, 100, 2048]))
def test_rows_are_padded_as_batches_are(values: list[int], max_seq_length: int | None) -> None:
    expected = [padded_length(value - 1, max_seq_length) for value in values]
    assert padded_lengths(np.array(values, np.int32), max_seq_length).tolist() == expected


def test_a_shorter_row_never_costs_more() -> None:
    assert cost_positions([1024, 64, 64]) == 1024 + 128 + 64
    assert cost_positions([64, 56, 48]) == 192
    assert cost_positions([]) == 0


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one member"):
        divide(np.zeros(0, np.int32), None, [])
    with pytest.raises(ValueError, match="2 limits for 1"):
        divide(np.zeros(0, np.int32), None, [Speed(0, 1)], [None, None])
