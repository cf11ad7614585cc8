"""This machine alone: one worker of our own, no network; another one when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from coordinator.copies import Kept
from coordinator.crew import Crew, Member, StopRequested, unless_stopped
from coordinator.stream import Reader
from coordinator.workers import wait_for
from node.errors import TandemError, WorkerLost
from node.events import Ready
from node.info import RingPart
from node.spec import FileRef, JobSpec, Setup
from node.supervisor import LocalWorker, WorkerLink

HERE = "here"
# How often a worker may die while it loads the model.
LOADING_TRIES = 5
LOAD_SECONDS = 3600.0
"""For a worker that shows signs of life: the largest models from the slowest disks take a good part of it."""


async def load(
    link: WorkerLink, job: JobSpec, given: dict[FileRef, Path], reader: Reader, stop: asyncio.Event
) -> Ready:
    """Have a worker load the model.

    Args:
        link: to the worker.
        job: what it is to know.
        given: files that the job's folder must hold before.
        reader: takes progress.
        stop: set by Ctrl-C.

    Raises:
        StopRequested: Ctrl-C came first.
        TandemError: it cannot.
    """

    async def ask() -> Ready:
        for ref, path in given.items():
            await link.give(ref, path)
        await link.send(Setup(job))
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                return await wait_for(link, Ready, reader)
        except TimeoutError as error:
            raise WorkerLost(f"the worker has not loaded the model in {LOAD_SECONDS / 60:.0f} min") from error

    return await unless_stopped(ask(), stop)


class Alone:
    """Brings one worker of this machine, and another when it dies; see ``regroup.Muster``.

    Args:
        start: spawns it.
        job: what it is to know.
        given: files that the job's folder must hold.
        reader: takes progress.
        stop: set by Ctrl-C.
    """

    awaited = "starting another"

    def __init__(
        self,
        start: Callable[[], Awaitable[WorkerLink]],
        job: JobSpec,
        given: dict[FileRef, Path],
        reader: Reader,
        stop: asyncio.Event,
    ) -> None:
        self._start = start
        self._job = job
        self._given = given
        self._reader = reader
        self._stop = stop
        self._wake: Callable[[], None] = lambda: None
        self._starting: asyncio.Task[None] | None = None
        self._arrived: list[Member] = []
        self._failed: BaseException | None = None

    async def assemble(self) -> Crew:
        """See ``regroup.Muster``."""
        return Crew([await self._member()], self._stop)

    async def _member(self) -> Member:
        link = await self._start()
        try:
            ready = await load(link, self._job, self._given, self._reader, self._stop)
        except BaseException:
            link.cancel()
            await link.close()
            raise
        return Member(HERE, "", link, ready, keeps=True, here=True)

    def attend(self, wake: Callable[[], None]) -> None:
        """See ``regroup.Muster``."""
        self._wake = wake

    def arrivals(self) -> list[Member]:
        """See ``regroup.Muster``."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        arrived, self._arrived = self._arrived, []
        return arrived

    def lost(self, member: Member, error: TandemError | None, largest: int) -> None:
        """See ``regroup.Muster``."""
        del largest
        if error is not None and isinstance(member.link, LocalWorker):
            member.link.kill()  # it may hang, and two of them may need more memory than there is
        self._starting = asyncio.create_task(self._bring_another())

    async def _bring_another(self) -> None:
        try:
            for left in reversed(range(LOADING_TRIES)):
                try:
                    self._arrived.append(await self._member())
                    break
                except WorkerLost:
                    if not left:
                        raise
        except (StopRequested, TandemError, OSError) as error:
            self._failed = error
        finally:
            self._wake()

    def sum_seconds(self, ids: Sequence[str], *, streams: bool) -> float:
        """See ``regroup.Muster``."""
        del ids, streams
        return 0.0

    async def kept(self) -> list[Kept]:
        """See ``regroup.Muster``: its copies are on this disk."""
        return []

    async def rest(self) -> None:
        """See ``regroup.Muster``."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        for member in self._arrived:
            member.link.cancel()
            await member.link.close()
        self._arrived.clear()

    def order(self, ids: tuple[str, ...]) -> list[str]:
        """See ``regroup.Muster``."""
        return list(ids)

    def ring(self, crew: Crew, *, streams: bool) -> list[RingPart]:
        """See ``regroup.Muster``: one worker forms no group."""
        raise AssertionError(f"a group of {len(crew)}, streams: {streams}")
