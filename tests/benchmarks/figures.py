"""Measured figures and how they are shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measure.

    Attributes:
        name: what was measured.
        unit: of the values.
        values: of each repetition.
        below: what the median should stay below, or None for a figure that is only for comparison.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    below: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def table(figures: list[Figure]) -> str:
    """A row for each figure: median, range, goal."""
    rows = [("measure", "median", "range", "goal", "")]
    for figure in figures:
        spread = f"{min(figure.values):.3f} to {max(figure.values):.3f}"
        goal = "" if figure.below is None else f"< {figure.below:g}"
        verdict = "" if figure.below is None else "reached" if figure.median < figure.below else "missed"
        rows.append((figure.name, f"{figure.median:.3f} {figure.unit}", spread, goal, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
