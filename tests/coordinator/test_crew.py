"""How long a crew bears silence."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from coordinator import crew
from coordinator.crew import Crew, Member, MemberFailed
from tests.coordinator.test_engine import FakeWorker, as_said
from tests.coordinator.test_engine_fleet import READY


def test_whom_nobody_probed_is_judged_by_its_first_steps_but_the_very_first(tmp_path: Path) -> None:
    member = Member("id", "ada", FakeWorker(tmp_path, as_said, {}), READY, here=True)
    for seconds in (9.0, *[0.1] * (crew.STEPS_TO_JUDGE - 2)):
        member.worked(1000, seconds)
        assert member.pace is None
    member.worked(0, 0.0)  # an empty share teaches nothing
    assert member.pace is None
    member.worked(1000, 0.1)
    assert member.pace is not None
    assert member.pace.predict(2000) == pytest.approx(0.2)


@pytest.mark.parametrize("here", [False, True])
def test_the_only_worker_is_missed_soon_where_it_may_be_cut_off(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "CUT_OFF_SECONDS", 0.1)

    async def listen() -> None:
        member = Member("id", "ada", FakeWorker(tmp_path, as_said, {}), READY, here=here)
        alone = Crew([member], asyncio.Event())
        try:
            await alone.next(until=time.monotonic() + 1.0)
        finally:
            await alone.close()

    with pytest.raises(TimeoutError if here else MemberFailed):
        asyncio.run(listen())
