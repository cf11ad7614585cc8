"""The worker's life: take requests in order, do them, say what happened."""

from __future__ import annotations

import threading
import time
import traceback
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters, maybe_set_recommended_wired_limit

from node.errors import OutOfMemory, UserError, one_line
from node.events import (
    EvalDone,
    Failed,
    FailureKind,
    Fused,
    Heartbeat,
    Progress,
    Ready,
    Restored,
)
from node.spec import (
    CopyState,
    Evaluate,
    Fuse,
    Generate,
    JobSpec,
    Request,
    Restore,
    Setup,
    Stop,
    TrainStep,
)
from node.worker import tuning
from node.worker.inbox import Inbox
from node.worker.loss import loss_sum, pad
from node.worker.optimizer import chooses_own_rate
from node.worker.randomness import RowContext
from node.worker.state import Copier, load_copy
from node.worker.trainer import Trainer

HEARTBEAT_SECONDS = 1.0


class Worker:
    """Does what the inbox asks for, until it is told to stop or fails."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._job: JobSpec | None = None
        self._model: nn.Module | None = None
        self._trainer: Trainer | None = None
        self._copier: Copier | None = None
        self._phase = "starting"
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
            traceback.print_exc()
            self._inbox.send(_failure(error))
            return False
        finally:
            self._stopped.set()
        return True

    def _do(self, request: Request) -> None:
        match request:
            case Setup(job):
                self._set_up(job)
            case Restore():
                trainer, job = self._training()
                trainer.restore(load_copy(Path(job.folder), request))
                self._inbox.send(Restored(request.step))
            case TrainStep(share):
                self._train(share)
            case Evaluate(chunk, rows):
                assert self._model is not None
                self._model.eval()
                total: Any = loss_sum(self._model, pad(rows)).item()
                self._inbox.send(EvalDone(chunk, float(total), rows.target_tokens))
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
        if mx.default_device().type == mx.gpu:
            maybe_set_recommended_wired_limit()
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        model, config = tuning.load(job.model)
        notes: list[str] = []
        if job.tuning is not None and job.optimizer is not None:
            context = RowContext()
            notes = tuning.make_trainable(model, job.tuning, job.seed, context)
            if chooses_own_rate(job.optimizer):
                notes.append("adafactor chooses its own rate (relative_step); --learning-rate is not used")
            self._trainer = Trainer(
                model,
                job.optimizer,
                job.seed,
                context,
                emit=self._inbox.send,
                clear_cache_threshold=job.clear_cache_threshold,
            )
            self._copier = Copier(Path(job.folder), self._inbox.send)
        self._model = model
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

    def _train(self, share: Any) -> None:
        trainer, job = self._training()
        done = trainer.run(share)
        self._inbox.send(done)
        if job.copy_every > 0 and share.step % job.copy_every == 0:
            self._copy(trainer, job, requested=False)

    def _copy(self, trainer: Trainer, job: JobSpec, *, requested: bool) -> None:
        """Hand the state to the copier; in full fine-tuning wait for it, lest old arrays double the memory."""
        assert self._copier is not None
        self._copier.copy(trainer.published(), requested=requested, generation=self._inbox.begun)
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
