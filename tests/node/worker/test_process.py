"""The worker as a process of its own, behind the supervisor's link."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import pytest

from node.errors import UserError
from node.events import (
    ComputeStarted,
    Copied,
    EvalDone,
    Event,
    Heartbeat,
    Ready,
    ReduceEntered,
    Restored,
    StepDone,
    TokensGenerated,
)
from node.spec import (
    CopyState,
    Evaluate,
    Generate,
    JobSpec,
    ModelSpec,
    OptimizerSpec,
    Restore,
    Setup,
    Share,
    TrainStep,
    TuningSpec,
)
from node.supervisor import LocalWorker
from node.worker.loss import TokenLoss, pad
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, as_rows, random_batches

TUNING = TuningSpec(num_layers=-1, rank=4, scale=10.0, dropout=0.2)
OPTIMIZER = OptimizerSpec(learning_rate=1e-3)
BATCHES = random_batches(4)
_E = TypeVar("_E")


def job(model: Path, folder: Path, **options: Any) -> JobSpec:
    return JobSpec("job", str(folder), ModelSpec(str(model)), 0, TUNING, OPTIMIZER, copy_every=2, **options)


async def until(worker: LocalWorker, kind: type[_E], seen: list[Event] | None = None) -> _E:
    while True:
        event = await asyncio.wait_for(worker.receive(), 60)
        if isinstance(event, kind):
            return event
        if seen is not None and not isinstance(event, Heartbeat):
            seen.append(event)


def with_worker(folder: Path, work: Any) -> None:
    async def run() -> None:
        worker = await LocalWorker.start(folder)
        try:
            await work(worker)
        finally:
            await worker.close()

    conversation: Coroutine[Any, Any, None] = run()
    asyncio.run(conversation)


def test_a_whole_conversation(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    folder = tmp_path / "job"
    here = InProcess(model, TUNING, OPTIMIZER).run(BATCHES)

    async def train(worker: LocalWorker, step: int, seen: list[Event] | None = None) -> StepDone:
        rows = as_rows(BATCHES[step - 1], extra_padding=3)
        await worker.send(TrainStep(Share(step, (rows,))))
        return await until(worker, StepDone, seen)

    async def work(worker: LocalWorker) -> None:
        await worker.send(Setup(job(model, folder)))
        ready = await until(worker, Ready)
        assert (ready.layers, ready.trained_layers, ready.quantized) == (2, 2, False)
        assert ready.trainable_parameters == sum(array.size for array in here.weights.values())
        seen: list[Event] = []
        done = [await train(worker, step, seen) for step in (1, 2, 3, 4)]
        assert [(d.loss_sum, d.tokens, d.grad_norm) for d in done] == [
            (d.loss_sum, d.tokens, d.grad_norm) for d in here.done
        ]
        phases = [event for event in seen if not isinstance(event, Copied)]
        assert phases == [kind(step) for step in (1, 2, 3, 4) for kind in (ComputeStarted, ReduceEntered)]

        await worker.send(CopyState(4))
        while not (copied := await until(worker, Copied, seen)).requested:
            seen.append(copied)
        own = {event.step: event for event in seen if isinstance(event, Copied)}
        assert sorted(own) == [2, 4]
        assert copied.step == 4
        saved: Any = mx.load(str(folder / copied.weights.name))
        assert all(mx.array_equal(saved[name], here.weights[name]) for name in here.weights)

        rows = as_rows(BATCHES[0])
        await worker.send(Evaluate(9, rows))
        here.model.eval()
        expected: Any = TokenLoss(here.model).value(pad(rows)).item()
        assert await until(worker, EvalDone) == EvalDone(9, expected, rows.target_tokens)

        prompt = rows.tokens[:5]
        await worker.send(Generate(3, prompt, stop=(), max_tokens=6))
        answer: list[int] = []
        while not (event := await until(worker, TokensGenerated)).finished:
            answer += event.tokens.tolist()
        answer += event.tokens.tolist()
        text = prompt.tolist()
        for _ in range(6):
            text.append(int(here.model(mx.array([text]))[0, -1].argmax().item()))
        assert (event.id, event.finished, answer) == (3, "length", text[5:])

        await worker.send(Restore(2, own[2].weights, own[2].optimizer))
        assert await until(worker, Restored) == Restored(2)
        again = await train(worker, 3)
        assert (again.loss_sum, again.grad_norm) == (done[2].loss_sum, done[2].grad_norm)

        wrong = dataclasses.replace(own[4].weights, sha256="0" * 64)
        await worker.send(Restore(4, wrong, own[4].optimizer))
        with pytest.raises(UserError, match="step 4 is damaged"):
            await until(worker, Restored)

    with_worker(folder, work)


def test_adafactor_says_that_it_chooses_its_rate(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=1)

    async def work(worker: LocalWorker) -> None:
        own, told = OptimizerSpec("adafactor"), OptimizerSpec("adafactor", {"relative_step": False})
        for optimizer, notes in ((own, 1), (told, 0)):
            await worker.send(Setup(dataclasses.replace(job(model, tmp_path / "job"), optimizer=optimizer)))
            ready = await until(worker, Ready)
            assert sum("--learning-rate is not used" in note for note in ready.notes) == notes
        await worker.send(TrainStep(Share(1, (as_rows(BATCHES[0]),))))
        assert (await until(worker, StepDone)).learning_rate == told.learning_rate

    with_worker(tmp_path / "job", work)


ORPHAN = """
import asyncio, pickle, sys
from pathlib import Path
from node.events import ComputeStarted
from node.supervisor import LocalWorker

async def main() -> None:
    worker = await LocalWorker.start(Path(sys.argv[1]))
    for request in pickle.load(sys.stdin.buffer):
        await worker.send(request)
    while not isinstance(await worker.receive(), ComputeStarted):
        pass
    sys.stdout.write(f"{worker.pid}\\n")
    sys.stdout.flush()
    await asyncio.Event().wait()

asyncio.run(main())
"""


def wait_until_gone(pid: int, seconds: float) -> bool:
    """Whether this process, no child of ours, has ended within so many seconds."""
    if hasattr(os, "pidfd_open"):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_leaves_when_its_parent_is_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    import pickle

    model = tiny_model(tmp_path / "model", "llama")
    # A step of a quarter of a minute, were it to be finished: 60 micro-batches of 32 rows of 500 tokens.
    rows = as_rows(random_batches(1, 32, longest=500)[0])
    requests = [Setup(job(model, tmp_path / "job")), TrainStep(Share(1, (rows,) * 60))]
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "job")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        parent.stdin.write(pickle.dumps(requests))
        parent.stdin.close()
        worker = int(parent.stdout.readline())
        assert not wait_until_gone(worker, 0)
        parent.send_signal(signal.SIGKILL)
        gone = wait_until_gone(worker, 5)
        if not gone:
            os.kill(worker, signal.SIGKILL)
        assert gone


def test_kept_outputs_of_frozen_layers_are_told(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=3)

    async def work(worker: LocalWorker) -> None:
        for layers, reuse, told in (
            (1, True, "2 frozen layers"),
            (2, True, "frozen layer below"),
            (1, False, ""),
            (-1, True, ""),
        ):
            tuning = dataclasses.replace(TUNING, num_layers=layers)
            await worker.send(
                Setup(dataclasses.replace(job(model, tmp_path / "job", reuse_prefix=reuse), tuning=tuning))
            )
            notes = (await until(worker, Ready)).notes
            assert len(notes) == bool(told)
            assert all(told in note and "--reuse-prefix" in note for note in notes)

    with_worker(tmp_path / "job", work)
