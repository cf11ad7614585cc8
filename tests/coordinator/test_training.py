"""The handle of a run whose callbacks hang; what trains is a stand-in."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import training as module
from coordinator.callbacks import Callbacks
from coordinator.config import TrainConfig
from coordinator.job import RunResult, Stopped
from coordinator.stream import StepFinished
from coordinator.training import Training, start_training
from node.errors import Interrupted

CONFIG = TrainConfig(model="m", adapter_path="adapters")


async def fake_job(config: TrainConfig, view: Any, *, resume: bool, stop: asyncio.Event) -> RunResult:
    """Three steps, then it waits until it is stopped."""
    for number in (1, 2, 3):
        view.handle(StepFinished({"step": number, "loss": 1.0}, report=False))
    await stop.wait()
    raise Stopped("saved", RunResult("r1", "interrupted", Path("adapters"), 3, 0, None, None, 0, ()))


class Hanging:
    """A callback that hangs until it is let go, or for a minute."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, step: StepFinished) -> None:
        self.told.append(step.step)
        self.begun.set()
        self.go_on.wait(60)

    def thread(self) -> threading.Thread:
        (found,) = (thread for thread in threading.enumerate() if thread.name.endswith("adapters: callbacks"))
        return found


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    monkeypatch.setattr(module, "run_job", fake_job)
    monkeypatch.setattr(module, "CALLBACK_SECONDS", 0.1)
    callback = Hanging()
    yield callback
    callback.go_on.set()


def begun(hanging: Hanging) -> Training:
    training = start_training(CONFIG, callbacks=Callbacks(on_step=hanging))
    assert hanging.begun.wait(30)
    return training


@pytest.mark.parametrize("stopped_first", [False, True])
def test_a_callback_that_hangs_keeps_no_aborted_run(hanging: Hanging, stopped_first: bool) -> None:
    training = begun(hanging)
    if stopped_first:
        training.stop()
        assert not training.wait(0.5), "all events are told, however slowly"
    training.abort()
    with pytest.raises(Interrupted, match="left at once; what is on disk is whole; a callback has not returned"):
        training.result(30)
    thread = hanging.thread()
    assert thread.daemon, "nor the program's end"
    hanging.go_on.set()
    thread.join(30)
    assert hanging.told == [1], "it is told no more"


def test_callbacks_that_return_in_time_are_not_spoken_of(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALLBACK_SECONDS", 30.0)
    training = begun(hanging)
    hanging.go_on.set()
    training.abort()
    with pytest.raises(Interrupted) as caught:
        training.result(30)
    assert str(caught.value) == "training adapters: left at once; what is on disk is whole"
    assert hanging.told == [1, 2, 3]


def test_a_slow_callback_is_told_all_before_the_result_comes(hanging: Hanging) -> None:
    training = begun(hanging)
    training.stop()
    hanging.go_on.set()
    assert training.result(30).status == "interrupted"
    assert hanging.told == [1, 2, 3]


PROGRAM = """
import threading
from coordinator import loop_thread
from tests.coordinator import test_training as t
loop_thread.EXIT_SECONDS = 0.1
t.module.run_job, t.module.CALLBACK_SECONDS = t.fake_job, 0.1
hanging = t.Hanging()
hanging.go_on.wait = lambda _: threading.Event().wait()
t.begun(hanging)
"""


def test_a_program_ends_though_a_callback_hangs() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert "the program ended first; saved; a callback has not returned" in done.stderr
