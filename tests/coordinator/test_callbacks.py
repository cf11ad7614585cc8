"""What callbacks are told, and how they stop a run."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from coordinator import Fleet, FuseOptions, GenerateOptions, TestOptions, TrainConfig, UserError, api
from coordinator.callbacks import Callbacks, StopTraining, as_tuple, call_back
from coordinator.stream import Noted, RunEvent, RunStarted, StepFinished, Validated
from coordinator.training import start_training

EVENTS: list[RunEvent] = [
    Noted("nodes", "nobody"),
    RunStarted("id", "adapters", {}, 2, 2, 1, ()),
    Validated({"step": 0, "val_loss": 3.0}, best=True),
    StepFinished({"step": 1, "loss": 2.5}, report=True),
    StepFinished({"step": 2, "loss": 2.0}, report=True),
]


def test_each_function_is_told_of_its_events() -> None:
    told: list[object] = []
    callbacks = Callbacks(
        on_start=lambda run: told.append(run.run),
        on_step=lambda step: told.append((step.step, step.loss)),
        on_validation=lambda validation: told.append((validation.step, validation.loss)),
    )
    everything: list[RunEvent] = []
    call_back(EVENTS, [callbacks, Callbacks(on_event=everything.append)], pytest.fail)
    assert told == ["id", (0, 3.0), (1, 2.5), (2, 2.0)]
    assert everything == EVENTS


def test_who_asks_to_stop_is_heard_and_the_others_are_told_on() -> None:
    stopped: list[bool] = []
    steps: list[int] = []

    def enough(step: StepFinished) -> None:
        raise StopTraining

    callbacks = [Callbacks(on_step=enough), Callbacks(on_step=lambda step: steps.append(step.step))]
    call_back(EVENTS, callbacks, lambda: stopped.append(True))
    assert stopped == [True], "who has asked to stop is called no more"
    assert steps == [1, 2]


def test_of_one_that_asks_to_stop_the_other_functions_are_told_on() -> None:
    stopped: list[bool] = []
    told: list[RunEvent] = []

    def enough(step: StepFinished) -> None:
        raise StopTraining

    call_back(EVENTS, [Callbacks(on_step=enough, on_event=told.append)], lambda: stopped.append(True))
    assert (stopped, told) == ([True], EVENTS)


def test_another_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        call_back(EVENTS, [Callbacks(on_step=lambda step: 1 // (step.step - 1))], pytest.fail)


def test_one_or_several() -> None:
    one = Callbacks()
    assert as_tuple(one) == (one,)
    assert as_tuple([one, one]) == (one, one)
    assert as_tuple(()) == ()


class Awaited:
    """What only an event loop could call."""

    async def __call__(self, event: RunEvent) -> None:
        pass


async def awaited(event: RunEvent) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (5, "Callbacks: on_step: give a function of one argument, not 5"),
        (awaited, "Callbacks: on_step: nobody awaits it"),
        (functools.partial(awaited), "Callbacks: on_step: nobody awaits it"),
        (Awaited(), "Callbacks: on_step: nobody awaits it"),
    ],
)
def test_what_cannot_be_called_is_refused_when_it_is_given(function: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Callbacks(on_step=function)


def test_a_coroutine_that_nobody_would_await_is_an_error() -> None:
    def gives_one(event: RunEvent) -> object:
        return awaited(event)

    with pytest.raises(UserError, match="on_event: nobody awaits it"):
        call_back(EVENTS, [Callbacks(on_event=gives_one)], pytest.fail)


def test_what_is_not_expected_is_said_before_anything_begins() -> None:
    config = TrainConfig(model="none", data="none")
    calls: list[tuple[Any, str]] = [
        (lambda: api.train("x"), "config: give a TrainConfig(model=..., data=...), not 'x'"),  # type: ignore[arg-type]
        (lambda: start_training(None), "config: give a TrainConfig"),  # type: ignore[arg-type]
        (lambda: api.train(config, 5), "view: give None, or an object with"),  # type: ignore[arg-type]
        (lambda: api.train(config, callbacks=awaited), "callbacks: give Callbacks(on_step=...)"),  # type: ignore[arg-type]
        (lambda: start_training(config, callbacks=[5]), "several of them, not 5"),  # type: ignore[list-item]
        (lambda: Fleet.find(5), 'wanted: give "auto", "local", or names'),  # type: ignore[arg-type]
        (lambda: Fleet("local", (), 0.0, "").plan("x"), "config: give a TrainConfig"),  # type: ignore[arg-type]
        (lambda: Fleet("local", (), 0.0, "").train(config, callbacks=5), "not 5"),  # type: ignore[arg-type]
        (lambda: api.test("x"), "options: give a TestOptions"),  # type: ignore[arg-type]
        (lambda: api.generate("x"), "options: give a GenerateOptions"),  # type: ignore[arg-type]
        (lambda: api.fuse("x"), "options: give a FuseOptions"),  # type: ignore[arg-type]
        (lambda: api.test(TestOptions(), 5), "view: give None"),  # type: ignore[arg-type]
        (lambda: api.generate(GenerateOptions(), 5), "view: give None"),  # type: ignore[arg-type]
        (lambda: api.fuse(FuseOptions(), 5), "view: give None"),  # type: ignore[arg-type]
    ]
    for call, said in calls:
        with pytest.raises(UserError, match=re.escape(said)):
            call()
