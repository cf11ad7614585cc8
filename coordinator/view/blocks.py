"""Bars and small plots out of block characters: numbers in, strings out."""

from __future__ import annotations

EIGHTHS = " ▁▂▃▄▅▆▇█"


def bar(fraction: float, width: int) -> tuple[str, str]:
    """The filled and the empty part of a progress bar, ``width`` cells together."""
    halves = round(min(max(fraction, 0.0), 1.0) * width * 2)
    filled = "━" * (halves // 2) + ("╸" if halves % 2 else "")
    return filled, "─" * (width - len(filled))


def plot(values: list[float], width: int, height: int) -> list[str]:
    """A filled curve, top row first; the smallest value is an eighth of a cell high, the largest fills the column.

    Args:
        values: finite, at most ``width`` of them are shown one per cell; fewer are spread over the width.
        width: in cells.
        height: in cells.
    """
    if not values or width < 1 or height < 1:
        return []
    low, high = min(values), max(values)
    spread = high - low
    steps = 8 * height - 1
    levels = []
    for cell in range(width):
        value = values[min(cell * len(values) // width, len(values) - 1)]
        levels.append(1 + round(steps * (value - low) / spread) if spread > 0 else 4 * height)
    return ["".join(EIGHTHS[min(max(level - 8 * row, 0), 8)] for level in levels) for row in reversed(range(height))]
