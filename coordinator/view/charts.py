"""Charts as HTML and inline SVG that need no script.

The SVG is stretched to whatever width there is, with strokes that do not stretch; labels are HTML beside it, so that
they keep their size on a phone. A script may read ``hover_data`` and add a read-out.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from coordinator.view.curves import Points
from coordinator.view.scales import Scale, fitting, whole

UNITS = 1000
TABLE_ROWS = 20


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    Attributes:
        label: in the legend and the read-out.
        look: ``raw`` (faint), ``main``, ``second`` (with dots), ``line-1`` to ``line-6``, or ``area-1`` to ``area-6``
            (stacked in order).
        points: (step, value), rising.
        sparse: whether the read-out shows the last value before a step rather than the nearest.
    """

    label: str
    look: str
    points: Points
    sparse: bool = False

    @property
    def stacked(self) -> bool:
        return self.look.startswith("area")


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        key: its id in the page.
        title: what is measured.
        unit: of the vertical axis.
        curves: at least one, the later ones drawn above.
        last_step: where the horizontal axis ends.
        from_zero: whether the vertical axis includes 0.
        marks: (step, text) of events to mark.
        remark: a line below the chart.
        large: whether it is drawn tall, over the page's whole width.
    """

    key: str
    title: str
    unit: str
    curves: Sequence[Curve]
    last_step: int
    from_zero: bool = True
    marks: Sequence[tuple[int, str]] = ()
    remark: str = ""
    large: bool = False

    def html(self) -> str:
        """The whole figure, drawn."""
        x, y = whole(self.last_step), self._vertical()
        return self._figure(
            f"<div class=frame><div class=ylabels aria-hidden=true>{_labels(y, 'bottom')}</div>"
            f'<div class=plot role=img aria-label="{escape(self.described())}">{self._svg(x, y)}</div>'
            f"<div class=xlabels aria-hidden=true>{_labels(x, 'left')}</div></div>"
        )

    def canvas_html(self) -> str:
        """The figure with an empty canvas, on which a script draws ``drawing``."""
        return self._figure(
            f'<div class="plot canvas" role=img aria-label="{escape(self.described())}">'
            "<canvas aria-hidden=true></canvas></div>"
        )

    def _figure(self, plot: str) -> str:
        y = self._vertical()
        unit = f" <span class=unit>{escape(self.unit)}{', logarithmic' if y.logarithmic else ''}</span>"
        remark = f"<p class=remark>{escape(self.remark)}</p>" if self.remark else ""
        return (
            f'<figure class="chart{" large" if self.large else ""}" id="{self.key}">'
            f"<figcaption><h3>{escape(self.title)}{unit}</h3>{self._legend()}</figcaption>"
            f"{plot}{remark}<details><summary>Table<span class=unseen> of {escape(self.title.lower())}</span></summary>"
            f"{self._table()}</details></figure>"
        )

    def hover_data(self) -> dict[str, Any]:
        """What a script needs to show values: the axes and every curve but the faint ones."""
        return self._data(self._told())

    def drawing(self) -> dict[str, Any]:
        """What a script needs to draw all of it."""
        y = self._vertical()
        return {
            **self._data(self.curves),
            "marks": [{"x": step, "text": text} for step, text in self.marks],
            "ticks": list(y.ticks),
            "tick_labels": list(y.labels),
        }

    def _data(self, curves: Sequence[Curve]) -> dict[str, Any]:
        y = self._vertical()
        return {
            "key": self.key,
            "last": self.last_step,
            "low": _digits(y.low),
            "high": _digits(y.high),
            "log": y.logarithmic,
            "curves": [
                {
                    "label": curve.label,
                    "look": curve.look,
                    "sparse": curve.sparse,
                    "x": [_digits(step, 7) for step, _ in curve.points],
                    "y": [_digits(value) for _, value in curve.points],
                }
                for curve in curves
            ],
        }

    def described(self) -> str:
        """The chart in words."""
        parts = []
        for curve in self._told():
            if curve.points:
                (_, first), (_, last) = curve.points[0], curve.points[-1]
                least, most = min(v for _, v in curve.points), max(v for _, v in curve.points)
                parts.append(f"{curve.label} from {first:.4g} to {last:.4g}, lowest {least:.4g}, highest {most:.4g}")
        return f"{self.title}, {self.unit}, over {self.last_step:,} steps: {'; '.join(parts) or 'no values'}"

    def _told(self) -> list[Curve]:
        return [curve for curve in self.curves if curve.look != "raw"]

    def _vertical(self) -> Scale:
        stacked = [value for _, value in _stack([c for c in self.curves if c.stacked])[-1]]
        values = stacked + [value for curve in self.curves if not curve.stacked for _, value in curve.points]
        return fitting(values, from_zero=self.from_zero, count=6 if self.large else 4)

    def _legend(self) -> str:
        if len(self.curves) < 2:
            return ""
        items = (f'<li><i class="key {curve.look}"></i>{escape(curve.label)}</li>' for curve in self.curves)
        return f"<ul class=legend>{''.join(items)}</ul>"

    def _svg(self, x: Scale, y: Scale) -> str:
        grid = "".join(f"M0 {_down(y, tick)}H{UNITS}" for tick in y.ticks)
        marks = "".join(
            f'<path class=mark d="M{_across(x, step)} 0V{UNITS}"><title>{escape(text)}</title></path>'
            for step, text in self.marks
        )
        areas = [curve for curve in self.curves if curve.stacked]
        edges = _stack(areas)
        drawn = "".join(
            f'<path class="{curve.look}" d="{_area(edges[i], edges[i + 1], x, y)}"/>' for i, curve in enumerate(areas)
        )
        drawn += "".join(_drawn(curve, x, y) for curve in self.curves if not curve.stacked)
        return (
            f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio=none aria-hidden=true>'
            f'<path class=grid d="{grid}"/>{marks}{drawn}</svg>'
        )

    def _table(self) -> str:
        told = self._told()
        dense = next((c.points for c in told if not c.sparse and c.points), told[0].points if told else [])
        count = min(TABLE_ROWS, len(dense))
        steps = [dense[round(i * (len(dense) - 1) / max(count - 1, 1))][0] for i in range(count)]
        head = "".join(f"<th scope=col>{escape(curve.label)}</th>" for curve in told)
        rows = "".join(
            f"<tr><th scope=row>{step:,.0f}</th>{''.join(f'<td>{_value_at(curve, step)}</td>' for curve in told)}</tr>"
            for step in steps
        )
        return f"<div class=scroll><table><thead><tr><th scope=col>step</th>{head}</tr></thead>{rows}</table></div>"


def _value_at(curve: Curve, step: float) -> str:
    """The last value up to a step."""
    index = bisect_right(curve.points, (step, float("inf"))) - 1
    return f"{curve.points[index][1]:.4g}" if index >= 0 else ""


def _labels(scale: Scale, side: str) -> str:
    pairs = zip(scale.ticks, scale.labels, strict=True)
    return "".join(f'<span style="{side}:{100 * scale.place(t):.2f}%">{escape(label)}</span>' for t, label in pairs)


def _stack(curves: Sequence[Curve]) -> list[Points]:
    """The lines between stacked areas, from the bottom; all areas have the same steps."""
    edges: list[Points] = [[(step, 0.0) for step, _ in curves[0].points]] if curves else [[]]
    for curve in curves:
        edges.append([(s, base + value) for (s, base), (_, value) in zip(edges[-1], curve.points, strict=True)])
    return edges


def _drawn(curve: Curve, x: Scale, y: Scale) -> str:
    path = f'<path class="{curve.look}" d="{_line(curve.points, x, y)}"/>'
    if curve.look == "second" or len(curve.points) == 1:
        # A line of no length with round ends is a dot that stretching leaves round.
        dots = "".join(f"M{_across(x, step)} {_down(y, value)}h0" for step, value in curve.points)
        path += f'<path class="{curve.look} dots" d="{dots}"/>'
    return path


def _line(points: Points, x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{_across(x, step)} {_down(y, value)}" for step, value in points) if points else ""


def _area(lower: Points, upper: Points, x: Scale, y: Scale) -> str:
    return _line([*upper, *reversed(lower)], x, y) + "Z" if upper else ""


def _across(x: Scale, step: float) -> str:
    return f"{UNITS * x.place(step):.1f}".removesuffix(".0")


def _down(y: Scale, value: float) -> str:
    return f"{UNITS * (1 - y.place(value)):.1f}".removesuffix(".0")


def _digits(value: float, count: int = 5) -> float:
    found = float(f"{value:.{count}g}")
    return int(found) if found.is_integer() and abs(found) < 1e15 else found
