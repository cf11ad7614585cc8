"""Lines for logs and pipes: one per thing worth a line, or one JSON object per event."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any, TextIO

from coordinator.stream import (
    FAILED,
    STOPPED,
    Advanced,
    FleetFormed,
    FleetLink,
    FleetMember,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    Sampled,
    StepFinished,
    Tested,
    Validated,
    perplexity,
)
from coordinator.view.format import (
    amount_text,
    duration_text,
    loss_text,
    one_line,
    rate_text,
    shortened,
    size_text,
    speed_text,
)
from coordinator.view.state import RunState

TASK_LINE_EVERY_SECONDS = 5.0
SAMPLE_CHARACTERS = 400
STATUS_TEXT = {
    "done": "done",
    "stopped_early": "stopped early: validation no longer improves",
    "interrupted": "stopped",
    "failed": "failed",
}


class LineWriter:
    """Writes whole lines to a stream that may close early or know few characters; neither ends a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, line: str) -> None:
        if self._stream is None:
            return
        printable = line.encode(self._encoding, "replace").decode(self._encoding)
        try:
            self._stream.write(printable + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # the reader at the other end of the pipe has gone
            self._stream = None


class PlainView:
    """The run as plain lines.

    Args:
        stream: where lines go.
        quiet: only warnings, errors, the test's loss and the summary.
        clock: seconds of a steady clock; decides when a long task is worth another line.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._writer = LineWriter(stream)
        self._quiet = quiet
        self._clock = clock
        self._state = RunState()
        self._task_line_at = clock()

    def handle(self, event: RunEvent) -> None:
        self._state.apply(event)
        match event:
            case RunStarted():
                self._lines(started_lines(event), worth_it=not self._quiet)
            case FleetFormed():
                self._lines(fleet_lines(event), worth_it=not self._quiet)
            case StepFinished(_, True):
                self._lines([step_line(self._state)], worth_it=not self._quiet)
            case Validated():
                self._lines([validation_line(event, self._state)], worth_it=not self._quiet)
            case Sampled(step, prompt, text):
                said = shortened(one_line(text), SAMPLE_CHARACTERS)
                self._lines([f"sample at step {step}: {one_line(prompt)} -> {said}"], worth_it=not self._quiet)
            case Tested():
                self._lines([test_line(event)])
            case Advanced():
                self._task(event)
            case Noted(kind, message, level) if kind != FAILED:
                line = one_line(message) if level == "info" else f"{level}: {one_line(message)}"
                self._lines([line], worth_it=not self._quiet or level != "info")
            case RunFinished():
                self._lines(finished_lines(event, self._state))

    def close(self) -> None:
        """Nothing is open."""

    def _lines(self, lines: list[str], *, worth_it: bool = True) -> None:
        if worth_it:
            for line in lines:
                self._writer.write(line)

    def _task(self, event: Advanced) -> None:
        now = self._clock()
        if not self._quiet and now - self._task_line_at >= TASK_LINE_EVERY_SECONDS:
            self._task_line_at = now
            done = f": {amount_text(event.done, event.in_bytes)}" if event.done or event.total > 0 else ""
            total = f" of {amount_text(event.total, event.in_bytes)}" if event.total > 0 else ""
            self._writer.write(f"{one_line(event.task)}{done}{total}")


def started_lines(event: RunStarted) -> list[str]:
    """The header: the run's name and its facts."""
    goes_on = f", from step {event.first_step:,}" if event.first_step > 1 else ""
    width = max((len(label) for label, _ in event.facts), default=0)
    facts = [f"  {one_line(label):<{width}}  {one_line(value)}" for label, value in event.facts]
    return [f"run {event.run} in {one_line(event.name)}{goes_on}", *facts]


def fleet_lines(event: FleetFormed) -> list[str]:
    """The plan: who does how much over which link, and who is left out."""
    first, *rest = event.lines or ("",)
    return [f"fleet: {one_line(first)}", *(f"  {one_line(line)}" for line in rest)]


def step_line(state: RunState) -> str:
    """Where the run is: loss is the mean over the last report interval."""
    total = f"{state.total_steps}"
    parts = [f"step {state.step:>{len(total)}}/{total}", f"loss {loss_text(state.training_loss)}"]
    if state.validation is not None:
        parts.append(f"val {loss_text(state.validation.loss)}")
    parts += [f"{speed_text(state.tokens_per_second)} tok/s", f"lr {rate_text(state.learning_rate)}"]
    if len(state.members) > 1:
        parts.append(f"{len(state.members)} nodes")
    if state.peak_memory_bytes:
        parts.append(f"peak {size_text(state.peak_memory_bytes)}")
    if state.step < state.total_steps and state.seconds_left is not None:
        parts.append(f"{duration_text(state.seconds_left)} left")
    return "  ".join(parts)


def validation_line(event: Validated, state: RunState) -> str:
    """One validation, and how it stands to the best."""
    step = event.metrics.get("step", 0)
    loss = state.validation.loss if state.validation else None
    if event.best:
        remark = "  best so far" if step else ""
    else:
        remark = f"  best {loss_text(state.best.loss)} at step {state.best.step}" if state.best else ""
    return f"validation at step {step}: loss {loss_text(loss)}{remark}"


def test_line(event: Tested) -> str:
    """The test's loss and perplexity."""
    return f"test: loss {loss_text(event.loss)}, perplexity {perplexity(event.loss):,.3f}, {event.tokens:,} tokens"


def finished_lines(event: RunFinished, state: RunState) -> list[str]:
    """How it ended, where everything is, and what to type next."""
    time_spent = f" in {duration_text(state.train_seconds)}" if state.train_seconds else ""
    status = STATUS_TEXT.get(event.status, event.status)
    if event.status == "interrupted" and event.next_commands:
        status += "; it can go on from here"
    lines = [f"{status}: {state.step:,} steps{time_spent}"]
    summary = summary_lines(event)
    width = max((len(label) for label, _ in summary), default=0)
    lines += [f"  {one_line(label):<{width}}  {one_line(value)}" for label, value in summary]
    for purpose, command in event.next_commands:
        lines += [f"{one_line(purpose)}:", f"  {one_line(command)}"]
    return lines


def summary_lines(event: RunFinished) -> list[tuple[str, str]]:
    """The labelled lines that a person is shown: without why it ended before its end, which the command says."""
    return [(label, value) for label, value in event.summary if label not in (FAILED, STOPPED)]


EVENT_NAMES = {
    RunStarted: "started",
    FleetFormed: "fleet",
    StepFinished: "step",
    Validated: "validation",
    Sampled: "sample",
    Tested: "test",
    Advanced: "progress",
    Noted: "note",
    RunFinished: "finished",
}


class JsonView:
    """One JSON object per event and line: ``{"event": "step", "step": 1, "loss": …}``. What is not finite is null."""

    def __init__(self, stream: TextIO) -> None:
        self._writer = LineWriter(stream)

    def handle(self, event: RunEvent) -> None:
        values: dict[str, Any] = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
        values = {**values.pop("metrics", {}), **values}
        for name in ("history", "recovered"):
            values.pop(name, None)
        self._writer.write(json.dumps(jsonable({"event": EVENT_NAMES[type(event)], **values}), allow_nan=False))

    def close(self) -> None:
        """Nothing is open."""


def jsonable(value: Any) -> Any:
    """What JSON can say, with anything else as text; what is not finite is None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): jsonable(held) for key, held in value.items()}
        case list() | tuple():
            return [jsonable(held) for held in value]
        case None | bool() | int() | str():
            return value
        case FleetMember() | FleetLink():
            return jsonable(dataclasses.asdict(value))
        case _:
            return str(value)
