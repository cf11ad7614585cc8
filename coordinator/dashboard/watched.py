"""One run's folder, read on as it grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from coordinator.view.format import finite
from coordinator.view.records import RunRecord, read_options
from coordinator.view.tail import Tail

RUNNING = "running"


class Watched:
    """A run as its files tell it so far.

    Args:
        folder: the run's; it need not be there yet.
        title: what people call it.

    Attributes:
        folder, title: as given.
        record: what is known.
        version: grows with whatever becomes known.
        heard: when the run last wrote, in seconds of the wall clock; 0 before.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.title = title
        self.version = 0
        self._mark: str | None = None
        self._begin()

    def _begin(self) -> None:
        self.record = RunRecord()
        self.heard = 0.0
        self._config: tuple[int, int] | None = None
        self._metrics = Tail(self.folder / "metrics.jsonl")
        self._events = Tail(self.folder / "events.jsonl")

    def refresh(self) -> None:
        """Take in what is new."""
        changed = self._another_run()
        for row in _news(self._metrics):
            changed = True
            self._take(row)
        for event in _news(self._events):
            changed = True
            self.record.take_event(event)
        self.record.broken_lines = self._metrics.broken_lines + self._events.broken_lines
        changed = self._look_at_options() or changed
        if changed:
            self.version += 1
            self.heard = max((self._written(name) for name in ("metrics.jsonl", "events.jsonl")), default=0.0)

    def _take(self, row: dict[str, Any]) -> None:
        step, record = finite(row.get("step")), self.record
        if step is not None:
            validation = "val_loss" in row
            last = record.validations[-1][0] if record.validations else -1
            newest = max(record.steps[-1] if record.steps else -1, last)
            if step < newest or (step == newest and step == last) or (not validation and step == newest):
                # It was resumed at an earlier step: the file was written anew, and is read from its beginning.
                fresh = RunRecord(events=record.events, samples=record.samples, config=record.config)
                self.record = fresh
        self.record.take_metrics(row)

    def _another_run(self) -> bool:
        """Whether another run has begun here; then all that was known is of the old one."""
        try:
            mark = (self.folder / "run.json").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        if mark == self._mark:
            return False
        before, self._mark = self._mark, mark
        if before is not None:
            self._metrics.close()
            self._events.close()
            self._begin()
        return before is not None

    def _look_at_options(self) -> bool:
        path = self.folder / "config.yaml"
        try:
            facts = path.stat()
        except OSError:
            return False
        known = (facts.st_ino, facts.st_mtime_ns)
        if known == self._config:
            return False
        self._config = known
        self.record.config = read_options(path)
        return True

    def _written(self, name: str) -> float:
        try:
            return (self.folder / name).stat().st_mtime
        except OSError:
            return 0.0

    @property
    def status(self) -> str:
        """``running``, how it ended, or "" before it has begun."""
        for event in reversed(self.record.events):
            kind = event.get("kind")
            if kind in ("started", "resumed"):
                return RUNNING
            if kind == "finished":
                return str(event.get("status", event.get("message", "")))
        return RUNNING if self.record.steps else ""

    @property
    def total_steps(self) -> int:
        """Planned steps; 0 where they are not known."""
        config = self.record.config
        iters, every = finite(config.get("iters")), finite(config.get("grad_accumulation_steps"))
        return math.ceil(iters / max(every or 1.0, 1.0)) if iters else 0

    @property
    def patience_seconds(self) -> float:
        """How long a run may be silent before that is worth saying."""
        seconds = self.record.columns["seconds"][-20:]
        return max([60.0, *(10 * value for value in seconds if math.isfinite(value))])


def _news(tail: Tail) -> list[dict[str, Any]]:
    """What is new in a file; nothing while it cannot be read."""
    try:
        return tail.read()
    except OSError:
        return []
