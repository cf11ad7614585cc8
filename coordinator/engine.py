"""Drive a worker through the program, and go on when the worker dies.

Requests are sent a few steps ahead, so that the worker never waits for the coordinator. A validation is a barrier:
nothing is sent past it before its result is known, so that early stopping and the best checkpoint are exact.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coordinator.checkpoint import Checkpoint, Checkpoints, Progress, link_or_copy
from coordinator.program import Action, Program
from coordinator.prompts import SamplePrompt
from coordinator.shares import Evaluation, StepSource
from coordinator.stream import Advanced, Noted, Reader, Sampled, StepFinished, Validated
from coordinator.summing import sum_losses
from coordinator.workers import SILENCE_SECONDS
from node import events
from node.errors import OutOfMemory, TandemError, WorkerError, WorkerLost
from node.spec import CopyState, Evaluate, FileRef, Generate, JobSpec, Restore, Setup, TrainStep
from node.supervisor import WorkerLink

STEPS_AHEAD = 4
SECOND_LOOK_SECONDS = 2.0
# So many worker deaths without a new step in between end the run: something is wrong that restarting does not mend.
DEATHS_WITHOUT_PROGRESS = 5

_E = TypeVar("_E", bound=events.Event)
_T = TypeVar("_T")


class StopRequested(Exception):
    """Ctrl-C: raised where the engine waits."""


class Text(Protocol):
    """Turns token ids into text."""

    def __call__(self, tokens: list[int]) -> str:
        """The text of these tokens."""


@dataclass(frozen=True)
class Work:
    """What the engine is to do.

    Attributes:
        job: for the worker.
        program: the order of things.
        steps: the rows of each step.
        validation: the rows of each validation, or None.
        samples: prompts to continue at each validation.
        decode: for their answers.
        early_stop: validations without a better one before stopping; None never.
        save_best: whether each best validation makes a checkpoint.
        data_digest: of the training data.
    """

    job: JobSpec
    program: Program
    steps: StepSource
    validation: Evaluation | None
    samples: tuple[SamplePrompt, ...]
    decode: Text
    early_stop: int | None
    save_best: bool
    data_digest: str


@dataclass
class _Copy:
    step: int
    weights: FileRef
    optimizer: FileRef


class Engine:
    """One run of a program.

    Args:
        work: what to do.
        start: spawns a worker.
        checkpoints: where states are kept.
        reader: takes what happens.
        resumed: the checkpoint to go on from, or None.
        stop: set by Ctrl-C.
    """

    def __init__(
        self,
        work: Work,
        start: Callable[[], Awaitable[WorkerLink]],
        checkpoints: Checkpoints,
        reader: Reader,
        resumed: Checkpoint | None,
        stop: asyncio.Event,
    ) -> None:
        self._work = work
        self._start = start
        self._checkpoints = checkpoints
        self._reader = reader
        self._newest = resumed
        self._stop = stop
        self._link: WorkerLink | None = None
        self._receiving: asyncio.Task[events.Event] | None = None
        self._pending: deque[Action] = deque()
        self._in_flight: list[Action] = []
        self._copies: list[_Copy] = []
        self._deaths = 0
        self._chunk = 0
        self._began = time.monotonic()
        self.progress = resumed.progress if resumed else Progress(0, 0, data_digest=work.data_digest)
        self.saved_step = self.progress.step
        self.replayed_steps = 0
        self._restarted = False
        self.stopped_early = False
        self._seconds_before = self.progress.seconds
        self._pending.extend(work.program.actions(self.progress.step, self.progress.validated_step))

    async def prepare(self) -> events.Ready:
        """Start a worker and have it load the model; another one when it dies of that.

        Raises:
            TandemError: it could not.
        """
        while True:
            self._link = await self._start()
            try:
                await self._send(Setup(self._work.job))
                return await self._expect(events.Ready)
            except WorkerLost as error:
                await self._lose(error)

    async def _lose(self, error: WorkerLost) -> None:
        """Let a worker go that died; too many deaths in a row are not mended by yet another."""
        await self.close()
        self._deaths += 1
        if self._deaths >= DEATHS_WITHOUT_PROGRESS:
            step = self.progress.step + 1
            raise TandemError(
                f"{error}; it died {self._deaths} times at step {step}, perhaps for want of memory:"
                " close other programs or take a smaller --batch-size"
            ) from error
        self._note("worker_lost", f"{error}; starting another", "warning", step=self.progress.step)

    async def run(self) -> None:
        """Do everything that is left to do.

        Raises:
            StopRequested: Ctrl-C; the state is saved.
            TandemError: the run cannot go on.
        """
        self._began = time.monotonic()
        await self._survive(self._follow, restored=False)

    async def evaluate_at(self, checkpoint: Checkpoint | None, evaluation: Evaluation, task: str) -> tuple[float, int]:
        """Evaluate after ``run``, with the weights of a checkpoint or, if None, the last ones.

        Raises:
            StopRequested, TandemError: as ``run``.
        """

        async def measure() -> tuple[float, int]:
            if checkpoint is not None:
                await self._put(self._lay_out(checkpoint))
            return await self.evaluate(evaluation, task)

        return await self._survive(measure, restored=True)

    async def _survive(self, work: Callable[[], Awaitable[_T]], *, restored: bool) -> _T:
        """Do this with a worker in the state of the last step, and again with another when that one is lost."""
        ready = True
        while True:
            try:
                if not ready:
                    await self.prepare()
                if not restored:
                    await self._restore()
                ready = restored = True
                return await work()
            except StopRequested:
                if restored:
                    await self._save_and_stop()
                raise
            except OutOfMemory as error:
                await self.close()
                if not self._work.steps.shrink():
                    raise
                if self._work.validation is not None:
                    self._work.validation.limit_tokens(self._work.steps.token_limit)
                self._note("memory", f"{error}; going on with smaller micro-batches", "warning")
                ready, restored, self._restarted = False, False, True
            except WorkerLost as error:
                await self._lose(error)
                ready, restored, self._restarted = False, False, True

    async def evaluate(self, evaluation: Evaluation, task: str) -> tuple[float, int]:
        """Sum of losses and number of target tokens of a data set, added in chunk order."""
        first = self._chunk
        self._chunk += len(evaluation)
        return await sum_losses(
            evaluation,
            first,
            self._send,
            self._next,
            advance=lambda done, total: self._reader.handle(Advanced(task, done, total)),
            pass_on=self._take,
        )

    async def close(self) -> None:
        """Let the worker go."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
            self._receiving = None
        if self._link is not None:
            link, self._link = self._link, None
            # What has not begun is not wanted any more.
            link.cancel()
            await link.close()

    # --- following the program ------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while self._pending or self._in_flight:
            while self._pending and self._pending[0].kind != "validate" and len(self._in_flight) < STEPS_AHEAD:
                action = self._pending.popleft()
                self._in_flight.append(action)
                train = action.kind == "train"
                await self._send(TrainStep(self._work.steps.share(action.step)) if train else CopyState(action.step))
            if self._in_flight:
                self._take(await self._next())
                continue
            await self._validate(self._pending[0].step)
            self._pending.popleft()
            if self.stopped_early:
                self._pending.clear()
                if self.saved_step != self.progress.step:
                    self._pending.append(Action("checkpoint", self.progress.step))

    def _take(self, event: events.Event) -> None:
        """Account for one event."""
        match event:
            case events.StepDone():
                self._finished(event)
            case events.Copied(requested=False):
                self._copies = [*self._copies[-1:], _Copy(event.step, event.weights, event.optimizer)]
            case events.Copied():
                self._arrived("checkpoint", event.step)
                self._save(event)
            case events.CopyFailed():
                if event.requested:
                    self._arrived("checkpoint", event.step)
                self._note("copy_failed", f"state of step {event.step} not saved: {event.reason}", "warning")

    def _finished(self, done: events.StepDone) -> None:
        self._arrived("train", done.step)
        if done.step != self.progress.step + 1:
            raise TandemError(f"the worker reported step {done.step} after step {self.progress.step}")
        loss = done.loss_sum / max(done.tokens, 1)
        # A gradient that is not finite has spoilt the weights already: no checkpoint is taken of them.
        if not math.isfinite(loss) or not math.isfinite(done.grad_norm):
            what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient norm became {done.grad_norm}"
            raise TandemError(
                f"the {what} at step {done.step}: lower --learning-rate or set --max-grad-norm"
                + ("; the checkpoints before it are good" if self.saved_step else "")
            )
        program = self._work.program
        self._deaths = 0
        self.progress = dataclasses.replace(
            self.progress, step=done.step, iteration=program.last_iter(done.step), seconds=self._seconds()
        )
        metrics = {
            "step": done.step,
            "iter": self.progress.iteration,
            "loss": loss,
            "tokens": done.tokens,
            "learning_rate": done.learning_rate,
            "grad_norm": done.grad_norm,
            "seconds": done.seconds,
            "compute_seconds": done.compute_seconds,
            "wait_seconds": done.wait_seconds,
            "nodes": 1,
            "peak_memory_bytes": done.peak_memory_bytes,
            "padded_tokens": done.padded_tokens,
        }
        self._reader.handle(StepFinished(metrics, program.reports(done.step)))

    def _save(self, copied: events.Copied, *, scheduled: bool = True) -> None:
        progress = dataclasses.replace(
            self.progress,
            step=copied.step,
            iteration=self._work.program.last_iter(copied.step),
            seconds=self._seconds(),
        )
        try:
            checkpoint = self._checkpoints.save(copied, self._folder, progress, scheduled=scheduled)
            removed = self._checkpoints.prune(self.progress.best_step)
        except OSError as error:
            why = error.strerror or str(error)
            self._note("checkpoint_failed", f"checkpoint of step {copied.step} not written: {why}", "warning")
            return
        self.saved_step, self._newest = copied.step, checkpoint
        self._note("checkpoint", f"saved checkpoint {checkpoint.folder.name}", step=copied.step, removed=removed)

    async def _validate(self, step: int) -> None:
        # A worker that dies after the result and before the samples gives no second result.
        if self.progress.validated_step < step:
            await self._measure(step)
        for prompt in self._work.samples:
            text = self._work.decode(await self._generate(prompt))
            self._reader.handle(Sampled(step, prompt.text, text))
        best = step > 0 and self.progress.best_step == step
        follows = len(self._pending) > 1 and self._pending[1] == Action("checkpoint", step)
        if best and self._work.save_best and not follows:
            await self._send(CopyState(step))
            while not isinstance(event := await self._next(), events.Copied | events.CopyFailed) or not event.requested:
                self._take(event)
            if isinstance(event, events.Copied):
                self._save(event, scheduled=False)
            else:
                self._take(event)
        if self._work.early_stop is not None and self.progress.stale_validations >= self._work.early_stop:
            self.stopped_early = True
            count = self.progress.stale_validations
            message = f"stopped: no better validation than step {self.progress.best_step}'s in {count} tries"
            self._note("early_stop", message, step=step)

    async def _measure(self, step: int) -> None:
        assert self._work.validation is not None
        began = time.monotonic()
        loss_sum, tokens = await self.evaluate(self._work.validation, "validating")
        loss = loss_sum / max(tokens, 1)
        best = math.isfinite(loss) and (self.progress.best_loss is None or loss < self.progress.best_loss)
        self.progress = dataclasses.replace(self.progress, validated_step=step)
        # The loss before any update is a reference, not a result: it neither is the best nor uses up patience.
        if step > 0:
            self.progress = dataclasses.replace(
                self.progress,
                best_loss=loss if best else self.progress.best_loss,
                best_step=step if best else self.progress.best_step,
                stale_validations=0 if best else self.progress.stale_validations + 1,
            )
        metrics = {"step": step, "val_loss": loss, "val_tokens": tokens, "seconds": time.monotonic() - began}
        self._reader.handle(Validated(metrics, best and step > 0))

    async def _generate(self, prompt: SamplePrompt) -> list[int]:
        self._chunk += 1
        await self._send(Generate(self._chunk, prompt.tokens, prompt.stop, prompt.max_tokens))
        tokens: list[int] = []
        while True:
            event = await self._next()
            if isinstance(event, events.TokensGenerated) and event.id == self._chunk:
                tokens += event.tokens.tolist()
                if event.finished:
                    return tokens
            else:
                self._take(event)

    # --- losing and restoring -------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        """Bring a fresh worker to the last applied step, from the newest state that can be read."""
        # Before anything is awaited: this worker may be lost too, and what was asked for must not be forgotten.
        self._put_back()
        source: _Copy | None = None
        for copy in sorted(self._copies, key=lambda item: item.step, reverse=True):
            if copy.step <= self.progress.step and all((self._folder / r.name).exists() for r in _refs(copy)):
                source = copy
                break
        saved = self._newest
        if saved is not None and (source is None or source.step < saved.progress.step):
            source = self._lay_out(saved)
        if source is not None:
            await self._put(source)
        restored = source.step if source is not None else 0
        if self._restarted:
            await self._replay(restored + 1)

    async def _put(self, copy: _Copy) -> None:
        await self._send(Restore(copy.step, copy.weights, copy.optimizer))
        await self._expect(events.Restored)

    async def _replay(self, first: int) -> None:
        """Compute again what was applied after the restored state; it stands in the metrics already."""
        last = self.progress.step
        count = last - first + 1
        self.replayed_steps += count
        began = time.monotonic()
        sent = done = first - 1
        while done < last:
            while sent < last and sent - done < STEPS_AHEAD:
                sent += 1
                await self._send(TrainStep(self._work.steps.share(sent)))
            event = await self._next()
            if isinstance(event, events.StepDone):
                done = event.step
            else:
                self._take(event)
        seconds = time.monotonic() - began
        message = f"went on from step {first - 1}"
        if count:
            message += f"; {count} steps computed again in {seconds:.1f} s"
        self._note("restarted", message, replayed_steps=count, step=last)

    def _put_back(self) -> None:
        """Ask again for what was in flight; a checkpoint whose step has passed is taken of the present step."""
        lost, self._in_flight = self._in_flight, []
        again = [action for action in lost if action.kind == "train" and action.step > self.progress.step]
        missed = [action for action in lost if action.kind == "checkpoint" and action.step <= self.progress.step]
        later = [action for action in lost if action.kind == "checkpoint" and action.step > self.progress.step]
        first = [Action("checkpoint", self.progress.step)] if missed else []
        order = sorted(again + later, key=lambda action: (action.step, action.kind == "checkpoint"))
        self._pending.extendleft(reversed(first + order))

    def _lay_out(self, checkpoint: Checkpoint) -> _Copy:
        """Put a checkpoint's files where the worker looks for them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        refs = []
        for ref in (checkpoint.weights, checkpoint.optimizer):
            name = f"resumed-{checkpoint.progress.step:07d}.{ref.name}"
            link_or_copy(checkpoint.folder / ref.name, self._folder / name)
            refs.append(dataclasses.replace(ref, name=name))
        return _Copy(checkpoint.progress.step, refs[0], refs[1])

    async def _save_and_stop(self) -> None:
        """Have the state after the running step saved, and nothing more begun."""
        self._stop = asyncio.Event()  # a second Ctrl-C is the command line's to handle
        assert self._link is not None
        self._link.cancel()
        try:
            await self._send(CopyState(self.progress.step))
            while True:
                event = await self._next()
                if isinstance(event, events.Copied) and event.requested:
                    if event.step <= self.saved_step:
                        return
                    self._save(event, scheduled=self._work.program.saves(event.step))
                    if event.step == self.progress.step:
                        return
                else:
                    self._take(event)
                    if isinstance(event, events.CopyFailed) and event.requested:
                        return
        except (WorkerError, OSError) as error:
            self._note("worker_lost", f"{error}; the checkpoint of step {self.saved_step} is the last", "warning")

    # --- talking to the worker ------------------------------------------------------------------------------------

    @property
    def _folder(self) -> Path:
        return Path(self._work.job.folder)

    async def _send(self, request: Setup | Restore | TrainStep | Evaluate | CopyState | Generate) -> None:
        assert self._link is not None
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await self._link.send(request)
        except TimeoutError as error:
            raise WorkerLost(f"the worker took nothing in for {SILENCE_SECONDS:.0f} s") from error

    async def _next(self) -> events.Event:
        """The next event that is no sign of life only.

        Raises:
            StopRequested: Ctrl-C came first.
            WorkerLost: the worker is gone, or has said nothing for too long.
        """
        while True:
            event = await self._receive()
            if isinstance(event, events.Progress):
                self._reader.handle(Advanced(event.task, event.done, event.total))
            elif not isinstance(event, events.Heartbeat | events.ComputeStarted | events.ReduceEntered):
                return event

    async def _receive(self) -> events.Event:
        assert self._link is not None
        if self._stop.is_set():  # however fast events come in
            raise StopRequested
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._link.receive())
        stopping = asyncio.create_task(self._stop.wait())
        # The second look is for a program that was itself suspended: its timer ends before it reads what has come.
        for seconds in (SILENCE_SECONDS, SECOND_LOOK_SECONDS):
            done, _ = await asyncio.wait(
                {self._receiving, stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                break
        stopping.cancel()
        if self._receiving in done:
            task, self._receiving = self._receiving, None
            return task.result()
        if stopping in done:
            raise StopRequested
        raise WorkerLost(f"the worker said nothing for {SILENCE_SECONDS:.0f} s")

    async def _expect(self, kind: type[_E]) -> _E:
        while True:
            event = await self._next()
            if isinstance(event, kind):
                return event
            self._take(event)

    def _arrived(self, kind: str, step: int) -> None:
        self._in_flight = [action for action in self._in_flight if (action.kind, action.step) != (kind, step)]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _note(self, kind: str, message: str, level: str = "info", **details: Any) -> None:
        self._reader.handle(Noted(kind, message, level, details))


def _refs(copy: _Copy) -> tuple[FileRef, FileRef]:
    return copy.weights, copy.optimizer
