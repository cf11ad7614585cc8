"""Runs as a table, one by one, and as data."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.running.known import STATES, Known
from coordinator.view.format import MISSING, duration_text, loss_text, one_line, shortened
from coordinator.view.plain import jsonable

COLUMNS = ("run", "state", "steps", "training loss", "validation", "began", "model", "folder")
MODEL_CHARACTERS = 32
FILES = (
    *("adapters.safetensors", "adapter_config.json", "checkpoints", "metrics.jsonl", "events.jsonl"),
    *("config.yaml", "report.html"),
)


def table(runs: Sequence[Known], now: float) -> list[str]:
    """One line for each run, below a heading; the folder comes last, because it is the longest."""
    rows = [COLUMNS, *(_row(run, now) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    return ["  ".join([*(f"{text:<{w}}" for text, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]


def as_data(run: Known) -> dict[str, Any]:
    """A run for programs; null where a thing is unknown."""
    data = {
        "run": run.run,
        "state": run.state,
        "folder": run.folder,
        "files": run.place,
        "missing": run.missing or None,
        "model": run.model or None,
        "data": run.data or None,
        "steps": run.figures.steps,
        "total_steps": run.total_steps,
        "final_loss": run.figures.final_loss,
        "final_val_loss": run.figures.final_val_loss,
        "began": run.began,
        "since": run.since,
        "ended": run.ended,
        "message": run.message or None,
        "pid": run.holder.pid if run.holder is not None else None,
        "log": run.log,
    }
    found = jsonable(data)
    assert isinstance(found, dict)
    return found


def details(run: Known, now: float) -> list[str]:
    """Everything that is known of a run, as labelled lines."""
    state = STATES[run.state]
    if run.holder is not None:
        where = "" if run.holder.here else f" on {run.holder.host}"
        state += f" (process {run.holder.pid}{where}, since {when(run.holder.since, now)})"
    lines = [
        ("state", state),
        ("why", run.message),
        ("model", run.model),
        ("data", run.data),
        ("steps", _steps(run)),
        ("training loss", loss_text(run.figures.final_loss)),
        ("validation", loss_text(run.figures.final_val_loss)),
        ("began", when(run.began, now)),
        ("resumed", when(run.since, now) if run.holder is None and run.since != run.began else ""),
        ("ended", when(run.ended, now)),
        ("took", duration_text(run.ended - run.began) if run.began and run.ended else MISSING),
        ("folder", str(run.place or run.folder)),
        ("missing", run.missing),
        ("files", ", ".join(_files(run))),
        ("log", str(run.log or "")),
        ("go on", f"coordinator train --resume --adapter-path {shlex.quote(str(run.folder))}" if run.resumable else ""),
    ]
    shown = [(label, one_line(text)) for label, text in lines if text and text != MISSING]
    width = max(len(label) for label, _ in shown)
    return [f"run {run.run}", *(f"  {label:<{width}}  {text}" for label, text in shown)]


def _files(run: Known) -> list[str]:
    """Which of ``FILES`` there are."""
    try:
        return [name for name in FILES if run.place is not None and (run.place / name).exists()]
    except OSError:  # the disk that they are on is gone meanwhile
        return []


def when(seconds: float | None, now: float) -> str:
    """A time of today, of this year, or of another one."""
    if seconds is None:
        return MISSING
    then, today = time.localtime(seconds), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%d %b %H:%M" if then[0] == today[0] else "%Y-%m-%d", then)


def _row(run: Known, now: float) -> tuple[str, ...]:
    gone = f" ({one_line(run.missing)})" if run.missing else ""
    return (
        run.run,
        STATES[run.state],
        _steps(run),
        loss_text(run.figures.final_loss),
        loss_text(run.figures.final_val_loss),
        when(run.began, now),
        shortened(one_line(Path(run.model).name), MODEL_CHARACTERS) or MISSING,
        one_line(str(run.place or run.folder)) + gone,
    )


def _steps(run: Known) -> str:
    done = run.figures.steps
    if done is None:
        return MISSING
    return f"{done:,}/{run.total_steps:,}" if run.total_steps else f"{done:,}"
