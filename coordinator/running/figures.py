"""The last figures that a run wrote, read from the end of its metrics."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from coordinator.runfolder import RunFolder
from coordinator.view.format import finite, number
from coordinator.view.losses import Trained, in_interval, report_interval, training_loss

_PIECE = 64 << 10
MOST_BYTES = 16 << 20
"""Of the file's end that is looked through; a validation may be far back."""


@dataclass(frozen=True)
class Figures:
    """Where a run was at last; None is unknown.

    Attributes:
        steps: the last that was done.
        final_loss: mean over the target tokens of the last report interval, as every view shows it.
        final_val_loss: of the last validation.
    """

    steps: int | None = None
    final_loss: float | None = None
    final_val_loss: float | None = None


def last_figures(folder: RunFolder) -> Figures:
    """The last figures that a run wrote to its folder; what cannot be read is unknown."""
    interval = _report_interval(folder.config)
    steps: list[dict[str, object]] = []
    validation, whole = None, False
    try:
        with folder.metrics.open("rb") as file:
            end = at = file.seek(0, os.SEEK_END)
            rest = b""
            while at > 0 and end - at < MOST_BYTES and not (whole and validation is not None):
                start = max(at - _PIECE, 0)
                file.seek(start)
                first, *lines = (file.read(at - start) + rest).split(b"\n")
                at, rest = start, first
                for line in reversed(lines if at else [first, *lines]):
                    entry = _object(line)
                    if "loss" in entry and not whole:
                        steps.append(entry)
                        last, this = Trained.of(steps[0]).iteration, Trained.of(entry).iteration
                        whole = not in_interval(last, this, interval)
                    if validation is None and "val_loss" in entry:
                        validation = number(entry["val_loss"])
    except OSError:
        pass
    if not steps:
        return Figures(None, None, validation)
    loss = training_loss(map(Trained.of, reversed(steps)), interval)
    return Figures(int(finite(steps[0].get("step")) or 0), loss, validation)


def _report_interval(config: Path) -> int:
    """Of the options in a run's folder, without reading all of them: there may be many runs to list."""
    try:
        lines = config.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("steps_per_report:"))
    return report_interval({"steps_per_report": next((int(text) for text in found if text.isdecimal()), None)})


def _object(line: bytes) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
