"""What callbacks are told, and how they stop a run."""

from __future__ import annotations

import pytest

from coordinator.callbacks import Callbacks, StopTraining, as_tuple, call_back
from coordinator.stream import Noted, RunEvent, RunStarted, StepFinished, Validated

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
    assert stopped
    assert steps == [1, 2]


def test_another_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        call_back(EVENTS, [Callbacks(on_step=lambda step: 1 // (step.step - 1))], pytest.fail)


def test_one_or_several() -> None:
    one = Callbacks()
    assert as_tuple(one) == (one,)
    assert as_tuple([one, one]) == (one, one)
    assert as_tuple(()) == ()
