"""Several runs side by side: their curves in one chart, their figures and different options in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from coordinator.dashboard.snapshot import charts_data
from coordinator.dashboard.watched import RUNNING, Watched
from coordinator.running.compare import SAME_FOR_NOBODY
from coordinator.view.charts import Chart, Curve
from coordinator.view.curves import mean_points, moving_mean, smoothing_radius
from coordinator.view.figures import tiles_of
from coordinator.view.report import STATUS_WORDS

LOOKS = 6


def compare_snapshot(runs: Sequence[Watched]) -> dict[str, Any]:
    """All of them."""
    statuses = [run.status for run in runs]
    running = statuses.count(RUNNING)
    return {
        "title": f"{len(runs)} runs",
        "status": RUNNING if running else "done",
        "word": f"{running} running" if running else "none running",
        "heard": max(run.heard for run in runs),
        "patience": max(run.patience_seconds for run in runs),
        "step": 0,
        "total": 0,
        "parts": {"runs": _figures(runs), "options": _options(runs)},
        "charts": charts_data(_charts(runs)),
    }


def _charts(runs: Sequence[Watched]) -> list[Chart]:
    last = max((run.record.steps[-1] for run in runs if run.record.steps), default=0)
    if not last:
        return []
    wanted = (
        ("loss", "Training loss", "per token, smoothed", [_smooth(run, "loss") for run in runs]),
        (
            "validation",
            "Validation loss",
            "per token",
            [[(float(s), v) for s, v in r.record.validations] for r in runs],
        ),
        ("rate", "Learning rate", "per step", [_points(run, "learning_rate") for run in runs]),
        ("seconds", "Time per step", "seconds, smoothed", [_smooth(run, "seconds") for run in runs]),
    )
    charts = []
    for key, title, unit, curves in wanted:
        drawn = [
            Curve(run.title, f"line-{index % LOOKS + 1}", points, sparse=key == "validation")
            for index, (run, points) in enumerate(zip(runs, curves, strict=True))
            if points
        ]
        if drawn:
            charts.append(Chart(key, title, unit, drawn, last, from_zero=key != "loss", large=key == "loss"))
    return charts


def _smooth(run: Watched, name: str) -> list[tuple[float, float]]:
    values = run.record.columns[name]
    return mean_points(run.record.steps, moving_mean(values, [1.0] * len(values), smoothing_radius(len(values))))


def _points(run: Watched, name: str) -> list[tuple[float, float]]:
    return mean_points(run.record.steps, run.record.columns[name])


def _figures(runs: Sequence[Watched]) -> str:
    found = [{label: (value, remark) for label, value, remark in tiles_of(run.record)} for run in runs]
    labels = list(dict.fromkeys(label for tiles in found for label in tiles))
    head = "".join(f"<th scope=col>{escape(label)}</th>" for label in ("status", *labels))
    rows = ""
    for index, (run, tiles) in enumerate(zip(runs, found, strict=True)):
        status = STATUS_WORDS.get(run.status, run.status) or "not begun"
        cells = "".join(f"<td>{escape(tiles.get(label, ('', ''))[0])}</td>" for label in labels)
        link = f'<a href="/run/{index}">{escape(run.title)}</a>'
        key = f'<i class="key line-{index % LOOKS + 1}"></i>'
        rows += f"<tr><th scope=row>{key}{link}</th><td>{escape(status)}</td>{cells}</tr>"
    table = f"<table><thead><tr><th scope=col>run</th>{head}</tr></thead>{rows}</table>"
    return f"<section><h2>Runs</h2><div class=scroll tabindex=0 role=region aria-label=Runs>{table}</div></section>"


def _options(runs: Sequence[Watched]) -> str:
    """The options that are not the same in all runs."""
    names = sorted({name for run in runs for name in run.record.config} - set(SAME_FOR_NOBODY))
    different = [name for name in names if len({_said(run, name) for run in runs}) > 1]
    if not different:
        return "<section><h2>Options</h2><p>All runs have the same options.</p></section>"
    head = "".join(f"<th scope=col>{escape(run.title)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{escape(_said(run, name))}</td>' for run in runs)}</tr>"
        for name in different
    )
    table = f"<table><thead><tr><th scope=col>option</th>{head}</tr></thead>{rows}</table>"
    box = "<div class=scroll tabindex=0 role=region aria-label='Different options'>"
    return f"<section><h2>Different options</h2>{box}{table}</div></section>"


def _said(run: Watched, name: str) -> str:
    value = run.record.config.get(name)
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
