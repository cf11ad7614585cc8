"""What is known of a run so far: events go in, what a person is shown comes out. No clock, no output, no I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from coordinator.stream import (
    FAILED,
    Advanced,
    FleetFormed,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    Sampled,
    StepFinished,
    Tested,
    Validated,
)
from coordinator.view.format import finite, number
from coordinator.view.losses import Trained, in_interval, report_interval, training_loss
from coordinator.view.members import Members
from coordinator.view.series import Series

Trend = Literal["falling", "flat", "rising", "unknown"]
SPEED_WINDOW_STEPS = 20
FLAT_BELOW = 0.005


@dataclass(frozen=True)
class Validation:
    """One validation: after which step, and its loss (not always finite)."""

    step: int
    loss: float


@dataclass
class RunState:
    """A run as its events told it.

    Attributes:
        step, iterations: optimizer steps and batches done.
        loss: of the last step; may be NaN, and None before the first step.
        learning_rate, grad_norm, peak_memory_bytes: of the last step that told them.
        trained_tokens: target tokens of all steps, those before a resume included.
        smoothed: the whole run's smoothed losses, bounded.
        bad_losses: steps whose loss was not finite.
        fleet: the machines that were chosen, when there are several.
        members: what each of them did in the last steps of this session.
        warnings: the last warnings and errors; ``warning_count`` counts all.
    """

    started: RunStarted | None = None
    finished: RunFinished | None = None
    step: int = 0
    iterations: int = 0
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    peak_memory_bytes: float | None = None
    trained_tokens: int = 0
    train_seconds: float = 0.0
    smoothed: Series = field(default_factory=Series)
    bad_losses: int = 0
    fleet: FleetFormed | None = None
    members: Members = field(default_factory=Members)
    validation: Validation | None = None
    best: Validation | None = None
    test: Tested | None = None
    tasks: dict[str, Advanced] = field(default_factory=dict)
    notes: deque[Noted] = field(default_factory=lambda: deque(maxlen=8))
    warnings: deque[Noted] = field(default_factory=lambda: deque(maxlen=20))
    warning_count: int = 0
    samples: deque[Sampled] = field(default_factory=lambda: deque(maxlen=4))
    _speed: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SPEED_WINDOW_STEPS))
    _smooth: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    _interval: deque[Trained] = field(default_factory=deque)
    _validation_seconds: float = 0.0

    @property
    def name(self) -> str:
        """What people call the run."""
        return self.started.name if self.started else ""

    @property
    def total_steps(self) -> int:
        return self.started.total_steps if self.started else 0

    @property
    def fraction(self) -> float:
        """Part of the planned steps that is done, 0 to 1."""
        return min(self.step / self.total_steps, 1.0) if self.total_steps > 0 else 0.0

    @property
    def training_loss(self) -> float | None:
        """Mean over the target tokens of the last report interval."""
        return training_loss(self._interval, self._report_interval)

    @property
    def smoothed_loss(self) -> float | None:
        """Exponential mean of the finite losses."""
        return self._smooth[-1] if self._smooth else None

    @property
    def trend(self) -> Trend:
        """Where the smoothed loss is going, against about a smoothing length ago."""
        if len(self._smooth) < 3:
            return "unknown"
        before, now = self._smooth[0], self._smooth[-1]
        change = (now - before) / max(abs(before), 1e-12)
        if abs(change) < FLAT_BELOW:
            return "flat"
        return "falling" if change < 0 else "rising"

    @property
    def tokens_per_second(self) -> float | None:
        """Target tokens over seconds of the last steps of this session."""
        seconds = sum(seconds for _, seconds in self._speed)
        return sum(tokens for tokens, _ in self._speed) / seconds if seconds > 0 else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of the last steps of this session."""
        return sum(seconds for _, seconds in self._speed) / len(self._speed) if self._speed else None

    @property
    def seconds_left(self) -> float | None:
        """Remaining steps at the present speed, and the validations among them."""
        per_step = self.seconds_per_step
        if per_step is None or self.started is None or self.finished is not None:
            return None
        every = finite(self.started.config.get("steps_per_eval"))
        iterations_left = max(self.started.total_iters - self.iterations, 0)
        validations = math.ceil(iterations_left / every) if every and every >= 1 else 0
        return max(self.total_steps - self.step, 0) * per_step + validations * self._validation_seconds

    def apply(self, event: RunEvent) -> None:
        """Take in one event."""
        match event:
            case RunStarted():
                self._start(event)
            case FleetFormed():
                self.tasks.clear()
                self.fleet = event
            case StepFinished(metrics):
                self.tasks.clear()
                self._step(metrics, live=True)
            case Validated(metrics, best):
                self.tasks.pop("validating", None)
                self._validate(metrics, best=best)
                self._validation_seconds = finite(metrics.get("seconds")) or 0.0
            case Sampled():
                self.samples.append(event)
            case Tested():
                self.test = event
            case Advanced():
                self._advance(event)
            case Noted(kind) if kind != FAILED:
                self.members.told(event)
                self.notes.append(event)
                if event.level != "info":
                    self.warnings.append(event)
                    self.warning_count += 1
            case RunFinished():
                self.tasks.clear()
                self.finished = event

    def _start(self, event: RunStarted) -> None:
        self.started = event
        # A twentieth of the run: long enough to calm the curve, short enough to follow it.
        self._smooth = deque(maxlen=min(max(event.total_steps // 20, 8), 200))
        for metrics in event.history:
            if "val_loss" in metrics:
                loss = finite(metrics.get("val_loss"))
                better = loss is not None and (self.best is None or loss < self.best.loss)
                self._validate(metrics, best=better)
            else:
                self._step(metrics, live=False)

    @property
    def _report_interval(self) -> int:
        return report_interval(self.started.config if self.started is not None else {})

    def _step(self, metrics: Mapping[str, Any], *, live: bool) -> None:
        tokens, seconds = finite(metrics.get("tokens")), finite(metrics.get("seconds"))
        if live and seconds is not None:
            self._speed.append((tokens or 0.0, seconds))
        if live:
            self.members.take(metrics.get("per_node"))
        step = int(finite(metrics.get("step")) or 0)
        if step <= self.step:  # computed again after a loss: it already stands in the curve
            return
        self.step = step
        self.iterations = int(finite(metrics.get("iter")) or step)
        self.trained_tokens += int(tokens or 0)
        self.train_seconds += seconds or 0.0
        self.loss = number(metrics.get("loss"))
        self._interval.append(Trained.of(metrics))
        while not in_interval(self._interval[-1].iteration, self._interval[0].iteration, self._report_interval):
            self._interval.popleft()
        self._fold_loss(step, self.loss)
        self.learning_rate = _newer(metrics.get("learning_rate"), self.learning_rate)
        self.grad_norm = _newer(metrics.get("grad_norm"), self.grad_norm)
        self.peak_memory_bytes = _newer(metrics.get("peak_memory_bytes"), self.peak_memory_bytes)

    def _fold_loss(self, step: int, loss: float | None) -> None:
        if loss is None or not math.isfinite(loss):
            self.bad_losses += 1
            return
        length = self._smooth.maxlen or 8
        # While there are few points the plain mean of them, so that the first loss does not weigh on for ever.
        keep = 1 - 1 / min(len(self._smooth) + 1, length)
        self._smooth.append(keep * (self._smooth[-1] if self._smooth else 0.0) + (1 - keep) * loss)
        self.smoothed.append(step, self._smooth[-1])

    def _validate(self, metrics: Mapping[str, Any], *, best: bool) -> None:
        loss = number(metrics.get("val_loss"))
        self.validation = Validation(int(finite(metrics.get("step")) or 0), math.nan if loss is None else loss)
        if best:
            self.best = self.validation

    def _advance(self, task: Advanced) -> None:
        if 0 < task.total <= task.done:
            self.tasks.pop(task.task, None)
        else:
            self.tasks[task.task] = task


def _newer(value: object, before: float | None) -> float | None:
    found = number(value)
    return before if found is None else found
