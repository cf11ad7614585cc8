"""Axes with round numbers: from values to places between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
LOGARITHMIC_ABOVE = 50.0


@dataclass(frozen=True)
class Scale:
    """One axis.

    Attributes:
        low: value at the start of the axis.
        high: value at its end.
        ticks: values to label, rising.
        labels: one per tick.
        logarithmic: whether equal lengths are equal ratios.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the start, 1 at the end, cut off outside."""
        if self.logarithmic:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)


def round_step(spread: float, count: int) -> float:
    """The smallest round distance that divides ``spread`` into at most ``count`` parts."""
    rough = spread / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next((step * power for step in STEPS if step * power >= rough * (1 - 1e-9)), 10 * power)


def linear(low: float, high: float, count: int = 5) -> Scale:
    """An axis that begins and ends at round numbers around ``low`` and ``high``."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = abs(high) / 2 or 1.0
        low, high = low - (margin if low else 0.0), high + margin
    step = round_step(high - low, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, tick_labels(ticks, step))


def whole(last: int, count: int = 6) -> Scale:
    """The axis of steps: from 0 to exactly ``last``, with round whole ticks inside."""
    last = max(last, 1)
    step = max(round_step(last, count), 1.0)
    if step == 2.5:
        step = 5.0
    ticks = tuple(index * step for index in range(int(last / step) + 1))
    return Scale(0.0, float(last), ticks, tuple(_thousands(tick) for tick in ticks))


def logarithmic(low: float, high: float) -> Scale:
    """An axis over powers of ten; both ends above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Scale(10.0**first, 10.0**last, ticks, tuple(_short(tick) for tick in ticks), logarithmic=True)


def fitting(values: Sequence[float], *, from_zero: bool, count: int = 5) -> Scale:
    """The axis for these finite values; logarithmic where a few outliers would flatten all the rest."""
    if not values:
        return linear(0.0, 1.0, count)
    low, high, middle = min(values), max(values), sorted(values)[len(values) // 2]
    if low > 0 and high > LOGARITHMIC_ABOVE * middle:
        return logarithmic(low, high)
    return linear(min(low, 0.0) if from_zero else low, high, count)


def tick_labels(ticks: Sequence[float], step: float) -> tuple[str, ...]:
    """Labels with the same number of digits each."""
    largest = max(abs(tick) for tick in ticks)
    if largest >= 10_000 and step >= 100:
        return tuple(_thousands(tick) for tick in ticks)
    if largest < 0.001 or largest >= 1e6:
        return tuple(_short(tick) for tick in ticks)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-6:
        digits += 1
    return tuple(f"{tick + 0.0:,.{digits}f}" for tick in ticks)


def _thousands(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:,.0f}"


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 10_000:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
