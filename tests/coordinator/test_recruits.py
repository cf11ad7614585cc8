from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from coordinator import recruits
from coordinator.discovery import SeenNode, parse_wanted
from coordinator.recruits import Recruiter

BEN = SeenNode("ben", "b", "home", "127.0.0.1:1", None, "")


def _times(count: int) -> list[float]:
    """When a machine is prepared that is lost each time as soon as it takes part."""
    times: list[float] = []

    async def go() -> None:
        woken = asyncio.Event()

        async def prepare(_: SeenNode) -> None:
            times.append(time.monotonic())

        wanted = parse_wanted(BEN.address)
        recruiter = Recruiter(wanted, prepare, woken.set, taking_part=set, passed_over=set())
        recruiter.start()
        try:
            while len(times) < count:
                recruiter.lost(BEN, for_good=False)
                async with asyncio.timeout(20):  # far more than it should take
                    await woken.wait()
                woken.clear()
        finally:
            await recruiter.stop()

    asyncio.run(go())
    return times


def test_who_is_lost_again_and_again_is_taken_back_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recruits, "FIRST_PAUSE_SECONDS", 0.02)
    times = _times(5)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(pause >= 0.02 * 2**number for number, pause in enumerate(pauses, 1)), pauses


def test_who_had_settled_in_is_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recruits, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(recruits, "LONGEST_PAUSE_AGAIN_SECONDS", 100.0)
    monkeypatch.setattr(recruits, "FIRST_PAUSE_SECONDS", 0.02)
    times = _times(8)
    assert times[-1] - times[0] < 0.02 * 2**7
