"""The run's event stream: what the job tells its readers.

The live view, plain lines, the report, ``metrics.jsonl``, ``events.jsonl`` and the reporters (wandb, …) are all
readers of this one stream. Each reader has one method, ``handle(event)``; the job knows nothing of them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

NOTES_KEPT = 100
FAILED = "failed"
"""Why a run failed: kind of the note and label in the summary, for files and programs.

Views for people pass both over: whoever started the run is told by the error that ends it, at the very end.
"""
MISSED = "missed"
"""Events that a reader of an ``EventLog`` came too late for: kind of the note that it gets in their place."""
DOWNLOADING = "downloading model"
"""A long task that is counted in bytes."""
STOPPED = "stopped"
"""Where a run was stopped: label in the summary. Views for people pass it over, too: the last line says it."""


@dataclass(frozen=True)
class RunStarted:
    """Training is about to begin.

    Attributes:
        run: the run's id.
        name: what people call it: the adapter folder.
        config: every option, resolved.
        total_iters, total_steps: planned batches and optimizer steps.
        first_step: the step training begins at: 1, or one after the restored step.
        facts: labelled lines for a header, in order: model, machine, method, data, memory.
        history: metrics of earlier steps when a run is resumed, oldest first.
        recovered: those of them that nobody was told of when they were done.
    """

    run: str
    name: str
    config: dict[str, Any]
    total_iters: int
    total_steps: int
    first_step: int
    facts: tuple[tuple[str, str], ...]
    history: tuple[dict[str, Any], ...] = ()
    recovered: tuple[StepFinished, ...] = ()


@dataclass(frozen=True)
class FleetMember:
    """A machine of a fleet, for people.

    Attributes:
        name: what it is called.
        chip: its processor, or None.
        memory_bytes: its memory, or None.
        rows: its rows of a typical step.
    """

    name: str
    chip: str | None
    memory_bytes: int | None
    rows: int


@dataclass(frozen=True)
class FleetLink:
    """How fast two machines reach each other, as measured.

    Attributes:
        one, other: their names.
        bits_per_second: in the slower direction; 0 where they do not.
        latency_seconds: one way.
        text: the link in words.
    """

    one: str
    other: str
    bits_per_second: float
    latency_seconds: float
    text: str


@dataclass(frozen=True)
class FleetFormed:
    """Several machines have been chosen.

    Attributes:
        members: in the order of their ranks.
        step_rows: rows of a typical step.
        lines: the plan in words: shares, expected step, links, who is left out and why, advice.
        links: between those that were looked at.
    """

    members: tuple[FleetMember, ...]
    step_rows: int
    lines: tuple[str, ...]
    links: tuple[FleetLink, ...] = ()


@dataclass(frozen=True)
class StepFinished:
    """One optimizer step: ``metrics`` is the object that stands in ``metrics.jsonl``.

    Keys: step, iter, loss, tokens, learning_rate, grad_norm, seconds, compute_seconds, wait_seconds, nodes,
    peak_memory_bytes, padded_tokens; where several machines take part, or may, also ``per_node``, in the steps that one
    did alone, too: by name rows, positions, compute_seconds, wait_seconds, peak_memory_bytes; of who was lost before it
    could report, rows only. ``report`` is true where ``--steps-per-report`` asks for a line.
    """

    metrics: dict[str, Any]
    report: bool

    @property
    def step(self) -> int:
        """Its number, from 1."""
        return int(self.metrics["step"])

    @property
    def loss(self) -> float:
        """Mean over the step's target tokens, before the update."""
        return float(self.metrics["loss"])


@dataclass(frozen=True)
class Validated:
    """One validation: ``metrics`` has step, val_loss, val_tokens, seconds."""

    metrics: dict[str, Any]
    best: bool

    @property
    def step(self) -> int:
        """Steps done by then."""
        return int(self.metrics["step"])

    @property
    def loss(self) -> float:
        """Mean over the target tokens of the validation set."""
        return float(self.metrics["val_loss"])


@dataclass(frozen=True)
class Sampled:
    """Text generated from a ``--sample-prompt`` at a validation."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Tested:
    """The test set's loss when training ended."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class Advanced:
    """How far a long task is: ``tokenising train``, ``validating``, ``loading model``, ``fusing``.

    Attributes:
        task: what is being done.
        done: so much of it.
        total: how much there is; 0 where nobody knows.
        in_bytes: both are bytes.
    """

    task: str
    done: int
    total: int
    in_bytes: bool = False


@dataclass(frozen=True)
class Noted:
    """Something happened that a person should know; one line, also in ``events.jsonl``.

    Attributes:
        kind: a short name: ``checkpoint``, ``worker_lost``, ``restarted``, ``warning``, ``archived``, ``FAILED``, …
        message: one line.
        level: ``info``, ``warning`` or ``error``.
        details: further values for ``events.jsonl``.
    """

    kind: str
    message: str
    level: str = "info"
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFinished:
    """Training ended.

    Attributes:
        status: ``done``, ``stopped_early``, ``interrupted`` or ``failed``.
        summary: labelled lines: where everything is.
        next_commands: what to type next, with a purpose each: (purpose, command).
        exit_code: of the command that trains; None is unknown, as of a run of an older version.
    """

    status: str
    summary: tuple[tuple[str, str], ...]
    next_commands: tuple[tuple[str, str], ...]
    exit_code: int | None = None


RunEvent = RunStarted | FleetFormed | StepFinished | Validated | Sampled | Tested | Advanced | Noted | RunFinished


class Reader(Protocol):
    """Anything that follows a run."""

    def handle(self, event: RunEvent) -> None:
        """Take in one event. Must return quickly and never raise for what a run may contain."""

    def close(self) -> None:
        """The stream has ended, for whatever reason; called once."""


class Broadcast:
    """One reader that hands every event to several, in order, one at a time, whatever thread each comes from."""

    def __init__(self, readers: Iterable[Reader] = ()) -> None:
        self._one_at_a_time = threading.RLock()
        self._readers = list(readers)
        self._notes: list[Noted | FleetFormed] = []

    def add(self, reader: Reader) -> None:
        """Hand events to this one too, after what was noted so far."""
        with self._one_at_a_time:
            for note in self._notes:
                reader.handle(note)
            self._readers.append(reader)

    def handle(self, event: RunEvent) -> None:
        """See ``Reader``."""
        with self._one_at_a_time:
            if isinstance(event, RunStarted):
                self._notes = []
            elif isinstance(event, Noted | FleetFormed) and len(self._notes) < NOTES_KEPT:
                self._notes.append(event)
            for reader in list(self._readers):
                try:
                    reader.handle(event)
                except OSError:  # its terminal or pipe is gone; the run and the other readers go on
                    self._readers.remove(reader)

    def close(self) -> None:
        """See ``Reader``."""
        for reader in self._readers:
            with contextlib.suppress(OSError):
                reader.close()
        self._readers = []


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
