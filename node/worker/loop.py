"""The worker's life: take requests in order, do them, say what happened."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import traceback
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters

from node import wire
from node.copies import STEPS_TOLD
from node.errors import OutOfMemory, UserError, one_line
from node.events import (
    Digested,
    EvalDone,
    Failed,
    FailureKind,
    Fused,
    Heartbeat,
    Joined,
    Probed,
    Progress,
    Ready,
    Restored,
    RingFailed,
)
from node.reducer import LOG_NAME as REDUCER_LOG
from node.spec import (
    CopyState,
    Digest,
    Evaluate,
    Fuse,
    Generate,
    JobSpec,
    Join,
    Leave,
    Probe,
    Request,
    Restore,
    RingSpec,
    Setup,
    Share,
    Stop,
    TrainStep,
)
from node.worker import tuning
from node.worker.adder import Adder, ReductionFailed
from node.worker.inbox import Inbox
from node.worker.limits import bound_memory
from node.worker.loss import TokenLoss, pad
from node.worker.optimizer import chooses_own_rate
from node.worker.probing import timed
from node.worker.randomness import RowContext
from node.worker.reducer import Interrupt, ReducerAdder
from node.worker.ring import Ring, digest
from node.worker.state import Copier, load_copy
from node.worker.streams import StreamAdder
from node.worker.trainer import Trainer, alone

HEARTBEAT_SECONDS = 1.0


class Worker:
    """Does what the inbox asks for, until it is told to stop or fails."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._job: JobSpec | None = None
        self._model: nn.Module | None = None
        self._loss: TokenLoss | None = None
        self._trainer: Trainer | None = None
        self._copier: Copier | None = None
        self._ring: Ring | None = None
        self._steps: deque[tuple[int, bytes]] = deque(maxlen=STEPS_TOLD)  # the last ones, as they were told
        self._passing = False  # the group failed: steps are passed over until there is another one, or none
        self._phase = "starting"
        inbox.before_exit = self._kill_reducer
        self._stopped = threading.Event()

    def run(self) -> bool:
        """Work until ``Stop``.

        Returns:
            Whether all went well; if not, ``Failed`` has been sent.
        """
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        try:
            while not isinstance(request := self._inbox.next(), Stop):
                self._phase = type(request).__name__
                self._do(request)
                self._phase = "waiting"
            if self._copier is not None:
                self._copier.close()
        except Exception as error:  # noqa: BLE001 - the one boundary where anything becomes an event
            with contextlib.suppress(OSError):  # the log's disk may be full, and that be what went wrong
                traceback.print_exc()
            self._inbox.send(_failure(error))
            return False
        finally:
            self._stopped.set()
            self._kill_reducer()
        return True

    def _do(self, request: Request) -> None:
        match request:
            case Setup(job):
                self._set_up(job)
            case Restore():
                trainer, job = self._training()
                trainer.restore(load_copy(Path(job.folder), request))
                while self._steps and self._steps[-1][0] > request.step:
                    self._steps.pop()
                self._inbox.send(Restored(request.step))
            case TrainStep(share):
                self._train(share)
            case Evaluate(chunk, rows):
                assert self._model is not None
                self._model.eval()
                if self._loss is None:
                    self._loss = TokenLoss(self._model)
                total: Any = self._loss.value(pad(rows)).item()
                self._inbox.send(EvalDone(chunk, float(total), rows.target_tokens))
            case Join(spec):
                self._join(spec)
            case Leave():
                self._leave()
            case Probe():
                self._probe(request)
            case Digest(weights):
                trainer, _ = self._training()
                state = trainer.published()
                self._inbox.send(Digested(state.step, digest(state.parameters) if weights else ""))
            case CopyState():
                trainer, job = self._training()
                self._copy(trainer, job, requested=True)
            case Generate():
                from node.worker.generate import generate

                assert self._model is not None
                for event in generate(self._model, request, self._inbox.superseded):
                    self._inbox.send(event)
            case Fuse():
                from node.worker.export import fuse

                began = time.perf_counter()
                files = fuse(request.model, request, self._progress)
                self._inbox.send(Fused(files, time.perf_counter() - began))

    def _set_up(self, job: JobSpec) -> None:
        began = time.perf_counter()
        self._job = job
        self._leave()
        self._steps = deque(maxlen=STEPS_TOLD + 2 * job.local_steps)
        bound_memory()
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        model, config = tuning.load(job.model)
        notes: list[str] = []
        if job.tuning is not None and job.optimizer is not None:
            context = RowContext()
            given = job.tuning.initial_weights
            begin = dataclasses.replace(job.tuning, initial_weights=str(Path(job.folder, given)) if given else "")
            notes = tuning.make_trainable(model, begin, job.seed, context)
            if chooses_own_rate(job.optimizer):
                notes.append("adafactor chooses its own rate (relative_step); --learning-rate is not used")
            self._trainer = Trainer(
                model,
                job.optimizer,
                job.seed,
                context,
                emit=self._inbox.send,
                clear_cache_threshold=job.clear_cache_threshold,
                prefix_folder=Path(job.folder) if job.reuse_prefix else None,
                local_steps=max(1, job.local_steps),
            )
            below = self._trainer.prefix
            if below is not None and below.kept is not None:
                kept = f"the {below.blocks} frozen layers below" if below.blocks > 1 else "the frozen layer below"
                notes.append(
                    f"what {kept} make of a row is kept for its next epoch (--reuse-prefix off computes it again)"
                )
            self._copier = Copier(Path(job.folder), self._inbox.send)
        self._model = model
        self._loss = self._trainer.loss if self._trainer is not None else None
        trainable = tree_flatten(model.trainable_parameters()) if self._trainer else []
        self._inbox.send(
            Ready(
                device=mx.default_device().type.name,
                model_type=str(config.get("model_type", "")),
                layers=len(model.layers),
                trained_layers=sum(bool(tree_flatten(layer.trainable_parameters())) for layer in model.layers),
                parameters=get_total_parameters(model) - _adapter_size(model),
                trainable_parameters=sum(array.size for _, array in trainable),
                quantized=tuning.is_quantized(model),
                load_seconds=time.perf_counter() - began,
                active_memory_bytes=mx.get_active_memory(),
                notes=tuple(notes),
            )
        )

    def _join(self, spec: RingSpec) -> None:
        self._leave()
        self._passing = True
        trainer, _ = self._training()
        began = time.perf_counter()
        try:
            ring = Ring.join(spec, trainer, partial(self._adder, spec), self._inbox.send, self._own)
        except ReductionFailed as error:
            self._ring = None
            self._inbox.send(RingFailed(0, str(error)))
            return
        trainer.reduce = trainer.rounds = ring
        self._passing = False
        self._inbox.send(Joined(spec.rank, spec.size, time.perf_counter() - began))

    def _adder(self, spec: RingSpec, count: int, owed: int) -> Adder:
        inbox = self._inbox
        if spec.backend == "grpc":
            return StreamAdder(count, inbox.send, inbox.total, inbox.superseded, owed)
        _, job = self._training()
        log = Path(job.folder) / REDUCER_LOG
        return ReducerAdder(count, Interrupt(inbox.bell, inbox.superseded), log, owed)

    def _own(self, ring: Ring) -> None:
        self._ring = ring

    def _leave(self) -> None:
        self._passing = False
        if self._ring is not None:
            ring, self._ring = self._ring, None
            ring.kill()
        if self._trainer is not None:
            self._trainer.abandon_round()
            self._trainer.reduce, self._trainer.rounds = alone, None

    def _kill_reducer(self) -> None:
        if self._ring is not None:
            self._ring.kill_process()

    def _train(self, share: Share) -> None:
        trainer, job = self._training()
        if self._passing:
            return
        if share.step != trainer.next_step:
            # Never apply a step to another state than it belongs to, whatever went wrong before.
            self._passing = True
            self._inbox.send(RingFailed(share.step, f"this worker holds the state of step {trainer.step}"))
            return
        if bool(share.round) != (self._ring is not None and trainer.local_steps > 1) or trainer.is_over(share.round):
            self._passing = True
            self._inbox.send(RingFailed(share.step, "a step of another kind than those of this group"))
            return
        before = trainer.step
        if self._ring is not None:
            self._ring.prepare(share)
        try:
            done = trainer.run_local(share) if share.round else (trainer.run(share),)
        except ReductionFailed as error:
            self._leave()
            self._passing = True
            self._inbox.send(RingFailed(share.step, str(error)))
            return
        for step in done:
            self._inbox.send(step)
            self._steps.append((step.step, wire.encode_event(step, self._inbox.begun)))
        if job.copy_every > 0 and trainer.step // job.copy_every > before // job.copy_every:
            self._copy(trainer, job, requested=False)

    def _probe(self, request: Probe) -> None:
        trainer, _ = self._training()
        trainer.time(request.share)
        seconds = timed(lambda: trainer.time(request.share), request.repeats, request.seconds)
        self._inbox.send(Probed(seconds, request.share.positions, mx.get_peak_memory()))

    def _copy(self, trainer: Trainer, job: JobSpec, *, requested: bool) -> None:
        """Hand the state to the copier; in full fine-tuning wait for it, lest old arrays double the memory."""
        assert self._copier is not None
        steps = tuple(event for _, event in self._steps)
        self._copier.copy(trainer.published(), requested=requested, generation=self._inbox.begun, steps=steps)
        if job.tuning is not None and job.tuning.fine_tune_type == "full":
            self._copier.wait()

    def _training(self) -> tuple[Trainer, JobSpec]:
        assert self._trainer is not None
        assert self._job is not None
        return self._trainer, self._job

    def _progress(self, task: str, done: int, total: int) -> None:
        self._inbox.send(Progress(task, done, total))

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            step = self._trainer.step if self._trainer is not None else 0
            self._inbox.send(Heartbeat(self._phase, step, mx.get_active_memory()), self._inbox.newest)


def _adapter_size(model: nn.Module) -> int:
    names = ("lora_a", "lora_b")
    return sum(a.size for name, a in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in names)


def _failure(error: Exception) -> Failed:
    message = one_line(error, 2000)
    kind: FailureKind = "internal"
    if isinstance(error, UserError):
        kind = "user"
    elif isinstance(error, OutOfMemory) or tuning.is_memory_error(error):
        kind = "memory"
    elif isinstance(error, OSError):
        kind = "disk"
    else:
        message = f"{type(error).__name__}: {message}"
    return Failed(kind, message)
