"""What the page shows of a run, as the browser gets it: parts as HTML, charts as figures to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.dashboard.watched import RUNNING, Watched
from coordinator.view.charts import Chart
from coordinator.view.figures import Tile, charts_of, tiles_of
from coordinator.view.format import duration_text, finite, speed_text
from coordinator.view.report import STATUS_WORDS
from coordinator.view.sections import config_html, links_html, nodes_html, samples_html, tiles_html, timeline_html

RECENT_STEPS = 20


def run_snapshot(run: Watched) -> dict[str, Any]:
    """One run."""
    record = run.record
    waiting = "" if record.steps else "<section><p>No training step has been recorded yet.</p></section>"
    return {
        **_heading(run),
        "parts": {
            "tiles": tiles_html(_live_tiles(run) + tiles_of(record)),
            "waiting": waiting,
            "nodes": nodes_html(record.nodes),
            "links": links_html(record.events),
            "events": timeline_html(record.events, newest_first=True),
            "samples": samples_html(record.samples),
            "config": config_html(record.config),
        },
        "charts": charts_data(charts_of(record)),
    }


def _heading(run: Watched) -> dict[str, Any]:
    status = run.status
    return {
        "title": run.title,
        "status": status,
        "word": {"": "waiting for it to begin", RUNNING: "running"}.get(status, STATUS_WORDS.get(status, status)),
        "heard": run.heard,
        "patience": run.patience_seconds,
        "step": run.record.steps[-1] if run.record.steps else 0,
        "total": run.total_steps,
    }


def _live_tiles(run: Watched) -> list[Tile]:
    """What matters only while it runs: how far it is, and how fast now."""
    steps, total = run.record.steps, run.total_steps
    if run.status != RUNNING or not steps:
        return []
    seconds = [finite(value) or 0.0 for value in run.record.columns["seconds"][-RECENT_STEPS:]]
    tokens = [finite(value) or 0.0 for value in run.record.columns["tokens"][-RECENT_STEPS:]]
    mean = sum(seconds) / len(seconds)
    tiles = [("Done", f"{100 * steps[-1] / total:.0f} %", f"step {steps[-1]:,} of {total:,}")] if total else []
    if total and mean > 0:
        tiles.append(("Time left", duration_text(max(total - steps[-1], 0) * mean), "at the speed of now"))
    if mean > 0:
        tiles.append(("Speed now", speed_text(sum(tokens) / sum(seconds)), "target tokens per second"))
    return tiles


def charts_data(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Each chart: its figure's HTML, and what to draw in it."""
    return [{**chart.drawing(), "html": chart.canvas_html()} for chart in charts]
