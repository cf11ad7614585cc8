"""A curve of any length in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Bucket:
    """Neighbouring points of a curve.

    Attributes:
        first, last: positions of the outer points.
        count, total: number of points and sum of their values.
        low, low_at, high, high_at: smallest and largest value, and where they were.
    """

    first: float
    last: float
    count: int
    total: float
    low: float
    low_at: float
    high: float
    high_at: float

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2

    def add(self, position: float, value: float) -> None:
        """Take in one more point after all others."""
        self.last = position
        self.count += 1
        self.total += value
        if value < self.low:
            self.low, self.low_at = value, position
        if value > self.high:
            self.high, self.high_at = value, position

    def join(self, later: Bucket) -> Bucket:
        """Both buckets as one."""
        low, high = min(self, later, key=lambda b: b.low), max(self, later, key=lambda b: b.high)
        return Bucket(
            self.first,
            later.last,
            self.count + later.count,
            self.total + later.total,
            low.low,
            low.low_at,
            high.high,
            high.high_at,
        )


class Series:
    """Points (position, value) in order, kept as at most ``limit`` buckets that know their extremes.

    When the buckets are full, neighbours are joined and from then on each holds twice as many points, so a peak is
    never lost and appending stays cheap. Values that are not finite are counted and otherwise left out.
    """

    def __init__(self, limit: int = 1000) -> None:
        assert limit >= 2
        self.buckets: list[Bucket] = []
        self.missing = 0
        self.per_bucket = 1
        self._limit = limit

    def append(self, position: float, value: float) -> None:
        if not math.isfinite(value):
            self.missing += 1
            return
        if self.buckets and self.buckets[-1].count < self.per_bucket:
            self.buckets[-1].add(position, value)
            return
        if len(self.buckets) >= self._limit:
            pairs = zip(self.buckets[::2], self.buckets[1::2], strict=False)
            odd = self.buckets[-1:] if len(self.buckets) % 2 else []
            self.buckets = [one.join(other) for one, other in pairs] + odd
            self.per_bucket *= 2
            self.append(position, value)
            return
        self.buckets.append(Bucket(position, position, 1, value, value, position, value, position))

    def outline(self) -> list[tuple[float, float]]:
        """The curve through every bucket's extremes: what the full curve looks like when drawn this narrow."""
        points: list[tuple[float, float]] = []
        for bucket in self.buckets:
            pair = sorted([(bucket.low_at, bucket.low), (bucket.high_at, bucket.high)])
            points += pair if bucket.count > 1 else pair[:1]
        return points

    def means(self, columns: int) -> list[float]:
        """The curve as ``columns`` mean values at most, evenly over its points."""
        if len(self.buckets) <= columns:
            return [bucket.mean for bucket in self.buckets]
        result = []
        for column in range(columns):
            start, end = (len(self.buckets) * edge // columns for edge in (column, column + 1))
            part = self.buckets[start:end]
            result.append(sum(b.total for b in part) / sum(b.count for b in part))
        return result
