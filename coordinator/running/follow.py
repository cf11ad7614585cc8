"""Following a run that another process does, by the files that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.program import Program
from coordinator.running import presence
from coordinator.running.known import Known, find_place
from coordinator.running.retell import BEGINNINGS, program_of, retold, started
from coordinator.stream import Noted, Reader, RunFinished, StepFinished, Validated
from coordinator.view.format import number
from coordinator.view.records import read_options
from coordinator.view.tail import Tail

LOOK_SECONDS = 0.25
SHOWN_STEPS = 20
"""Of those before, as new ones: speed and shares are told from them."""
SHOWN_NOTES = 8


def follow(run: Known, reader: Reader, wait: Callable[[float], object]) -> RunFinished | None:
    """Show a run from where it is to its end.

    Args:
        run: the run.
        reader: is told what the run's own readers were told.
        wait: passes so many seconds between two looks.

    Returns:
        How it ended; None where its process went away without a word.
    """
    place = run.place
    if run.state == "preparing" and run.holder is not None:
        line = f"run {run.run} prepares (process {run.holder.pid}); its steps are shown when they begin"
        reader.handle(Noted("preparing", line))
    while place is None:
        alive = presence.find(run.run) is not None
        place = find_place(run.run, run.folder)
        if place is None:
            if not alive:
                return None
            wait(LOOK_SECONDS)
    followed = Followed(run.run, place, reader)
    try:
        while True:
            # Before the files are read: what it wrote until then is found in them.
            alive = presence.find(run.run) is not None
            followed.look(alive=alive)
            if followed.finished is not None or not alive:
                return followed.finished
            wait(LOOK_SECONDS)
    finally:
        followed.close()


class Followed:
    """A run's files as events.

    Args:
        run: its id.
        folder: where its files are.
        reader: is told what is new.

    Attributes:
        finished: how it ended, once it has.
    """

    def __init__(self, run: str, folder: Path, reader: Reader) -> None:
        self.finished: RunFinished | None = None
        self._run = run
        self._folder = folder
        self._reader = reader
        self._events = Tail(folder / "events.jsonl")
        self._metrics = Tail(folder / "metrics.jsonl")
        self._sitting: list[dict[str, Any]] = []
        self._program: Program | None = None
        self._step = 0
        self._validated = -1
        self._best: float | None = None

    def look(self, *, alive: bool) -> None:
        """Tell the reader what is new.

        Args:
            alive: whether a process is at work on the run; what ended before it came is not its end.
        """
        # First the events: all steps before the last of them are in the metrics then.
        events = self._events.read()
        if self._program is not None:
            self._tell_metrics(self._metrics.read())
            self._tell_events(events)
            return
        for event in events:
            if event.get("kind") in BEGINNINGS:
                self._sitting = []
            self._sitting.append(event)
        ended = any(event.get("kind") == "finished" for event in self._sitting)
        if self._sitting and not (ended and alive):
            self._begin(self._sitting, alive=alive)

    def close(self) -> None:
        """Keep no file open."""
        self._events.close()
        self._metrics.close()

    def _begin(self, sitting: list[dict[str, Any]], *, alive: bool) -> None:
        first, *later = sitting
        metrics = self._metrics.read()
        recent = metrics[-SHOWN_STEPS:] if alive else []
        history = metrics[: len(metrics) - len(recent)]
        for entry in history:
            self._is_new(entry)
        self._start(first, history)
        of_fleet = [event for event in later if event.get("kind") == "fleet"]
        finished = [event for event in later if event.get("kind") == "finished"]
        notes = [event for event in later if event not in of_fleet and event not in finished]
        self._tell_events([*of_fleet[-1:], *notes[-SHOWN_NOTES:]])
        self._tell_metrics(recent)
        self._tell_events(finished)

    def _start(self, entry: dict[str, Any], history: list[dict[str, Any]]) -> None:
        options = read_options(self._folder / "config.yaml")
        beginning = started(self._run, self._folder, entry, options, history)
        self._program = program_of(beginning)
        self._reader.handle(beginning)

    def _tell_metrics(self, entries: list[dict[str, Any]]) -> None:
        assert self._program is not None
        for entry in entries:
            best = self._best
            if not self._is_new(entry):
                continue
            if "val_loss" in entry:
                self._reader.handle(Validated(entry, best=self._best != best))
            else:
                planned = self._step <= self._program.total_steps  # damaged files may say anything
                self._reader.handle(StepFinished(entry, planned and self._program.reports(self._step)))

    def _is_new(self, entry: dict[str, Any]) -> bool:
        """Whether these metrics are of a step that was not told of; they come again when a file is written anew."""
        step = entry.get("step")
        if not isinstance(step, int):
            return False
        if "val_loss" not in entry:
            new, self._step = step > self._step, max(step, self._step)
            return new
        new, self._validated = step > self._validated, max(step, self._validated)
        loss = number(entry["val_loss"])
        if new and loss is not None and (self._best is None or loss < self._best):
            self._best = loss
        return new

    def _tell_events(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if entry.get("kind") in BEGINNINGS:  # it was killed, and somebody went on with it at once
                self._start(entry, [])
                continue
            event = retold(entry)
            if isinstance(event, RunFinished):
                self.finished = event
            self._reader.handle(event)
