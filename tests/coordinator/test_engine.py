"""The engine, against a worker that follows a script: what is asked for in which order, and what faults lead to."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import crew, watch
from coordinator import engine as module
from coordinator.alone import Alone
from coordinator.checkpoint import Checkpoint, Checkpoints
from coordinator.crew import StopRequested
from coordinator.engine import Engine, Work
from coordinator.program import Program
from coordinator.prompts import SamplePrompt
from coordinator.runfolder import RunFolder
from coordinator.stream import Noted, RunEvent, Sampled, StepFinished, Validated
from node import events
from node.errors import OutOfMemory, TandemError, UserError, WorkerLost
from node.files import link_or_copy, sha256_of
from node.spec import (
    CopyState,
    Evaluate,
    FileRef,
    Generate,
    JobSpec,
    ModelSpec,
    Request,
    Restore,
    Rows,
    Setup,
    Share,
    TrainStep,
)
from tests.fixtures.tensors import saying

Answer = events.Event | TandemError | None
# Called with each request before it is done; may change the answer: an error, an event, or None for silence.
Script = Callable[["FakeWorker", Request], "Answer | bool"]

NONE = np.zeros(0, np.int32)
NO_ROWS = Rows(NONE, NONE, NONE, NONE, NONE, 0)
COPY_EVERY = 4


def as_said(worker: FakeWorker, request: Request) -> bool:
    """The script of a worker without faults."""
    return True


@dataclass
class FakeWorker:
    """Answers as a worker does; its state is its step."""

    folder: Path
    script: Script
    validation_losses: dict[int, float]
    step: int = 0
    requests: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    answers: deque[Answer] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False

    async def send(self, request: Request) -> None:
        assert not self.closed
        self.requests.append(request)
        self.waiting.append(request)
        self.arrived.set()

    async def receive(self) -> events.Event:
        while not self.answers:
            if self.waiting:
                self._begin(self.waiting.popleft())
            else:
                self.arrived.clear()
                await self.arrived.wait()
        answer = self.answers.popleft()
        if isinstance(answer, TandemError):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        assert answer is not None
        return answer

    def _begin(self, request: Request) -> None:
        said = self.script(self, request)
        assert said is not False
        self.answers.extend(self._do(request) if said is True else [said])

    def cancel(self) -> None:
        self.waiting.clear()

    @property
    def generation(self) -> int:
        return 0

    async def give(self, ref: FileRef, source: Path) -> None:
        link_or_copy(source, self.folder / ref.name)

    async def fetch(self, ref: FileRef, target: Path) -> None:
        link_or_copy(self.folder / ref.name, target)

    async def close(self) -> None:
        self.closed = True

    def _do(self, request: Request) -> list[Answer]:
        match request:
            case Setup():
                return [events.Ready("cpu", "llama", 2, 2, 10, 1, False, 0.0, 0)]
            case Restore():
                assert (self.folder / request.weights.name).read_text() == saying(f"weights {request.step}")
                self.step = request.step
                return [events.Restored(request.step)]
            case TrainStep(share):
                assert share.step == self.step + 1, "a worker is never asked for a step that it is not at"
                self.step = share.step
                done = self.done()
                return [done, self.copy(requested=False)] if self.step % COPY_EVERY == 0 else [done]
            case Evaluate():
                loss = self.validation_losses.get(self.step, 5.0 - 0.1 * self.step)
                return [events.EvalDone(request.chunk, 2 * loss, 2)]
            case Generate():
                text = np.array([self.step], np.int32)
                return [events.TokensGenerated(request.id, text), events.TokensGenerated(request.id, text[:0], "stop")]
            case CopyState():
                return [self.copy(requested=True)]
        raise AssertionError(request)

    def done(self, loss: float | None = None, grad_norm: float = 1.0) -> events.StepDone:
        value = 10.0 / self.step if loss is None else loss
        return events.StepDone(self.step, 4 * value, 4, 1e-3, grad_norm, 0.1, 0.1, 0.0, 1, 4)

    def copy(self, *, requested: bool) -> events.Copied:
        refs = []
        for kind in ("weights", "optimizer"):
            path = self.folder / f"{self.step}{'-asked' if requested else ''}.{kind}.safetensors"
            path.write_text(saying(f"{kind} {self.step}"))
            refs.append(FileRef(path.name, sha256_of(path), path.stat().st_size))
        return events.Copied(self.step, requested, refs[0], refs[1])


class Steps:
    """Shares without rows."""

    def __init__(self, shrinks: int = 0) -> None:
        self.shrinks = shrinks
        self.token_limit: int | None = None

    def share(self, step: int) -> Share:
        return Share(step, ())

    def shrink(self) -> bool:
        self.shrinks -= 1
        return self.shrinks >= 0


class Chunks:
    """Two chunks of nothing."""

    def __len__(self) -> int:
        return 2

    def __init__(self) -> None:
        self.limits: list[int | None] = []

    def chunk(self, index: int) -> Rows:
        return NO_ROWS

    def limit_tokens(self, limit: int | None) -> None:
        self.limits.append(limit)


class Told:
    """A reader that remembers."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def handle(self, event: RunEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    @property
    def steps(self) -> list[tuple[int, float]]:
        return [(e.metrics["step"], e.metrics["loss"]) for e in self.events if isinstance(e, StepFinished)]

    @property
    def validations(self) -> list[tuple[int, float, bool]]:
        found = [event for event in self.events if isinstance(event, Validated)]
        return [(event.metrics["step"], round(event.metrics["val_loss"], 6), event.best) for event in found]

    @property
    def samples(self) -> list[tuple[int, str]]:
        return [(event.step, event.text) for event in self.events if isinstance(event, Sampled)]

    def notes(self, kind: str) -> list[Noted]:
        return [event for event in self.events if isinstance(event, Noted) and event.kind == kind]


