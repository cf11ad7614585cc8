"""The workers of one run, as one: requests to any of them, one queue of what they all say; some come and go."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from coordinator.adding import Adding, NotAddable
from coordinator.pace import Pace, Speed
from coordinator.pressure import says, share_factor
from coordinator.workers import SILENCE_SECONDS
from node.errors import TandemError, WorkerLost
from node.events import Addend, Condition, Event, Ready, RingFailed
from node.info import RingPart
from node.spec import FileRef, Request
from node.supervisor import WorkerLink

FROZEN_SECONDS = 6.0
"""Longest silence of one of several workers, each of which says something every second."""
CUT_OFF_SECONDS = 12.0
"""Longest silence of the only one, over a network; of a process of ours, nothing but a busy machine holds it up."""
STEPS_TO_JUDGE = 6
"""Before a worker's pace is known that was not probed."""
SUSPENDED_SECONDS = 1.0
SECOND_LOOK_SECONDS = 2.0
LAST_LOOK_SECONDS = 0.01
# Events that wait for the coordinator, of each worker: enough for a hiccup, and a worker that says too much is held up.
EVENTS_WAITING = 64

_T = TypeVar("_T")


class StopRequested(Exception):
    """Ctrl-C: raised where a crew is listened to."""


async def unless_stopped(work: Coroutine[Any, Any, _T], stop: asyncio.Event) -> _T:
    """Do this, unless Ctrl-C comes first.

    Raises:
        StopRequested: it did; the work was cancelled.
    """
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise StopRequested
        return working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


@runtime_checkable
class RingLink(WorkerLink, Protocol):
    """A worker that can be one rank of a group."""

    async def form_ring(self, part: RingPart) -> None:
        """Have the worker's node open its end of the group and the worker join it, in the present generation.

        Raises:
            As ``send``.
        """


@runtime_checkable
class KeepingLink(Protocol):
    """A worker whose machine can keep its state when it is let go.

    Attributes:
        keep_state: see ``node.client.RemoteWorker``.
    """

    keep_state: bool


@dataclass
class Member:
    """One worker of a run.

    Attributes:
        id: of its machine.
        name: of its machine, as people call it; "" for this machine alone.
        called: what the metrics call its machine while that has no name among others; "" where none will come.
        link: to the worker, whose model is loaded.
        ready: what it said then.
        pace: how fast it is; None where it was not probed and has not worked for long enough.
        token_limit: most input positions of its micro-batches, or None.
        keeps: whether it is where checkpoints are best taken from: on the coordinator's own machine.
        here: whether its job's folder is one of this very program: its copies are used where they are.
        condition: of its machine, as last heard.
        condition_factor: of its pace that its share is made for, by its condition; see ``pressure.slowed``.
        saves: whether it could write the last copy of its state: its disk may be full.
    """

    id: str
    name: str
    link: WorkerLink
    ready: Ready
    pace: Pace | None = None
    token_limit: int | None = None
    keeps: bool = False
    here: bool = False
    condition: Condition = field(default_factory=Condition)
    condition_factor: float = 1.0
    saves: bool = True
    called: str = ""
    _worked: list[tuple[int, float]] = field(default_factory=list)

    def worked(self, positions: int, seconds: float) -> None:
        """Take note of what a step has cost; whom nobody has probed is judged by its first steps."""
        if self.pace is not None:
            self.pace = self.pace.observed(positions, seconds)
        elif positions > 0 and seconds > 0:
            self._worked.append((positions, seconds))
            if len(self._worked) == STEPS_TO_JUDGE:
                self.pace = Pace(Speed.of_steps(self._worked[1:]))  # the first one warms up

    def is_now(self, condition: Condition) -> str | None:
        """Take note of how its machine is; one line for people about what has changed, or None."""
        line = says(self.name, condition, self.condition)
        self.condition, self.condition_factor = condition, share_factor(condition)
        return line


class MemberFailed(Exception):
    """A worker cannot go on.

    Args:
        member: whose it is.
        error: why.
    """

    def __init__(self, member: Member, error: TandemError) -> None:
        super().__init__(str(error))
        self.member = member
        self.error = error


class Woken(Exception):
    """Somebody called ``Crew.wake``."""


