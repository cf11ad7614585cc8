"""When enough is known of how long something takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from node.worker.probing import timed


@pytest.mark.parametrize(
    ("times", "repeats", "seconds", "taken"),
    [
        pytest.param([0.0625], 2, 0.5, 4, id="they agree"),
        pytest.param([0.03125], 2, 0.5, 7, id="they agree, and a processor has had the time to wake up"),
        pytest.param([0.0625, 0.125], 2, 0.5, 6, id="they do not agree"),
        pytest.param([2.0], 2, 0.5, 2, id="long ones"),
        pytest.param([0.0625], 9, 0.5, 9, id="so many are wanted"),
        pytest.param([0.0625], 1, 0.0, 1, id="one is wanted"),
    ],
)
def test_timing_ends_when_more_would_change_nothing(
    times: Iterable[float], repeats: int, seconds: float, taken: int
) -> None:
    clock = itertools.cycle(times)
    assert timed(lambda: next(clock), repeats, seconds) == tuple(itertools.islice(itertools.cycle(times), taken))