class Bench:
    """An engine with all that it needs."""

    def __init__(self, tmp_path: Path, **changes: Any) -> None:
        self.told = Told()
        self.folder = RunFolder(tmp_path / "adapters")
        self.copies = tmp_path / "copies"
        self.copies.mkdir(exist_ok=True)
        self.workers: list[FakeWorker] = []
        self.script: Script = changes.pop("script", as_said)
        self.losses: dict[int, float] = changes.pop("losses", {})
        self.resumed: Checkpoint | None = changes.pop("resumed", None)
        self.keep_last: int | None = changes.pop("keep_last", None)
        intervals = {"total_iters": 12, "save_every": 5, "steps_per_eval": 6, **changes.pop("program", {})}
        self.program = Program(**{"accumulation": 1, "steps_per_report": 1, "validates": True, **intervals})
        self.steps = Steps(changes.pop("shrinks", 0))
        work: dict[str, Any] = {
            "folder": self.copies,
            "program": self.program,
            "steps": self.steps,
            "validation": Chunks(),
            "samples": (),
            "decode": lambda tokens: f"at {tokens}",
            "early_stop": None,
            "save_best": False,
            "data_digest": "digest",
            **changes,
        }
        self.work = Work(**work)

    def go(self, after: Callable[[Engine], Coroutine[Any, Any, Any]] | None = None) -> Engine:
        """Run to the end; errors come out."""

        async def run() -> Engine:
            self.stop = asyncio.Event()
            checkpoints = Checkpoints(self.folder, self.keep_last)
            job = JobSpec("run", str(self.copies), ModelSpec("model"))
            alone = Alone(self._start, job, {}, self.told, self.stop)
            self.engine = Engine(self.work, alone, checkpoints, self.told, self.resumed, self.stop)
            try:
                await self.engine.prepare()
                await self.engine.run()
                if after is not None:
                    self.after = await after(self.engine)
            finally:
                await self.engine.close()
            return self.engine

        engine = asyncio.run(run())
        assert all(worker.closed for worker in self.workers)
        return engine

    async def _start(self) -> FakeWorker:
        self.workers.append(FakeWorker(self.copies, self.script, self.losses))
        return self.workers[-1]

    @property
    def requests(self) -> list[str]:
        """All that was asked of all workers, shortened."""
        return [_short(request) for worker in self.workers for request in worker.requests]

    @property
    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.checkpoints.glob("[0-9]*"))


def _short(request: Request) -> str:
    match request:
        case TrainStep(share):
            return f"train {share.step}"
        case CopyState(step) | Restore(step, _, _):
            return f"{type(request).__name__} {step}"
    return type(request).__name__


