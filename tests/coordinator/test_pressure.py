"""What a machine's condition does to its share, and what people are told of it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import numpy as np
import pytest

from coordinator import crew as module
from coordinator.crew import Crew, Member, MemberFailed
from coordinator.division import divide
from coordinator.pace import Pace, Speed
from coordinator.pressure import says, share_factor, slowed
from node.errors import WorkerLost
from node.events import Condition, Event, Heartbeat, Ready

READY = Ready("cpu", "llama", 2, 2, 10, 1, False, 0.0, 0)
GOOD = Condition("normal", "nominal", "no")


@pytest.mark.parametrize(
    ("condition", "factor"),
    [
        (Condition(), 1.0),
        (GOOD, 1.0),
        (Condition("normal", "nominal", "yes"), 1.0),
        (Condition("warn"), 0.75),
        (Condition("critical"), 0.4),
        (Condition("normal", "fair"), 0.9),
        (Condition("normal", "serious"), 0.75),
        (Condition("normal", "critical"), 0.5),
        (Condition("warn", "critical"), 0.5),
        (Condition("critical", "fair"), 0.4),
    ],
)
def test_the_worse_of_memory_and_heat_decides(condition: Condition, factor: float) -> None:
    assert share_factor(condition) == factor


def test_a_machine_under_pressure_gets_fewer_rows_and_learns_as_before() -> None:
    pace = Pace(Speed(0.0, 1e-3), 1.2, (1.1, 1.2))
    assert slowed(pace, 1.0) is pace
    less = slowed(pace, 0.5)
    assert less.predict(100) == pytest.approx(2 * pace.predict(100))
    assert less.recent == pace.recent
    lengths = np.full(14, 64, np.int32)
    even = divide(lengths, None, [pace.now, pace.now])
    lowered = divide(lengths, None, [slowed(pace, 0.4).now, pace.now])
    assert [len(own) for own in even] == [7, 7]
    assert [len(own) for own in lowered] == [4, 10], "0.4 to 1"


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (None, Condition(), None),
        (None, GOOD, None),
        (GOOD, GOOD, None),
        (GOOD, Condition(), None),
        (GOOD, Condition("warn", "nominal", "no"), "Air: memory pressure is yellow; its share is lowered to 75 %"),
        (None, Condition("critical"), "Air: memory pressure is red; its share is lowered to 40 %"),
        (Condition("critical"), Condition("warn"), "Air: memory pressure is yellow; its share is raised to 75 %"),
        (Condition("warn"), GOOD, "Air: memory pressure is no longer yellow; its share is no longer lowered"),
        (GOOD, Condition("normal", "serious", "no"), "Air: it is hot; its share is lowered to 75 %"),
        (Condition("warn"), Condition("warn", "serious"), "Air: it is hot"),
        (Condition("normal", "critical"), GOOD, "Air: it is no longer very hot; its share is no longer lowered"),
        (GOOD, Condition("normal", "nominal", "yes"), "Air: it runs on battery power"),
        (Condition("normal", "nominal", "yes"), GOOD, "Air: it runs on mains power again"),
        (
            GOOD,
            Condition("warn", "critical", "yes"),
            "Air: memory pressure is yellow, it is very hot, it runs on battery power; its share is lowered to 50 %",
        ),
    ],
)
def test_people_are_told_what_changed(before: Condition | None, now: Condition, line: str | None) -> None:
    assert says("Air", now, before) == line


def test_a_member_is_told_of_once() -> None:
    member = Member("ben", "Air", Says([]), READY)
    assert member.condition_factor == 1.0
    assert member.is_now(Condition("warn")) == "Air: memory pressure is yellow; its share is lowered to 75 %"
    assert member.is_now(Condition("warn")) is None
    assert member.condition_factor == 0.75
    assert member.is_now(GOOD) is not None
    assert member.condition_factor == 1.0


class Says:
    """A link whose worker says these things, one every hundredth of a second, and then nothing."""

    def __init__(self, said: list[Event]) -> None:
        self.said = deque(said)

    async def receive(self) -> Event:
        await asyncio.sleep(0.01)
        if not self.said:
            await asyncio.Event().wait()
        return self.said.popleft()

    async def close(self) -> None:
        self.said.clear()

    def cancel(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def test_a_node_that_speaks_is_no_sign_of_life_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(module, "SECOND_LOOK_SECONDS", 0.05)
    told: list[str] = []

    async def listen() -> None:
        links = [Says([GOOD, Condition("warn")] * 50), Says([Heartbeat("waiting", 0, 1)] * 500)]
        crew = Crew(
            [Member(name, name, link, READY) for name, link in zip(("Air", "Studio"), links, strict=True)],
            asyncio.Event(),
        )
        try:
            while True:
                index, event = await crew.next()
                told.append(f"{crew.members[index].name} {type(event).__name__}")
        finally:
            await crew.close()

    async def limited() -> None:
        async with asyncio.timeout(20):
            await listen()

    with pytest.raises(MemberFailed) as caught:
        asyncio.run(limited())
    assert caught.value.member.name == "Air"
    assert isinstance(caught.value.error, WorkerLost)
    assert told.count("Air Condition") > 5
