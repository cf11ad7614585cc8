"""Training from Python: callbacks, a handle, loops that run already, Ctrl-C, programs that end too early."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator import (
    Callbacks,
    Interrupted,
    StopTraining,
    TrainConfig,
    Training,
    UserError,
    start_training,
    train,
)
from coordinator.interrupts import SIGNALS
from coordinator.runfolder import RunFolder
from coordinator.running import index
from coordinator.stream import RunEvent, RunFinished, RunStarted, StepFinished, Validated
from tests.fixtures.runs import losses

ENDLESS = 100_000
"""Batches of a run that something ends."""


@pytest.fixture
def short(inputs: Path, tmp_path: Path) -> TrainConfig:
    """A run of six steps and three validations."""
    return TrainConfig(
        model=str(inputs / "model"),
        data=str(inputs / "data"),
        adapter_path=str(tmp_path / "adapters"),
        iters=6,
        steps_per_eval=3,
        nodes="local",
    )


@pytest.fixture
def endless(short: TrainConfig) -> TrainConfig:
    """A run that something must end."""
    return dataclasses.replace(short, iters=ENDLESS, steps_per_eval=ENDLESS, save_every=ENDLESS, val_batches=0)


def at_step(number: int, do: Callable[[], object]) -> Callbacks:
    """Callbacks that do this at a step."""

    def on_step(step: StepFinished) -> None:
        if step.step == number:
            do()

    return Callbacks(on_step=on_step)


def stop_training() -> None:
    raise StopTraining


def goes_on(config: TrainConfig) -> None:
    """A run that was stopped goes on from where it was saved, and no step is missing or there twice."""
    saved = len(losses(Path(config.adapter_path)))
    assert saved
    result = train(dataclasses.replace(config, iters=saved + 2), resume=True)
    assert (result.status, result.steps, result.replayed_steps) == ("done", saved + 2, 0)
    assert [step for step, _ in losses(Path(config.adapter_path))] == list(range(1, saved + 3))


def status(config: TrainConfig) -> str:
    """What the registry says of a run."""
    run = RunFolder(Path(config.adapter_path)).run_id()
    assert run is not None
    entry = index.read(run)
    assert entry is not None
    return str(entry["status"])


def test_callbacks_are_told_in_order_and_in_the_callers_thread(short: TrainConfig) -> None:
    told: list[object] = []
    threads = set()

    def on_event(event: RunEvent) -> None:
        threads.add(threading.current_thread())

    callbacks = Callbacks(
        on_start=lambda run: told.append(run.total_steps),
        on_step=lambda step: told.append(step.step),
        on_validation=lambda validation: told.append(f"after {validation.step}"),
        on_event=on_event,
    )
    handlers = [signal.getsignal(number) for number in SIGNALS]
    result = train(short, callbacks=callbacks)
    assert told == [6, "after 0", 1, 2, 3, "after 3", 4, 5, 6, "after 6"]
    assert threads == {threading.current_thread()}
    assert (result.status, result.steps) == ("done", 6)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_an_error_in_a_callback_saves_the_run_and_is_raised(endless: TrainConfig) -> None:
    with pytest.raises(ZeroDivisionError):
        train(endless, callbacks=at_step(3, lambda: 1 // 0))
    assert status(endless) == "interrupted"
    goes_on(endless)


def test_a_callback_stops_the_run(endless: TrainConfig) -> None:
    result = train(endless, callbacks=at_step(3, stop_training))
    assert result.status == status(endless) == "interrupted"
    assert ENDLESS > result.steps >= 3
    assert result.steps == len(losses(Path(endless.adapter_path)))
    goes_on(endless)


def test_a_handle_tells_what_goes_on_and_stops(endless: TrainConfig) -> None:
    training = start_training(endless)
    assert not training.wait(0.0)
    with pytest.raises(TimeoutError):
        training.result(0.0)
    steps = (event for event in training if isinstance(event, StepFinished))
    while next(steps).step < 3:
        pass
    assert not training.done
    assert f"of {ENDLESS}" in repr(training)
    training.stop()
    result = training.result(200)
    assert training.done
    assert training.stopped is not None
    assert f"stopped at step {result.steps} of {ENDLESS}; everything is saved" in str(training.stopped)
    assert "interrupted" in repr(training)
    assert [event.step for event in training.events if isinstance(event, StepFinished)] == list(
        range(1, result.steps + 1)
    )
    assert isinstance(training.events[-1], RunFinished)
    assert list(training) == list(training.events)
    goes_on(endless)


def test_a_stop_before_the_first_step_is_no_failure(endless: TrainConfig) -> None:
    training = Training(endless, None, resume=False)
    training.stop()
    result = training.start().result(200)
    assert (result.status, result.steps) == ("interrupted", 0)
    assert not Path(endless.adapter_path).exists()


def test_callbacks_of_a_handle_stop_it_and_their_errors_come_with_the_result(endless: TrainConfig) -> None:
    assert start_training(endless, callbacks=at_step(2, stop_training)).result(200).status == "interrupted"
    training = start_training(endless, resume=True, callbacks=[at_step(10, lambda: 1 // 0)])
    with pytest.raises(ZeroDivisionError):
        training.result(200)
    assert status(endless) == "interrupted"


def test_a_block_waits_and_a_block_that_fails_stops(short: TrainConfig, endless: TrainConfig) -> None:
    with start_training(short) as training:
        pass
    assert training.result(0.0).status == "done"
    training = start_training(endless)

    def failing() -> None:
        with training:
            for event in training:
                if isinstance(event, StepFinished):
                    print(1 // 0)

    with pytest.raises(ZeroDivisionError):
        failing()
    assert training.done
    assert training.result(0.0).status == "interrupted"


def test_an_aborted_run_ends_at_once_and_can_be_taken_up(endless: TrainConfig) -> None:
    training = start_training(dataclasses.replace(endless, iters=1000, save_every=2))
    steps = (event.step for event in training if isinstance(event, StepFinished))
    while next(steps) < 5:
        pass
    training.abort()
    with pytest.raises(Interrupted, match="left at once"):
        training.result(200)
    last = len(losses(Path(endless.adapter_path)))
    result = train(dataclasses.replace(endless, iters=last + 20), resume=True)
    assert (result.status, result.steps) == ("done", last + 20)
    assert [step for step, _ in losses(Path(endless.adapter_path))] == list(range(1, last + 21))


def test_a_second_signal_leaves_at_once(endless: TrainConfig) -> None:
    said: list[str] = []

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        said.append("asked to stop")
        signal.raise_signal(signal.SIGINT)
        said.append("never")

    with pytest.raises(KeyboardInterrupt):
        train(endless, callbacks=at_step(3, twice))
    assert said == ["asked to stop"]


def test_a_run_that_is_aborted_before_it_begins_ends(endless: TrainConfig) -> None:
    training = Training(endless, None, resume=False)
    training.abort()
    assert list(training.start()) == []
    with pytest.raises(Interrupted, match="left at once"):
        training.result(200)


def test_mistakes_come_out_of_handle_block_and_await(short: TrainConfig) -> None:
    wrong = dataclasses.replace(short, model="./nowhere")
    with pytest.raises(UserError, match="no such folder"):
        start_training(wrong).result(200)
    with pytest.raises(UserError, match="no such folder"):
        with start_training(wrong):
            pass
    assert "no such folder" in repr(_ended(start_training(wrong)))

    async def program() -> None:
        await start_training(wrong)

    with pytest.raises(UserError, match="no such folder"):
        asyncio.run(program())


def _ended(training: Training) -> Training:
    assert training.wait(200)
    return training


def test_where_a_loop_runs_already(short: TrainConfig) -> None:
    async def cell() -> list[int]:
        steps: list[int] = []
        assert train(short, callbacks=Callbacks(on_step=lambda step: steps.append(step.step))).status == "done"
        return steps

    assert asyncio.run(cell()) == [1, 2, 3, 4, 5, 6]


def test_an_asyncio_program_follows_and_awaits(short: TrainConfig) -> None:
    async def program() -> list[type[RunEvent]]:
        async with start_training(short) as training:
            kinds = [type(event) async for event in training]
        assert (await training).status == (await training).status == "done"
        return kinds

    kinds = asyncio.run(program())
    assert [kinds.count(kind) for kind in (RunStarted, StepFinished, Validated, RunFinished)] == [1, 6, 3, 1]


@pytest.mark.parametrize("as_block", [False, True])
def test_a_cancelled_program_stops_its_run(endless: TrainConfig, as_block: bool) -> None:
    running: list[Training] = []

    async def work(training: Training) -> None:
        if as_block:
            async with training:
                await asyncio.Event().wait()
        await training

    async def program() -> None:
        training = start_training(endless)
        running.append(training)
        task = asyncio.create_task(work(training))
        async for event in training:
            if isinstance(event, StepFinished) and event.step >= 3:
                break
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(program())
    (training,) = running
    if as_block:
        assert training.done
    assert training.result(200).status == "interrupted"
    goes_on(endless)


def test_in_another_thread_than_the_main_one(short: TrainConfig) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(train(short).status))
    thread.start()
    thread.join(200)
    assert found == ["done"]


# --- whole programs ---------------------------------------------------------------------------------------------------

HEAD = """
import asyncio, sys
from coordinator import Callbacks, Interrupted, TrainConfig, start_training, train
told = Callbacks(on_step=lambda step: print(step.step, flush=True))
config = TrainConfig(
    model=sys.argv[1], data=sys.argv[2], adapter_path=sys.argv[3], iters=100_000, val_batches=0, save_every=100_000,
    nodes="local",
)
"""
SCRIPT = """
try:
    train(config, callbacks=told)