def once(condition: Callable[[FakeWorker, Request], bool], answer: Answer) -> Script:
    """Answer so the first time that the condition holds."""
    return times(1, condition, answer)


def times(count: int, condition: Callable[[FakeWorker, Request], bool], answer: Answer) -> Script:
    left = count

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        nonlocal left
        if left and condition(worker, request):
            left -= 1
            return answer
        return True

    return script


def trains(step: int) -> Callable[[FakeWorker, Request], bool]:
    return lambda _, request: isinstance(request, TrainStep) and request.share.step == step


def asks(kind: type, at: int) -> Callable[[FakeWorker, Request], bool]:
    return lambda worker, request: isinstance(request, kind) and worker.step == at


LOST = WorkerLost("the worker was killed by SIGKILL")
CURVE = [(step, 10.0 / step) for step in range(1, 13)]


def test_everything_happens_once_and_in_order(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert bench.told.validations == [(0, 5.0, False), (6, 4.4, True), (12, 3.8, True)]
    assert bench.saved == [5, 10, 12]
    assert engine.saved_step == engine.progress.step == 12
    assert engine.replayed_steps == 0
    assert (engine.progress.best_step, engine.progress.best_loss) == (12, 3.8)
    order = [r for r in bench.requests if r.startswith(("train", "Copy"))]
    expected = [f"train {step}" for step in range(1, 13)]
    for step in (5, 10, 12):
        expected.insert(expected.index(f"train {step}") + 1, f"CopyState {step}")
    assert order == expected


def test_a_validation_is_a_barrier(tmp_path: Path) -> None:
    seen: list[tuple[int, list[str]]] = []
    bench = Bench(tmp_path)

    def script(worker: FakeWorker, request: Request) -> bool:
        if isinstance(request, Evaluate):
            done = [step for step, _ in bench.told.steps]
            assert not worker.answers or all(isinstance(answer, events.EvalDone) for answer in worker.answers)
            seen.append((worker.step, [str(done[-1]) if done else "0"]))
        return True

    bench.script = script
    bench.go()
    assert seen == [(step, [str(step)]) for step in (0, 0, 6, 6, 12, 12)]


def test_requests_run_a_few_steps_ahead(tmp_path: Path) -> None:
    bench = Bench(tmp_path, program={"validates": False, "save_every": 12})
    ahead: list[int] = []

    def script(worker: FakeWorker, request: Request) -> bool:
        if isinstance(request, TrainStep):
            ahead.append(sum(isinstance(sent, TrainStep) for sent in worker.requests) - len(bench.told.steps))
        return True

    bench.script = script
    bench.go()
    assert max(ahead) == module.STEPS_AHEAD


@pytest.mark.parametrize("step", range(1, 13))
def test_a_worker_that_dies_in_a_step(step: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=once(trains(step), LOST))
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert [found[0] for found in bench.told.validations] == [0, 6, 12]
    assert len(bench.workers) == 2
    assert engine.saved_step == 12
    assert 12 in bench.saved
    assert engine.replayed_steps < COPY_EVERY
    (restarted,) = bench.told.notes("restarted")
    assert restarted.details["replayed_steps"] == engine.replayed_steps
    assert restarted.details["step"] == step - 1
    (lost,) = bench.told.notes("worker_lost")
    assert "SIGKILL; starting another" in lost.message


@pytest.mark.parametrize(
    ("kind", "at"),
    [*((kind, at) for kind in (Evaluate, Generate) for at in (0, 6, 12)), *((CopyState, at) for at in (5, 6, 10, 12))],
)
def test_a_worker_that_dies_elsewhere(kind: type, at: int, tmp_path: Path) -> None:
    prompt = SamplePrompt("Why?", np.zeros(1, np.int32), (0,), 5)
    bench = Bench(tmp_path, script=once(asks(kind, at), LOST), samples=(prompt,), save_best=True)
    bench.go()
    assert bench.told.steps == CURVE
    assert bench.told.validations == [(0, 5.0, False), (6, 4.4, True), (12, 3.8, True)], "each validation stands once"
    assert {step for step, _ in bench.told.samples} == {0, 6, 12}
    assert bench.saved == [5, 10, 12]
    assert len(bench.workers) == 2


def test_the_newest_state_is_restored_wherever_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=once(trains(8), LOST), program={"save_every": 7})
    bench.go()
    assert "Restore 7" in bench.requests, "the checkpoint is newer than the copy of step 4"
    assert bench.engine.replayed_steps == 0


