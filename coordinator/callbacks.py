"""Functions of the user's that follow a run, and may stop it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from coordinator.given import shown
from coordinator.stream import MISSED, Noted, RunEvent, RunStarted, StepFinished, Validated
from node.errors import UserError


class StopTraining(Exception):
    """Raised in a callback: end the run after the running step, with its state saved. It is no failure."""


@dataclass(frozen=True)
class Callbacks:
    """Functions to call as a run goes on, one at a time and in the order of its events.

    They run beside the training, which does not wait for them: a slow one is told late, and a run that is stopped by
    one may be some steps further by then. ``StopTraining`` raised in one stops the run, and that function is called no
    more. Any other exception stops it, too, and is raised from ``train`` or ``Training.result``. Either way the state
    is saved.

    They are ordinary functions; an asyncio program reads the events of ``start_training`` by ``async for``.

    Of the events, at least the last 10,000 are kept. Whoever is further behind misses some: a ``RuntimeWarning`` says
    how many, and ``on_event`` takes a ``Noted`` of the kind ``missed`` in their place.

    Attributes:
        on_start: takes the run's beginning.
        on_step: takes each optimizer step.
        on_validation: takes each validation.
        on_event: takes every event that it is not too late for, these three among them.

    Raises:
        UserError: what is given is no function, or one that would have to be awaited.
    """

    on_start: Callable[[RunStarted], object] | None = None
    on_step: Callable[[StepFinished], object] | None = None
    on_validation: Callable[[Validated], object] | None = None
    on_event: Callable[[RunEvent], object] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            function = getattr(self, field.name)
            if function is None:
                continue
            if not callable(function):
                raise UserError(f"Callbacks: {field.name}: give a function of one argument, not {shown(function)}")
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
                raise _not_awaited(field.name)

    def wanting(self, event: RunEvent) -> list[tuple[str, Callable[[Any], object]]]:
        """The functions that take this event, and what they are called here."""
        kinds: dict[str, type[RunEvent]] = {"on_start": RunStarted, "on_step": StepFinished, "on_validation": Validated}
        return [
            (field.name, function)
            for field in fields(self)
            if (function := getattr(self, field.name)) is not None and isinstance(event, kinds.get(field.name, object))
        ]


CallbacksLike = Callbacks | Iterable[Callbacks]


def as_tuple(callbacks: CallbacksLike) -> tuple[Callbacks, ...]:
    """One or several, as several.

    Raises:
        UserError: they are something else.
    """
    if isinstance(callbacks, Callbacks):
        return (callbacks,)
    several = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for one in several:
        if not isinstance(one, Callbacks):
            raise UserError(f"callbacks: give Callbacks(on_step=...), or several of them, not {shown(one)}")
    return several


def call_back(events: Iterable[RunEvent], callbacks: Iterable[Callbacks], stop: Callable[[], None]) -> None:
    """Hand each event to all callbacks, until there are no more.

    Args:
        events: of a run.
        callbacks: that are called.
        stop: is called when one of them raises ``StopTraining``.
    """
    callbacks = tuple(callbacks)
    ended: set[tuple[int, str]] = set()
    for event in events:
        if isinstance(event, Noted) and event.kind == MISSED:
            warnings.warn(f"callbacks: {event.message}", RuntimeWarning, stacklevel=2)
        for number, one in enumerate(callbacks):
            for name, function in one.wanting(event):
                if (number, name) in ended:
                    continue
                try:
                    _call(name, function, event)
                except StopTraining:
                    ended.add((number, name))
                    stop()


def _call(name: str, function: Callable[[Any], object], event: RunEvent) -> None:
    said = function(event)
    if inspect.iscoroutine(said):  # a function that gives one does not tell beforehand
        said.close()
        raise _not_awaited(name)


def _not_awaited(name: str) -> UserError:
    return UserError(
        f"Callbacks: {name}: nobody awaits it; give a function without `async`, or read the events by"
        " `async for event in start_training(...)`"
    )
