"""Carry out what ``generations`` decides: ask ranks where they are, move states, form groups, let machines go.

One object for a run. While a generation runs it does nothing but remember what has happened; ``settle`` brings the next
one about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coordinator import generations
from coordinator.copies import Copies, Copy, Kept
from coordinator.crew import Crew, Member, MemberFailed, Woken
from coordinator.generations import Action, Go, Limits, Phase, State
from node import events
from node.errors import NodeError, TandemError, WorkerLost
from node.info import RingPart
from node.spec import CopyState, Digest, Leave


class Excluded(TandemError):
    """A machine that is not to come back to this run."""


class Muster(Protocol):
    """Where workers come from, the first ones and those after them."""

    @property
    def awaited(self) -> str:
        """What happens while nobody is left, for people: the end of a sentence."""

    async def assemble(self) -> Crew:
        """Workers with the model loaded, in the order of their ranks.

        Raises:
            StopRequested: Ctrl-C.
            WorkerLost: the only worker died of it; another one may do better.
            TandemError: there will be none.
        """

    def attend(self, wake: Callable[[], None]) -> None:
        """From now on prepare others beside the training; ``wake`` is called when ``arrivals`` has some."""

    def arrivals(self) -> list[Member]:
        """Workers that became ready since the last time, with the model loaded and nothing trained.

        Raises:
            TandemError: there will be none, and nobody is left.
        """

    def lost(self, member: Member, error: TandemError | None, largest: int) -> None:
        """A worker is gone; its machine may be asked again.

        Args:
            member: whose it was.
            error: why; None where its owner wanted it back.
            largest: input positions of the largest micro-batch that it was asked for lately.
        """

    def order(self, ids: tuple[str, ...]) -> list[str]:
        """These machines as they should stand in the ring."""

    def ring(self, crew: Crew, *, streams: bool) -> list[RingPart]:
        """Each member's part of a new group. Called for crews of at least two.

        Args:
            crew: its ranks, in order.
            streams: whether sums shall go over the streams, as rings hang here.
        """

    def sum_seconds(self, ids: Sequence[str], *, streams: bool) -> float:
        """How long these machines should take for one sum of a gradient, by their links; 0 for a single one.

        Args:
            ids: of them, in any order.
            streams: as in ``ring``.
        """

    async def kept(self) -> list[Kept]:
        """What the machines of this run that can be reached keep of workers that are no more."""

    async def rest(self) -> None:
        """Prepare nobody any more, and let those go who were not taken in."""


@dataclass
class Trouble:
    """What happened between two generations.

    Attributes:
        began: when, by ``time.monotonic``.
        reasons: what happened, for people.
        lost: ids of the machines that were lost.
        came, left: names of machines.
    """

    began: float
    reasons: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    came: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


Take = Callable[[int, events.Event], Awaitable[None]]
Lose = Callable[[MemberFailed], None]
Note = Callable[..., None]
Recover = Callable[[Kept], bool]


class Regroup:
    """The generations of one run.

    Args:
        crew: its workers.
        muster: where more come from.
        copies: states on the disk.
        step, saved: where the run is: the last step recorded, and the newest one on the disk.
        note: tells people.
        recover: takes in the steps before a state that a node keeps; whether the run can go on from it.

    Attributes:
        state: of the decisions.
        trouble: what the next generation comes from.
    """

    def __init__(
        self, crew: Crew, muster: Muster, copies: Copies, step: int, saved: int, note: Note, recover: Recover
    ) -> None:
        self._crew = crew
        self._muster = muster
        self._copies = copies
        self._note = note
        self._recover = recover
        self._limits = Limits(30.0, 30.0, 30.0)
        self._actions: list[Action] = []
        self._went: Go | None = None
        self._grouped: set[str] = set()  # machines whose workers are, or were, in a group
        self._source: Copy | None = None
        self._largest: dict[str, int] = {}
        self._moved_at = time.monotonic()
        self.trouble = Trouble(self._moved_at)
        self.draining = False
        self.state = State(step=step, saved=saved, recruits=tuple(member.id for member in crew.members))

    # --- what happened ----------------------------------------------------------------------------------------------

    def limits(self, limits: Limits, largest: dict[str, int]) -> None:
        """How long phases may take from now on, and the largest micro-batch of each machine lately."""
        self._limits, self._largest = limits, largest

    def happened(self, event: generations.Event) -> None:
        """Decide what follows from an event; ``settle`` carries it out."""
        before = self.state
        self.state, actions = generations.next_state(self.state, event, time.monotonic(), self._limits)
        if isinstance(event, generations.Applied):
            self._moved_at = time.monotonic()
        elif before.phase is Phase.RUNNING and self.state.phase is not Phase.RUNNING:
            self.trouble.began = self._moved_at  # from when nothing has moved on any more
        for action in actions:
            if isinstance(action, generations.Drain):
                self.draining = True
                continue
            if isinstance(action, Go):
                self.draining = False
            self._actions.append(action)

    def lost(self, failed: MemberFailed) -> None:
        """A worker is gone."""
        member = failed.member
        self._blame(member, failed.error)
        self._crew.dismiss(member.id, keep=True)
        self._muster.lost(member, failed.error, self._largest.get(member.id, 0))
        self.happened(generations.Lost(member.id))

    def broke(self, reason: str, *, hang: bool) -> None:
        """The group failed, or somebody is late: all are asked where they are."""
        self.trouble.reasons.append(reason)
        self.happened(generations.Broke(self.state.generation, reason if hang else ""))

    def arrived(self) -> None:
        """Take in who has become ready."""
        for member in self._muster.arrivals():
            if self._crew.find(member.id) is None:
                self._crew.add(member)
                self._grouped.discard(member.id)
                self.trouble.came.append(member.name)
                self.happened(generations.Came(member.id))

    def leaves(self, member: Member) -> None:
        """The owner of a machine wants it back."""
        self.happened(generations.Leaves(member.id))

    @property
    def running(self) -> bool:
        """Whether the present generation trains."""
        return self.state.phase is Phase.RUNNING and not self._actions

    # --- what is done about it --------------------------------------------------------------------------------------

    async def settle(self, take: Take, lose: Lose) -> Go | None:
        """Bring the next generation about; returns when it runs.

        Args:
            take: takes events of the ranks that are none of ours.
            lose: is told of losses; calls ``lost``.

        Returns:
            What it goes on from; None where the present one still runs.

        Raises:
            StopRequested: Ctrl-C.
            TandemError: there is no way to go on.
        """
        if self.state.phase is Phase.EMPTY and not self.state.generation:
            self.state, self._actions = generations.gather(self.state, time.monotonic(), self._limits)
        while True:
            try:
                while self._actions:
                    await self._act(self._actions.pop(0))
                if self._went is not None:
                    went, self._went = self._went, None
                    if went.generation == self.state.generation:
                        self._moved_at = time.monotonic()
                        return went
                if self.state.phase is Phase.RUNNING:
                    return None
                index, event = await self._crew.next(until=self.state.deadline)
                await self._hear(index, event, take)
            except Woken:
                self.arrived()
            except MemberFailed as failed:
                lose(failed)
            except TimeoutError:
                self.happened(generations.Tick())

    async def _look(self) -> None:
        """See whether a machine keeps a newer state than this disk."""
        for kept in sorted(await self._muster.kept(), key=lambda kept: kept.copy.step, reverse=True):
            step = kept.copy.step
            if step <= self.state.saved:
                break
            try:
                async with asyncio.timeout(self._limits.level):
                    await self._copies.take(kept)
            except (TandemError, OSError, TimeoutError) as error:
                why = str(error) or "it took too long"
                self._note("held_unused", f"{kept.holder} holds step {step}, which could not be had: {why}")
                continue
            if self._recover(kept):
                self._note("taken_up", f"{kept.holder} still holds step {step}", step=step, holder=kept.holder)
                self.happened(generations.Saved(step))
                break
        self.happened(generations.Looked(self.state.generation))

    async def _hear(self, index: int, event: events.Event, take: Take) -> None:
        state, machine = self.state, self._crew.members[index].id
        match event:
            case events.Digested(step, sha256) if not sha256:
                self.happened(generations.Holds(machine, state.generation, step))
            case events.Restored(step) if step == state.base:
                self.happened(generations.Levelled(machine, state.generation))
            case events.Joined():
                self.happened(generations.Joined(machine, state.generation))
            case events.RingFailed(_, reason):
                self.happened(generations.Broke(state.generation, f"{self._crew.members[index].name}: {reason}"))
            case events.Copied(step, True) if self._gives(machine, step):
                await take(index, event)
                await self._pass_on(index, event)
            case events.CopyFailed(_, True, reason) if self._gives(machine, state.base):
                await take(index, event)
                self.happened(generations.Unable(state.generation))
            case events.Leaving():
                self.leaves(self._crew.members[index])
            case _:
                await take(index, event)

    def _gives(self, machine: str, step: int) -> bool:
        return self.state.phase is Phase.LEVELLING and self.state.source == machine and self.state.base == step

    async def _act(self, action: Action) -> None:
        named = getattr(action, "generation", self.state.generation)
        if named != self.state.generation:
            return  # overtaken
        match action:
            case generations.Ask(_, ids):
                # Recruits of a moment ago are ranks from here on.
                self._crew.arrange(self.state.ids)
                self._crew.cancel()
                for machine in ids:
                    if machine in self.state.ids:
                        await self._crew.send(self._crew.index(machine), Digest(weights=False))
            case generations.Look():
                await self._look()
            case generations.Bring(_, source, ids, step):
                await self._bring(source, ids, step)
            case generations.Form(_, ids, streams):
                await self._form(ids, streams=streams)
            case Go() if action.generation == self.state.generation:
                if len(self.state.ranks) == 1 and self.state.ids[0] in self._grouped:
                    self._grouped.discard(self.state.ids[0])
                    await self._crew.send(0, Leave())
                self._went = action
            case generations.Keep(_, source):
                await self._crew.send(self._crew.index(source), CopyState(self.state.base))
            case generations.Dismiss(machine, reason):
                self._dismiss(machine, reason)
            case generations.Wait():
                where = f"; everything up to step {self.state.step} is kept" if self.state.step else ""
                line = f"{'; '.join(self.trouble.reasons)}; {self._muster.awaited}{where}"
                self._note("worker_lost", line, "warning", step=self.state.step)
                self.arrived()
            case generations.Fail(reason):
                raise TandemError(reason)

    def _dismiss(self, machine: str, reason: str) -> None:
        member = self._crew.dismiss(machine, keep=bool(reason))
        if member is None:
            return
        error = WorkerLost(reason) if reason else None
        if error is not None:
            self._blame(member, error)
        else:
            self.trouble.left.append(member.name)
        self._muster.lost(member, error, self._largest.get(member.id, 0))

    def _blame(self, member: Member, error: TandemError) -> None:
        why = str(error)
        self.trouble.lost.append(member.id)
        named = not member.name or (isinstance(error, NodeError) and why.startswith(f"{member.name} "))
        self.trouble.reasons.append(why if named else f"{member.name}: {why}")

    async def _bring(self, source: str, ids: tuple[str, ...], step: int) -> None:
        if source != generations.DISK:
            await self._crew.send(self._crew.index(source), CopyState(step))
            return
        copy = self._copies.newest(step)
        if copy is None or copy.step != step:
            raise TandemError(f"the state of step {step} is not on this disk any more; go on with --resume")
        await self._give(copy, ids)

    async def _pass_on(self, index: int, copied: events.Copied) -> None:
        """Give a source's state to who lacks it."""
        link = self._crew.members[index].link
        try:
            async with asyncio.timeout(self._limits.level):
                if not self._crew.members[index].here:
                    copy = await self._copies.fetch(link, copied)
                else:
                    copy = self._copies.here(copied)
        except (TandemError, OSError, TimeoutError) as error:
            self._note("copy_failed", f"the state of step {copied.step} could not be moved: {error}", "warning")
            self.happened(generations.Unable(self.state.generation))
            return
        self.happened(generations.Saved(copied.step))
        lacking = [r.id for r in self.state.ranks if r.step != copied.step and not r.leaves]
        await self._give(copy, tuple(lacking))

    async def _give(self, copy: Copy, ids: tuple[str, ...]) -> None:
        async def one(machine: str) -> None:
            index = self._crew.index(machine)
            async with asyncio.timeout(self._limits.level):
                request = await self._copies.give(self._crew, index, copy)
            await self._crew.send(index, request)

        for machine, outcome in zip(ids, await asyncio.gather(*map(one, ids), return_exceptions=True), strict=True):
            if isinstance(outcome, MemberFailed):
                self.lost(outcome)
            elif isinstance(outcome, TimeoutError):
                member = self._crew.find(machine)
                if member is not None:
                    seconds = f"{self._limits.level:.0f} s"
                    self.lost(MemberFailed(member, WorkerLost(f"it took no state in within {seconds}")))
            elif isinstance(outcome, BaseException):
                raise outcome

    async def _form(self, ids: tuple[str, ...], *, streams: bool) -> None:
        crew = self._crew
        crew.arrange(self._muster.order(ids))
        self._grouped.update(ids)
        parts = self._muster.ring(crew, streams=streams)
        outcomes = await asyncio.gather(
            *(crew.form(index, part) for index, part in enumerate(parts)), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, MemberFailed):
                self.lost(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
