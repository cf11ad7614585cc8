"""Machines that come while a run is under way: those that were lost and are back, and new ones.

Who was lost is asked again soon, then less and less often. Now and then it is looked around for others. All of it
happens beside the training.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator.discovery import SeenNode, Wanted, look
from node.errors import TandemError

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0
# Who is lost again so soon after it came back is asked less and less often: taking it in holds up all others.
SETTLED_SECONDS = 30.0
LONGEST_PAUSE_AGAIN_SECONDS = 60.0
LOOK_EVERY_SECONDS = 10.0


class NotWorth(TandemError):
    """A machine that would make a step longer; it may be otherwise when others are lost."""


@dataclass
class _Absent:
    """A machine that is to be asked again."""

    seen: SeenNode
    at: float
    pause: float = FIRST_PAUSE_SECONDS


class Recruiter:
    """Looks for machines and has them prepared, in a task of its own.

    Args:
        wanted: ``--nodes``, taken apart: whom the run may ask.
        prepare: makes a machine ready, or raises.
        wake: called when one is.
        taking_part: ids of those that need not be asked.
        passed_over: ids of those that were left out at the beginning; they are asked when somebody is lost.
    """

    def __init__(
        self,
        wanted: Wanted,
        prepare: Callable[[SeenNode], Awaitable[None]],
        wake: Callable[[], None],
        *,
        taking_part: Callable[[], set[str]],
        passed_over: set[str],
    ) -> None:
        self._wanted = wanted
        self._prepare = prepare
        self._wake = wake
        self._taking_part = taking_part
        self._passed_over = set(passed_over)
        self._excluded: set[str] = set()
        self._absent: dict[str, _Absent] = {}
        self._came: dict[str, _Absent] = {}  # who came back, and from when on it was there
        self._trying: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._look_at = time.monotonic() + LOOK_EVERY_SECONDS

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; whoever is being prepared is let go."""
        if self._task is None:
            return
        tasks = [self._task, *self._trying.values()]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def lost(self, seen: SeenNode, *, for_good: bool) -> None:
        """A machine is gone; unless for good, it is asked again. Those that were passed over may be worth it now."""
        if for_good:
            self._excluded.add(seen.id)
        else:
            now, pause = time.monotonic(), FIRST_PAUSE_SECONDS
            came = self._came.pop(seen.id, None)
            if came is not None and now - came.at < SETTLED_SECONDS:
                pause = min(2 * came.pause, LONGEST_PAUSE_AGAIN_SECONDS)
            self._absent[seen.id] = _Absent(seen, now + pause, pause)
        self._passed_over.clear()
        self._changed.set()

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            idle = [absent for machine, absent in self._absent.items() if machine not in self._trying]
            for absent in idle:
                if absent.at <= now:
                    self._trying[absent.seen.id] = asyncio.create_task(self._try(absent))
            if self._look_at <= now:
                await self._look_around()
                self._look_at = time.monotonic() + LOOK_EVERY_SECONDS
                continue
            until = min([self._look_at, *(absent.at for absent in idle if absent.at > now)])
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - now):
                    await self._changed.wait()

    async def _try(self, absent: _Absent) -> None:
        machine = absent.seen.id
        try:
            if machine not in self._taking_part():
                await self._prepare(absent.seen)
                self._came[machine] = _Absent(absent.seen, time.monotonic(), absent.pause)
                self._wake()
            self._forget(absent)
        except NotWorth:
            self._forget(absent)
            self._passed_over.add(machine)
        except (TandemError, OSError):
            # It is away, busy, or not ready yet: that it is missing was said when it was lost.
            absent.pause = max(absent.pause, min(2 * absent.pause, LONGEST_PAUSE_SECONDS))
            absent.at = time.monotonic() + absent.pause
        finally:
            self._trying.pop(machine, None)
            self._changed.set()

    def _forget(self, absent: _Absent) -> None:
        """Ask it no more, unless it was lost again meanwhile."""
        if self._absent.get(absent.seen.id) is absent:
            del self._absent[absent.seen.id]

    async def _look_around(self) -> None:
        """Note whom the run may ask and has not; addresses may have changed since."""
        found = await look(self._wanted)
        for seen in found.nodes:
            known = self._absent.get(seen.id)
            if seen.problem or seen.info is None or seen.id in self._excluded | self._passed_over:
                continue
            if seen.own and known is None:
                continue  # whether this machine takes part was decided at the beginning
            if known is not None:
                if known.seen.address != seen.address:
                    self._absent[seen.id] = _Absent(seen, time.monotonic())
            elif seen.id not in self._taking_part() and self._may_ask(seen):
                self._absent[seen.id] = _Absent(seen, time.monotonic())

    def _may_ask(self, seen: SeenNode) -> bool:
        wanted = self._wanted
        named = {seen.name, seen.label, seen.id} & set(wanted.names)
        return wanted.auto or bool(named) or bool(set(seen.by_hand.split()) & set(wanted.addresses))
