"""Charts of the machines of a fleet: how each one's steps were spent, its rows, its memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coordinator.view.charts import Chart, Curve
from coordinator.view.curves import mean_points, moving_mean, smoothing_radius
from coordinator.view.format import GIB, finite
from coordinator.view.records import NodeRecord, RunRecord

MOST_SHARES = 6


def machine_charts(record: RunRecord) -> list[Chart]:
    """The charts of several machines; none where one trained alone."""
    if len(record.nodes) < 2:
        return []
    found = [_shares(record), *_seconds(record), _memory(record)]
    return [chart for chart in found if chart is not None]


def _by_rows(record: RunRecord) -> list[str]:
    return sorted(record.nodes, key=lambda name: -sum(record.nodes[name].rows))


def _shares(record: RunRecord) -> Chart | None:
    """How the rows were divided; of many machines those with the most, and the rest together."""
    names = _by_rows(record)
    own = names if len(names) <= MOST_SHARES else names[: MOST_SHARES - 1]
    groups = {name: [name] for name in own}
    if len(own) < len(names):
        groups[f"{len(names) - len(own)} others"] = names[len(own) :]
    indices = [i for i, mean in enumerate(record.mean_compute) if math.isfinite(mean)]
    totals = [sum(node.rows[i] for node in record.nodes.values()) or 1.0 for i in indices]
    steps, radius = [record.steps[i] for i in indices], smoothing_radius(len(indices))
    curves = []
    for number, (label, members) in enumerate(groups.items(), start=1):
        part = [
            100 * sum(record.nodes[name].rows[i] for name in members) / total
            for i, total in zip(indices, totals, strict=True)
        ]
        points = mean_points(steps, moving_mean(part, [1.0] * len(part), radius))
        curves.append(Curve(label, f"area-{number}", points))
    return _chart(record, "shares", "Shares", "% of the rows", curves)


def _seconds(record: RunRecord) -> list[Chart]:
    """How each machine spent its steps; of many, those with the most rows."""
    charts = []
    for number, name in enumerate(_by_rows(record)[:MOST_SHARES], start=1):
        node = record.nodes[name]
        present = [i for i, compute in enumerate(node.compute) if math.isfinite(compute)]
        # In the steps between, in which it took no part, it spent nothing.
        indices = range(present[0], present[-1] + 1) if present else range(0)
        steps, radius = [record.steps[i] for i in indices], smoothing_radius(len(indices))
        curves = []
        for look, (label, values) in zip(("area-1", "area-2", "area-4"), _split(record, node, indices), strict=True):
            points = mean_points(steps, moving_mean(values, [1.0] * len(values), radius))
            curves.append(Curve(label, look, points))
        chart = _chart(record, f"seconds-{number}", f"Step of {name}", "seconds", curves)
        charts += [chart] if chart is not None else []
    return charts


def _split(record: RunRecord, node: NodeRecord, indices: Sequence[int]) -> list[tuple[str, list[float]]]:
    """A machine's seconds by what they went into.

    The shortest wait of any machine is that of the one which all waited for, so it is the network's; what a machine
    waited longer was for others.
    """
    compute, wait = ([finite(values[i]) or 0.0 for i in indices] for values in (node.compute, node.wait))
    network = [min(record.columns["wait_seconds"][i], own) for i, own in zip(indices, wait, strict=True)]
    return [
        ("compute", compute),
        ("network", network),
        ("waiting for others", [max(own - part, 0.0) for own, part in zip(wait, network, strict=True)]),
    ]


def _memory(record: RunRecord) -> Chart | None:
    curves = []
    for number, name in enumerate(_by_rows(record)[:MOST_SHARES], start=1):
        gigabytes = [value / GIB for value in record.nodes[name].memory]
        curves.append(Curve(name, f"line-{number}", mean_points(record.steps, gigabytes)))
    return _chart(record, "memories", "Peak memory of each machine", "GB", curves)


def _chart(record: RunRecord, key: str, title: str, unit: str, curves: Sequence[Curve]) -> Chart | None:
    drawn = [curve for curve in curves if curve.points]
    return Chart(key, title, unit, drawn, record.steps[-1]) if drawn else None
