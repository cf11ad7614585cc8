"""This machine alone, until other machines come that make a step shorter: from then on a fleet.

Its worker is a process of our own, as with ``--nodes local``, and stays the same one: until somebody comes there is no
node service here, no relay, no group, and nothing is measured. Then both are hosted, and the worker becomes a rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable

from coordinator.alone import HERE, Alone
from coordinator.crew import Crew, Member
from coordinator.discovery import Selection
from coordinator.fleet import Ahead, Fleet, Wanted, _Node, _own_node, own_name
from coordinator.planner import Plan
from coordinator.shares import halved
from coordinator.stream import Noted, Reader
from node.errors import NodeError, OutOfMemory, TandemError
from node.ring_end import RingWorker


class Growing(Fleet):
    """Brings one worker of this machine, another when it dies, and others that come; see ``regroup.Muster``.

    Args:
        wanted: what the fleet is for.
        alone: brings the workers of this machine, each of them a ``RingWorker``.
        reader: takes what happens.
        stop: set by Ctrl-C.
    """

    awaited = Alone.awaited

    def __init__(self, wanted: Wanted, alone: Alone, reader: Reader, stop: asyncio.Event) -> None:
        super().__init__(Ahead(wanted.config, wanted.model, wanted.job.job), Selection((), (), 0.0), reader, stop)
        self.want(wanted)
        if self.gradient_dtype == "auto":
            self.gradient_dtype = "fp32"  # a run that begins here alone knows no network to save on
        self._alone = alone
        self._worker: Member | None = None
        self._own: _Node | None = None
        """This machine as others see it, from when somebody wants to join."""
        self._hosting = asyncio.Lock()
        self._chosen: Plan | None = None

    async def assemble(self) -> Crew:
        """See ``regroup.Muster``."""
        crew = await self._alone.assemble()
        (self._worker,) = crew.members
        # What it does before others come is told as its part of the run, too.
        self._worker.called = own_name()
        return crew

    # --- who comes --------------------------------------------------------------------------------------------------

    def attend(self, wake: Callable[[], None]) -> None:
        """See ``regroup.Muster``."""
        self._alone.attend(wake)
        super().attend(wake)

    def _check_worth(self, node: _Node) -> None:
        """See ``Fleet``; who comes is compared with this machine, which its first steps have to measure."""
        if self._worker is None or self._worker.pace is None:
            raise NodeError("the pace of this machine is not known yet")
        super()._check_worth(node)

    async def _be_ready_for(self, node: _Node) -> None:
        """Host what a group needs of this machine."""
        worker = self._worker
        assert worker is not None, "somebody has trained here, or nobody would be wanted"
        async with self._hosting:
            if self._daemon is None:
                await self._host({node.info.name}, takes_jobs=False)
            if self._model is None:
                await self._read_the_model()
            if self._own is None:
                assert self._daemon is not None
                info = dataclasses.replace(self._daemon.info(), id=HERE)
                self._own = _own_node(self._daemon, info)
                self._own.ready = worker.ready
                if (limit := self._wanted.steps.token_limit) is not None:
                    self._limits[HERE] = limit
                self._nodes.append(self._own)
            self._adopt(worker)

    def _adopt(self, worker: Member) -> None:
        """Make this machine's worker one that can be a rank."""
        assert self._own is not None
        assert self._daemon is not None
        assert isinstance(worker.link, RingWorker)
        worker.link.relay = self._daemon.relay
        worker.token_limit = self._token_limit(self._own)
        self._own.member = worker

    async def _weigh(self, node: _Node) -> Plan | None:
        """See ``Fleet``."""
        self._chosen = await super()._weigh(node)
        return self._chosen

    def arrivals(self) -> list[Member]:
        """See ``regroup.Muster``."""
        others = super().arrivals()
        if others and self._own is not None:
            if self._worker is not None:
                self._worker.name = self._own.info.name
            if self.plan is None and self._chosen is not None:
                self.plan = self._chosen
                with contextlib.suppress(KeyError):  # one of them has gone meanwhile
                    self._tell_plan(self.plan)
        return [*self._own_arrivals(bool(others) or self._has_others), *others]

    @property
    def _has_others(self) -> bool:
        return any(node is not self._own for node in self._nodes)

    def _own_arrivals(self, has_others: bool) -> list[Member]:
        try:
            arrived = self._alone.arrivals()
        except TandemError as error:
            if not has_others:
                raise
            self._reader.handle(Noted("left_out", f"this machine trains no more: {error}", "warning"))
            return []
        for worker in arrived:
            if self._worker is not None:
                worker.name, worker.called, worker.pace = self._worker.name, self._worker.called, self._worker.pace
            self._worker = worker
            if self._own is not None:
                self._adopt(worker)
        return arrived

    # --- who goes ---------------------------------------------------------------------------------------------------

    def lost(self, member: Member, error: TandemError | None, largest: int) -> None:
        """See ``regroup.Muster``."""
        if member.id != HERE:
            super().lost(member, error, largest)
            return
        if isinstance(error, OutOfMemory) and self._own is not None:
            limit = halved(member.token_limit or largest, self._wanted.train.longest)
            if limit is None and self._has_others:
                self._nodes.remove(self._own)
                line = "this machine trains no more: it has too little memory"
                self._reader.handle(Noted("left_out", line, "warning"))
                return
            if limit is not None:
                self._limits[HERE] = limit
        self._alone.lost(member, error, largest)

    async def rest(self) -> None:
        """See ``regroup.Muster``."""
        await self._alone.rest()
        await super().rest()