except Interrupted as error:
    print("stopped:", error)
"""
IN_A_LOOP = """
async def cell():
    train(config, callbacks=told)
try:
    asyncio.run(cell())
except Interrupted as error:
    print("stopped:", error)
"""
AWAITING = """
async def program():
    training = start_training(config, callbacks=told)
    try:
        await training
    finally:
        print("stopped:", await asyncio.to_thread(lambda: training.result() and training.stopped))
try:
    asyncio.run(program())
except KeyboardInterrupt:
    pass
"""
IN_A_BLOCK = """
try:
    with start_training(config, callbacks=told) as training:
        for event in training:
            pass
except KeyboardInterrupt:
    print("stopped:", training.stopped)
"""
FORGETFUL = """
training = start_training(config)
for event in training:
    if getattr(event, "step", 0) >= 3:
        break
"""


class Program:
    """A Python program that trains until something ends it."""

    def __init__(self, body: str, config: TrainConfig) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", HEAD + body, config.model, config.data, config.adapter_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until_step(self, number: int) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if int(line) >= number:
                return
        raise AssertionError(f"it ended early: {self.process.communicate()}")

    def end(self) -> tuple[list[str], str]:
        """What else it says, on stdout and stderr."""
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        _, errors = self.process.communicate(timeout=200)
        return [line for line in lines if not line.isdigit()], errors


@pytest.fixture
def program(endless: TrainConfig) -> Iterator[Callable[[str], Program]]:
    """Starts programs, and sees that none is left."""
    begun: list[Program] = []

    def start(body: str) -> Program:
        begun.append(Program(body, endless))
        return begun[-1]

    yield start
    for one in begun:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (SCRIPT, signal.SIGINT),
        (SCRIPT, signal.SIGTERM),
        (IN_A_LOOP, signal.SIGINT),
        (AWAITING, signal.SIGINT),
        (IN_A_BLOCK, signal.SIGINT),
    ],
    ids=["script", "script, SIGTERM", "where a loop runs", "awaiting", "block"],
)
def test_a_signal_saves_and_stops(
    body: str, number: signal.Signals, endless: TrainConfig, program: Callable[[str], Program]
) -> None:
    running = program(body)
    running.until_step(3)
    running.process.send_signal(number)
    (line,), errors = running.end()
    assert line.startswith("stopped: stopped at step ")
    assert "everything is saved" in line
    assert (errors, running.process.returncode) == ("", 0)
    assert status(endless) == "interrupted"
    goes_on(endless)


def test_a_program_that_ends_first_stops_its_run(endless: TrainConfig, program: Callable[[str], Program]) -> None:
    said, errors = program(FORGETFUL).end()
    assert said == []
    assert errors.startswith(f"training {endless.adapter_path}: the program ended first; stopped at step ")
    assert "everything is saved" in errors
    assert status(endless) == "interrupted"
    goes_on(endless)