class Crew:
    """The workers of a run: those that are ranks, in their order, and those that wait to become some.

    Args:
        members: the first ranks.
        stop: set by Ctrl-C.
    """

    def __init__(self, members: Sequence[Member], stop: asyncio.Event) -> None:
        self._stop = stop
        self._everyone: dict[str, Member] = {}
        self._order: list[str] = [member.id for member in members]
        self._waiting: deque[tuple[Member, Event | TandemError]] = deque()
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()
        self._heard: dict[str, float] = {}
        self._gone: set[str] = set()
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._woken = False
        self._mistake: BaseException | None = None  # of this program, in a task that nobody waits for
        self._adding = Adding()
        self._stopping = asyncio.create_task(self._hear_stop())
        for member in members:
            self.add(member)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def members(self) -> list[Member]:
        """The ranks, in their order."""
        return [self._everyone[machine] for machine in self._order]

    @property
    def ids(self) -> list[str]:
        """Of the ranks' machines, in their order."""
        return list(self._order)

    @property
    def present(self) -> list[int]:
        """Ranks that have not failed."""
        return [index for index, machine in enumerate(self._order) if machine not in self._gone]

    @property
    def keeper(self) -> int:
        """The rank that checkpoints are taken from: rather one that can write them."""
        return max(self.present, key=lambda index: (self.members[index].saves, self.members[index].keeps, -index))

    # --- who is in it -----------------------------------------------------------------------------------------------

    def add(self, member: Member) -> None:
        """Listen to one more worker. It becomes a rank by ``arrange``."""
        assert member.id not in self._everyone, "a machine has one worker"
        self._everyone[member.id] = member
        self._heard[member.id] = time.monotonic()
        listening = asyncio.create_task(self._listen(member))
        listening.add_done_callback(self._see_mistake)
        self._listening[member.id] = listening

    def arrange(self, order: Sequence[str]) -> None:
        """Make these the ranks, in this order; what was heard of others and not yet taken in is dropped."""
        self._order = list(order)

    def index(self, machine: str) -> int:
        """The rank of a machine."""
        return self._order.index(machine)

    def find(self, machine: str) -> Member | None:
        """A machine's worker, rank or not."""
        return self._everyone.get(machine)

    def dismiss(self, machine: str, *, keep: bool = False) -> Member | None:
        """Let a worker go, without waiting for it; None where there is none.

        Args:
            machine: whose it is.
            keep: have its node keep the state that it holds: it is not let go because all is well.
        """
        member = self._everyone.pop(machine, None)
        if member is None:
            return None
        self._order = [other for other in self._order if other != machine]
        self._gone.discard(machine)
        listening = self._listening.pop(machine)
        listening.cancel()
        member.link.cancel()
        if keep and isinstance(member.link, KeepingLink):
            member.link.keep_state = True
        closing = asyncio.create_task(_close(listening, member.link))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return member

    async def close(self) -> None:
        """Let all workers go."""
        self._stopping.cancel()
        # Each in its own time: one that does not answer must not keep the others' machines busy.
        for machine in list(self._everyone):
            self.dismiss(machine)
        await self._adding.close()
        await asyncio.gather(self._stopping, *self._closing, return_exceptions=True)

    # --- talking ----------------------------------------------------------------------------------------------------

    async def send(self, index: int, request: Request) -> None:
        """Put a request behind those before it.

        Raises:
            MemberFailed: the worker is gone or takes nothing in.
        """
        member = self.members[index]
        async with self._taking_in(member):
            await member.link.send(request)

    async def give(self, index: int, ref: FileRef, source: Path) -> None:
        """Put a file into a member's folder.

        Raises:
            As ``send``; OSError: it cannot be read here.
        """
        member = self.members[index]
        try:
            await member.link.give(ref, source)
        except TandemError as error:
            self._fail(member, error)

    async def form(self, index: int, part: RingPart) -> None:
        """Have a member join a group; see ``RingLink``.

        Raises:
            As ``send``.
        """
        member = self.members[index]
        assert isinstance(member.link, RingLink)
        self._adding.expect(member.id, member.link, part)
        async with self._taking_in(member):
            await member.link.form_ring(part)

    @contextlib.asynccontextmanager
    async def _taking_in(self, member: Member) -> AsyncIterator[None]:
        """Fail a member that does not take in, in time, what it is given here."""
        try:
            async with asyncio.timeout(self._patience(member)):
                yield
        except TimeoutError:
            self._fail(member, WorkerLost(f"the worker took nothing in for {self._patience(member):.0f} s"))
        except TandemError as error:
            self._fail(member, error)

    async def next(self, *, stoppable: bool = True, until: float = math.inf) -> tuple[int, Event]:
        """The next event of any rank.

        Args:
            stoppable: whether Ctrl-C ends the waiting.
            until: by ``time.monotonic``, when to stop waiting.

        Raises:
            StopRequested: Ctrl-C came first.
            MemberFailed: a worker has failed, or has said nothing for too long.
            Woken: ``wake`` was called.
            TimeoutError: nothing has come until then.
        """
        if stoppable and self._stop.is_set():  # however fast events come in
            raise StopRequested
        grace = 0.0
        while True:
            if self._mistake is not None:
                raise self._mistake
            if self._woken:
                self._woken = False
                raise Woken
            while self._waiting:
                member, said = self._waiting.popleft()
                self._taken.set()
                if member is not self._everyone.get(member.id):
                    continue
                if isinstance(said, TandemError):
                    self._fail(member, said)
                if member.id in self._order:
                    return self._order.index(member.id), said
            now = time.monotonic()
            silent = self._most_silent()
            ends = min(until, math.inf if silent is None else self._heard[silent.id] + self._patience(silent)) + grace
            if now >= ends and grace:
                if now >= until + grace:
                    raise TimeoutError
                assert silent is not None
                self._fail(silent, WorkerLost(f"the worker said nothing for {self.silence_of(silent):.0f} s"))
            if now >= ends:
                # Once more, and not at once: this program may have been suspended itself, and has heard nobody since.
                grace = SECOND_LOOK_SECONDS if now > ends + SUSPENDED_SECONDS else LAST_LOOK_SECONDS
                continue
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(ends) else ends - now):
                    await self._arrived.wait()
            if stoppable and self._stop.is_set():
                raise StopRequested

    def wake(self) -> None:
        """End the present wait for events, or the next one."""
        self._woken = True
        self._arrived.set()

    def silence(self, index: int) -> float:
        """Seconds since a member was last heard; a worker that runs says something every second."""
        return self.silence_of(self.members[index])

    def silence_of(self, member: Member) -> float:
        """As ``silence``."""
        return time.monotonic() - self._heard[member.id]

    def cancel(self) -> None:
        """Have all ranks drop what has not begun, and end the reduction that they wait in."""
        self._adding.forget()
        for index in self.present:
            self.members[index].link.cancel()

    def _patience(self, member: Member) -> float:
        """How long a worker may say nothing: less where others could go on without it, or it may be cut off."""
        if len(self._everyone) > 1:
            return FROZEN_SECONDS
        return SILENCE_SECONDS if member.here else CUT_OFF_SECONDS

    def _most_silent(self) -> Member | None:
        present = [member for machine, member in self._everyone.items() if machine not in self._gone]
        return min(present, key=lambda member: self._heard[member.id], default=None)

    def _fail(self, member: Member, error: TandemError) -> NoReturn:
        self._gone.add(member.id)
        raise MemberFailed(member, error) from error

    async def _listen(self, member: Member) -> None:
        most = EVENTS_WAITING * max(1, len(self._everyone))
        while True:
            try:
                event: Event | TandemError = await member.link.receive()
            except TandemError as error:
                event = error
            if not isinstance(event, Condition):  # a node that speaks is no sign of life of the worker
                self._heard[member.id] = time.monotonic()
            if isinstance(event, Addend):
                # Not left to who calls ``next``, who may be busy for longer than the ranks wait.
                try:
                    self._adding.take(member.id, event)
                    continue
                except NotAddable as error:
                    event = RingFailed(event.step, str(error))
            self._waiting.append((member, event))
            self._arrived.set()
            if isinstance(event, TandemError):
                return
            while len(self._waiting) >= most:
                self._taken.clear()
                await self._taken.wait()

    def _see_mistake(self, listening: asyncio.Task[None]) -> None:
        if not listening.cancelled() and listening.exception() is not None:
            self._mistake = listening.exception()
            self._arrived.set()

    async def _hear_stop(self) -> None:
        await self._stop.wait()
        self._arrived.set()


async def _close(listening: asyncio.Task[None], link: WorkerLink) -> None:
    await asyncio.gather(listening, return_exceptions=True)
    await link.close()
