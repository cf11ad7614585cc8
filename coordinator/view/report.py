"""``report.html``: one file that shows a run, made from what the run's folder holds. Asks no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from coordinator.view.charts import Chart
from coordinator.view.figures import charts_of, tiles_of
from coordinator.view.records import RunRecord, read_run
from coordinator.view.sections import (
    commands_html,
    config_html,
    links_html,
    nodes_html,
    samples_html,
    summary_html,
    tiles_html,
    timeline_html,
)
from node.files import write_text_atomically

STATUS_WORDS = {"done": "done", "stopped_early": "stopped early", "interrupted": "interrupted", "failed": "failed"}


def write_report(
    path: Path,
    folder: Path,
    summary: Mapping[str, str] | None = None,
    *,
    title: str = "",
    status: str = "",
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of a run.

    Args:
        path: the file to write.
        folder: the run's folder with ``metrics.jsonl``, ``events.jsonl`` and ``config.yaml``; any may be missing.
        summary: labelled lines for the top: model, machine, where the adapter is.
        title: what people call the run; the folder's name by default.
        status: ``done``, ``stopped_early``, ``interrupted``, ``failed``, or "" when it is not known.
        commands: what to type next: (purpose, command).
    """
    record = read_run(folder)
    write_text_atomically(path, page(record, title or folder.name, summary or {}, status, commands))


def page(
    record: RunRecord, title: str, summary: Mapping[str, str], status: str, commands: Sequence[tuple[str, str]]
) -> str:
    """The whole page."""
    charts = charts_of(record)
    script, style = _asset("report.js"), _asset("report.css")
    # The page may run this one script and fetch nothing, whatever text a run has brought into it.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    pill = f'<span class="pill {escape(status)}">{escape(STATUS_WORDS.get(status, status))}</span>' if status else ""
    broken = f"<p class=remark>{record.broken_lines} unreadable lines were left out.</p>" if record.broken_lines else ""
    body = [
        f"<header><p class=kind>Training report</p><h1>{escape(title)} {pill}</h1></header><main>",
        tiles_html(tiles_of(record)),
        summary_html(summary),
        _curves(charts),
        nodes_html(record.nodes),
        links_html(record.events),
        samples_html(record.samples),
        commands_html(commands),
        timeline_html(record.events),
        config_html(record.config),
        broken,
        f"</main><script type=application/json id=data>{script_data(charts)}</script><script>{script}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} · training report</title>'
        f"<style>{style}</style></head>\n"
        f"<body>{chr(10).join(part for part in body if part)}</body></html>\n"
    )


def _curves(charts: Sequence[Chart]) -> str:
    if not charts:
        return "<section><p>No training step has been recorded.</p></section>"
    return f"<section class=charts><h2 class=unseen>Curves</h2>{''.join(chart.html() for chart in charts)}</section>"


def script_data(charts: Sequence[Chart]) -> str:
    """The charts' values as JSON that cannot end the element it stands in."""
    text = json.dumps([chart.hover_data() for chart in charts], separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return resources.files("coordinator.view").joinpath(name).read_text(encoding="utf-8").strip()
