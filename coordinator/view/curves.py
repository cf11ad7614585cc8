"""A run's figures as curves short enough to draw: smoothed, thinned out, extremes kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.view.series import Series

Points = list[tuple[float, float]]
DRAWN_BUCKETS = 600


def smoothing_radius(count: int) -> int:
    """How far the moving mean reaches to either side: a fiftieth of the run at most; 0 where there is too little."""
    return 0 if count < 10 else min(max(count // 50, 2), 250)


def moving_mean(values: Sequence[float], weights: Sequence[float], radius: int) -> list[float]:
    """Weighted mean of each value and its ``radius`` neighbours on either side; what is not finite is left out.

    Returns:
        One value each; NaN where no finite value is near.
    """
    sums, totals = [0.0], [0.0]
    for value, weight in zip(values, weights, strict=True):
        usable = math.isfinite(value) and math.isfinite(weight) and weight > 0
        sums.append(sums[-1] + (value * weight if usable else 0.0))
        totals.append(totals[-1] + (weight if usable else 0.0))
    result = []
    for index in range(len(values)):
        start, end = max(index - radius, 0), min(index + radius + 1, len(values))
        total = totals[end] - totals[start]
        result.append((sums[end] - sums[start]) / total if total > 0 else math.nan)
    return result


def thinned(steps: Sequence[int], values: Sequence[float]) -> Series:
    """A curve in at most ``DRAWN_BUCKETS`` buckets."""
    series = Series(DRAWN_BUCKETS)
    for step, value in zip(steps, values, strict=True):
        series.append(step, value)
    return series


def mean_points(steps: Sequence[int], values: Sequence[float]) -> Points:
    """The thinned curve through its means."""
    return [(bucket.middle, bucket.mean) for bucket in thinned(steps, values).buckets]


def outline_points(steps: Sequence[int], values: Sequence[float]) -> Points:
    """The thinned curve through its extremes."""
    return thinned(steps, values).outline()
