"""Workers for single tasks: evaluate, generate, fuse."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import TypeVar

from coordinator.home import new_job_folder
from coordinator.stream import Advanced, Reader
from node import events
from node.errors import WorkerError, WorkerLost
from node.spec import JobSpec, ModelSpec, Request, Setup
from node.supervisor import LocalWorker, WorkerLink

SILENCE_SECONDS = 60.0
_E = TypeVar("_E", bound=events.Event)


class Quiet:
    """A reader that shows nothing."""

    def handle(self, event: object) -> None:
        """See ``stream.Reader``."""

    def close(self) -> None:
        """See ``stream.Reader``."""


@contextlib.asynccontextmanager
async def task_worker(model: ModelSpec | None, reader: Reader | None = None) -> AsyncIterator[WorkerLink]:
    """A worker for one task, with the model loaded unless None.

    Raises:
        TandemError: the model cannot be loaded.
    """
    folder = new_job_folder("task")
    done = keep = False
    worker = await LocalWorker.start(folder)
    try:
        if model is not None:
            await worker.send(Setup(JobSpec(job=folder.name, folder=str(folder), model=model)))
            await wait_for(worker, events.Ready, reader)
        yield worker
        done = True
    except WorkerError:
        # The log of a failure is worth more than a clean folder: the error names it.
        keep = True
        raise
    finally:
        if not done:
            worker.kill()
        await worker.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


async def next_event(worker: WorkerLink, silence_seconds: float = SILENCE_SECONDS) -> events.Event:
    """The next event, however long the task takes, as long as the worker shows signs of life.

    Raises:
        WorkerLost: it has said nothing for too long.
    """
    try:
        async with asyncio.timeout(silence_seconds):
            while isinstance(event := await worker.receive(), events.Condition):
                pass  # its node speaks, not the worker
            return event
    except TimeoutError as error:
        raise WorkerLost(f"the worker said nothing for {silence_seconds:.0f} s") from error


async def wait_for(
    worker: WorkerLink, kind: type[_E], reader: Reader | None = None, *, silence_seconds: float = SILENCE_SECONDS
) -> _E:
    """The next event of a kind; progress goes to the reader, other events are passed over.

    Args:
        worker: that says it.
        kind: of the event.
        reader: takes progress.
        silence_seconds: how long it may say nothing, once it has said a first word: starting takes its time.
    """
    patience = SILENCE_SECONDS
    while True:
        event = await next_event(worker, patience)
        patience = silence_seconds
        if isinstance(event, kind):
            return event
        if isinstance(event, events.Progress) and reader is not None:
            reader.handle(Advanced(event.task, event.done, event.total))


async def ask(
    worker: WorkerLink,
    request: Request,
    answer: type[_E],
    reader: Reader | None = None,
    *,
    silence_seconds: float = SILENCE_SECONDS,
) -> _E:
    """Send a request and wait for its answer; see ``wait_for``."""
    await worker.send(request)
    return await wait_for(worker, answer, reader, silence_seconds=silence_seconds)
