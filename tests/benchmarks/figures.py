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
        below: what the median should stay below, or None.
        at_least: what the median should reach, or None.
        at_most: what it should not exceed, or None; with none of them the figure is only for comparison.
    """

    name: str
    unit: str
    values: tuple[float, ...]
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def goal(self) -> str:
        """What the median should be, or ""."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        goals = (("<", self.below), (">=", self.at_least), ("<=", self.at_most))
        return next((f"{sign} {value:g}" for sign, value in goals if value is not None), "")

    @property
    def verdict(self) -> str:
        """Whether it is, or "" without a goal."""
        if not self.goal:
            return ""
        fits = (
            (self.below is None or self.median < self.below)
            and (self.at_least is None or self.median >= self.at_least)
            and (self.at_most is None or self.median <= self.at_most)
        )
        return "reached" if fits else "missed"


def table(figures: list[Figure]) -> str:
    """A row for each figure: median, range, goal."""
    rows = [("measure", "median", "range", "goal", "")]
    for figure in figures:
        spread = f"{min(figure.values):.3g} to {max(figure.values):.3g}"
        rows.append((figure.name, f"{figure.median:.3g} {figure.unit}", spread, figure.goal, figure.verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
