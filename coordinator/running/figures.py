"""The last figures that a run wrote, read from the end of its metrics."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from coordinator.view.format import finite, number

_PIECE = 64 << 10
MOST_BYTES = 16 << 20
"""Of the file's end that is looked through; a validation may be far back."""


@dataclass(frozen=True)
class Figures:
    """Where a run was at last; None is unknown.

    Attributes:
        steps: the last that was done.
        final_loss: of that step.
        final_val_loss: of the last validation.
    """

    steps: int | None = None
    final_loss: float | None = None
    final_val_loss: float | None = None


def last_figures(metrics: Path) -> Figures:
    """The last figures of a ``metrics.jsonl``; what cannot be read is unknown."""
    steps, loss, validation = None, None, None
    try:
        with metrics.open("rb") as file:
            end = at = file.seek(0, os.SEEK_END)
            rest = b""
            while at > 0 and end - at < MOST_BYTES and (steps is None or validation is None):
                start = max(at - _PIECE, 0)
                file.seek(start)
                first, *lines = (file.read(at - start) + rest).split(b"\n")
                at, rest = start, first
                for line in reversed(lines if at else [first, *lines]):
                    entry = _object(line)
                    if steps is None and "loss" in entry:
                        steps, loss = int(finite(entry.get("step")) or 0), number(entry["loss"])
                    if validation is None and "val_loss" in entry:
                        validation = number(entry["val_loss"])
    except OSError:
        pass
    return Figures(steps, loss, validation)


def _object(line: bytes) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