@pytest.mark.parametrize(
    "second", [asks(Restore, 0), trains(5), trains(6)], ids=["restore", "replay", "the step again"]
)
def test_a_second_death_during_recovery(second: Callable[[FakeWorker, Request], bool], tmp_path: Path) -> None:
    first = once(trains(7), LOST)
    again = once(lambda worker, request: len(bench.workers) == 2 and second(worker, request), LOST)

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        said = first(worker, request)
        return again(worker, request) if said is True else said

    bench = Bench(tmp_path, script=script, program={"save_every": 9, "steps_per_eval": 12})
    bench.go()
    assert len(bench.workers) == 3
    assert bench.told.steps == CURVE
    assert bench.saved == [9, 12]


def test_copies_that_arrive_during_a_validation_count(tmp_path: Path) -> None:
    prompt = SamplePrompt("Why?", np.zeros(1, np.int32), (0,), 5)
    intervals = {"total_iters": 12, "save_every": 100, "steps_per_eval": COPY_EVERY}
    bench = Bench(tmp_path, script=once(trains(11), LOST), program=intervals, samples=(prompt,))
    bench.go()
    assert "Restore 8" in bench.requests
    assert bench.engine.replayed_steps == 2


def test_five_deaths_without_a_new_step_end_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=times(9, trains(7), LOST))
    with pytest.raises(TandemError, match="SIGKILL; it died 5 times at step 7"):
        bench.go()
    assert len(bench.workers) == 5
    assert bench.saved == [5]


def test_a_worker_that_dies_while_loading(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=times(4, asks(Setup, 0), LOST))
    bench.go()
    assert len(bench.workers) == 5
    assert bench.told.steps == CURVE


def test_workers_that_all_die_while_loading_end_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=times(9, asks(Setup, 0), LOST))
    with pytest.raises(TandemError, match="it died 5 times at step 1"):
        bench.go()
    assert len(bench.workers) == 5


def test_deaths_with_progress_in_between_do_not(tmp_path: Path) -> None:
    left = set(range(1, 13))

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        if isinstance(request, TrainStep) and request.share.step in left:
            left.discard(request.share.step)
            return LOST
        return True

    bench = Bench(tmp_path, script=script)
    bench.go()
    assert len(bench.workers) == 13
    assert bench.told.steps == CURVE


def test_silence_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "SILENCE_SECONDS", 0.05)
    bench = Bench(tmp_path, script=once(trains(3), None))
    bench.go()
    assert bench.told.steps == CURVE
    assert "said nothing" in bench.told.notes("worker_lost")[0].message


@pytest.mark.parametrize("step", [2, 9])
def test_a_worker_that_is_alive_and_makes_no_progress_is_a_loss(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNPREDICTED_SECONDS", 1.0)
    monkeypatch.setattr(module, "LONE_STEP_SECONDS", 1.0)
    monkeypatch.setattr(watch, "MORE_SECONDS", 0.0)

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        hangs = worker is bench.workers[0] and isinstance(request, TrainStep) and request.share.step >= step
        return events.Heartbeat("training", worker.step, 1) if hangs else True

    bench = Bench(tmp_path, script=script)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert engine.replayed_steps < COPY_EVERY
    lost = bench.told.notes("worker_lost")[0].message
    assert f"is alive, but has not finished step {step} after" in lost


def test_a_copy_that_is_asked_for_and_never_written_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPY_SECONDS", 1.0)

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        hangs = worker is bench.workers[0] and isinstance(request, CopyState)
        return events.Heartbeat("training", worker.step, 1) if hangs else True

    bench = Bench(tmp_path, script=script)
    bench.go()
    assert bench.told.steps == CURVE
    assert "has not written the state of step 5 in" in bench.told.notes("worker_lost")[0].message
    assert bench.engine.saved_step == 12


def test_a_worker_that_takes_nothing_in_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "SILENCE_SECONDS", 0.05)
    bench = Bench(tmp_path)
    plain = FakeWorker.send

    async def send(worker: FakeWorker, request: Request) -> None:
        if worker is bench.workers[0] and trains(3)(worker, request):
            await asyncio.Event().wait()
        await plain(worker, request)

    monkeypatch.setattr(FakeWorker, "send", send)
    bench.go()
    assert bench.told.steps == CURVE
    assert "took nothing in" in bench.told.notes("worker_lost")[0].message


