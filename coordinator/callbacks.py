"""Functions of the user's that follow a run, and may stop it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coordinator.stream import MISSED, Noted, RunEvent, RunStarted, StepFinished, Validated


class StopTraining(Exception):
    """Raised in a callback: end the run after the running step, with its state saved. It is no failure."""


@dataclass(frozen=True)
class Callbacks:
    """Functions to call as a run goes on, one at a time and in the order of its events.

    They run beside the training, which does not wait for them: a slow one is told late, and a run that is stopped by
    one may be some steps further by then. ``StopTraining`` raised in one stops the run. Any other exception stops it,
    too, and is raised from ``train`` or ``Training.result``. Either way the state is saved.

    Of the events, at least the last 10,000 are kept. Whoever is further behind misses some: a ``RuntimeWarning`` says
    how many, and ``on_event`` takes a ``Noted`` of the kind ``missed`` in their place.

    Attributes:
        on_start: takes the run's beginning.
        on_step: takes each optimizer step.
        on_validation: takes each validation.
        on_event: takes every event that it is not too late for, these three among them.
    """

    on_start: Callable[[RunStarted], object] | None = None
    on_step: Callable[[StepFinished], object] | None = None
    on_validation: Callable[[Validated], object] | None = None
    on_event: Callable[[RunEvent], object] | None = None

    def handle(self, event: RunEvent) -> None:
        """Call what wants this event.

        Raises:
            StopTraining: a function asks to stop.
        """
        if self.on_start is not None and isinstance(event, RunStarted):
            self.on_start(event)
        if self.on_step is not None and isinstance(event, StepFinished):
            self.on_step(event)
        if self.on_validation is not None and isinstance(event, Validated):
            self.on_validation(event)
        if self.on_event is not None:
            self.on_event(event)


CallbacksLike = Callbacks | Iterable[Callbacks]


def as_tuple(callbacks: CallbacksLike) -> tuple[Callbacks, ...]:
    """One or several, as several."""
    return (callbacks,) if isinstance(callbacks, Callbacks) else tuple(callbacks)


def call_back(events: Iterable[RunEvent], callbacks: Iterable[Callbacks], stop: Callable[[], None]) -> None:
    """Hand each event to all callbacks, until there are no more.

    Args:
        events: of a run.
        callbacks: that are called.
        stop: is called when one of them raises ``StopTraining``.
    """
    callbacks = tuple(callbacks)
    for event in events:
        if isinstance(event, Noted) and event.kind == MISSED:
            warnings.warn(f"callbacks: {event.message}", RuntimeWarning, stacklevel=2)
        for one in callbacks:
            try:
                one.handle(event)
            except StopTraining:
                stop()