def test_signs_of_life_are_no_silence_and_no_news(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> bool:
        worker.answers.extend([events.Heartbeat("training", 1, 1), events.ComputeStarted(1), events.ReduceEntered(1)])
        return True

    bench = Bench(tmp_path, script=script)
    bench.go()
    assert bench.told.steps == CURVE


def test_too_little_memory_leads_to_smaller_micro_batches_and_the_same_program(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=times(2, trains(7), OutOfMemory("out of memory")), shrinks=2)
    bench.go()
    assert bench.told.steps == CURVE
    assert bench.steps.shrinks == 0
    assert len(bench.told.notes("memory")) == 2
    assert len(bench.work.validation.limits) == 2, "validations shrink too"


def test_too_little_memory_for_single_rows_ends_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=times(9, trains(7), OutOfMemory("out of memory")), shrinks=2)
    with pytest.raises(OutOfMemory):
        bench.go()
    assert len(bench.workers) == 3


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(loss: float, norm: float, tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        if trains(5)(worker, request):
            worker.step = 5
            return worker.done(loss, norm)
        return True

    bench = Bench(tmp_path, script=script, program={"save_every": 4})
    with pytest.raises(TandemError, match=r"became (nan|inf) at step 5: lower --learning-rate") as caught:
        bench.go()
    assert "\n" not in str(caught.value)
    assert bench.told.steps == CURVE[:4]
    assert bench.saved == [4]


def test_a_mistake_that_the_worker_finds_comes_out_as_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, script=once(lambda _, request: isinstance(request, Setup), UserError("no such layer")))
    with pytest.raises(UserError, match=r"^no such layer$"):
        bench.go()
    assert not bench.folder.path.exists()


def test_copies_that_fail_are_told_and_training_goes_on(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        if isinstance(request, CopyState) and worker.step == 5:
            return events.CopyFailed(5, requested=True, reason="the disk is full")
        return True

    bench = Bench(tmp_path, script=script)
    engine = bench.go()
    assert bench.saved == [10, 12]
    assert engine.saved_step == 12
    (note,) = bench.told.notes("copy_failed")
    assert note.message == "state of step 5 not saved: the disk is full"


def test_checkpoints_that_cannot_be_written_are_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Checkpoint:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", full)
    bench = Bench(tmp_path)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert engine.saved_step == 0, "the job sees that the end is not on disk"
    assert len(bench.told.notes("checkpoint_failed")) == 3


def test_the_best_validation_makes_a_checkpoint_that_is_kept(tmp_path: Path) -> None:
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.6, 10: 2.7, 12: 2.8}
    bench = Bench(tmp_path, losses=losses, save_best=True, keep_last=2, program={"save_every": 3, "steps_per_eval": 2})
    engine = bench.go()
    assert engine.progress.best_step == 4
    assert [found for found in bench.told.validations if found[2]] == [(2, 3.0, True), (4, 2.0, True)]
    assert bench.saved == [4, 9, 12]


def test_early_stopping(tmp_path: Path) -> None:
    losses = {0: 0.1, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 1.0}
    bench = Bench(
        tmp_path, losses=losses, early_stop=2, save_best=True, program={"save_every": 100, "steps_per_eval": 2}
    )

    async def test(engine: Engine) -> tuple[float, int]:
        best = next(c for c in Checkpoints(bench.folder, None).newest_first() if c.progress.step == 4)
        return await engine.evaluate_at(best, Chunks(), "testing")  # type: ignore[arg-type]

    engine = bench.go(test)
    assert engine.stopped_early
    assert (engine.progress.step, engine.saved_step, engine.progress.best_step) == (8, 8, 4)
    assert bench.told.steps == CURVE[:8]
    assert "no better validation than step 4's in 2 tries" in bench.told.notes("early_stop")[0].message
    assert {4, 8} <= set(bench.saved)
    assert bench.after == (8.0, 4), "two chunks with the weights of step 4"


def test_a_worker_that_dies_while_testing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    async def test(engine: Engine) -> tuple[float, int]:
        bench.workers[0].script = once(asks(Evaluate, 12), LOST)
        return await engine.evaluate_at(None, Chunks(), "testing")  # type: ignore[arg-type]

    bench.go(test)
    assert bench.after == (pytest.approx(2 * 2 * 3.8), 4)
    assert len(bench.workers) == 2
    assert bench.told.steps == CURVE


# --- resuming and stopping --------------------------------------------------------------------------------------------


def stopping(bench: Bench, condition: Callable[[FakeWorker, Request], bool]) -> None:
    """Ctrl-C when this is asked for."""

    def script(worker: FakeWorker, request: Request) -> bool:
        if condition(worker, request):
            bench.stop.set()
        return True

    bench.script = script


def newest(folder: RunFolder) -> Checkpoint:
    found = Checkpoints(folder, None).newest_intact(pytest.fail)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "condition",
    [*(trains(step) for step in range(1, 13)), asks(Evaluate, 6), asks(Evaluate, 12), asks(CopyState, 5)],
)
def test_ctrl_c_anywhere_and_going_on_gives_the_whole_run(
    condition: Callable[[FakeWorker, Request], bool], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    stopping(bench, condition)
    with pytest.raises(StopRequested):
        bench.go()
    stopped = bench.engine
    assert stopped.saved_step == stopped.progress.step
    again = Bench(tmp_path, resumed=newest(bench.folder) if stopped.saved_step else None)
    again.go()
    assert bench.told.steps + again.told.steps == CURVE
    validated = {found[0]: found for found in bench.told.validations + again.told.validations}
    assert list(validated.values()) == [(0, 5.0, False), (6, 4.4, True), (12, 3.8, True)]


def test_ctrl_c_while_loading_saves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        bench.stop.set()
        return None

    bench.script = script
    with pytest.raises(StopRequested):
        bench.go()
    assert not bench.folder.path.exists()


def test_ctrl_c_while_steps_are_computed_again_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        if trains(8)(worker, request) and len(bench.workers) == 1:
            return LOST
        if trains(6)(worker, request) and len(bench.workers) == 2:
            bench.stop.set()
            return None
        return True

    bench.script = script
    with pytest.raises(StopRequested):
        bench.go()
    assert newest(bench.folder).progress.step == 5
    assert bench.engine.saved_step == 5


def test_a_worker_that_dies_while_saving_for_ctrl_c(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def script(worker: FakeWorker, request: Request) -> Answer | bool:
        if trains(7)(worker, request):
            bench.stop.set()
        return LOST if isinstance(request, CopyState) and bench.stop.is_set() else True

    bench.script = script
    with pytest.raises(StopRequested):
        bench.go()
    assert newest(bench.folder).progress.step == 5
    assert "the checkpoint of step 5 is the last" in bench.told.notes("worker_lost")[0].message


def test_a_resumed_run_that_loses_its_worker_at_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, program={"total_iters": 5})
    bench.go()
    again = Bench(tmp_path, resumed=newest(bench.folder), script=once(trains(6), LOST))
    again.go()
    assert again.requests.count("Restore 5") == 2
    assert again.told.steps == CURVE[5:]


def test_patience_and_the_best_survive_resuming(tmp_path: Path) -> None:
    losses = {2: 1.0, 4: 2.0, 6: 2.0, 8: 2.0}
    options: dict[str, Any] = {"losses": losses, "early_stop": 3, "save_best": True}
    bench = Bench(tmp_path, **options, program={"steps_per_eval": 2})
    stopping(bench, trains(5))
    with pytest.raises(StopRequested):
        bench.go()
    resumed = newest(bench.folder)
    assert dataclasses.replace(resumed.progress, seconds=0, step=0, iteration=0).best_step == 2
    again = Bench(tmp_path, **options, program={"steps_per_eval": 2}, resumed=resumed)
    assert again.go().stopped_early
    assert again.engine.progress.step == 8
