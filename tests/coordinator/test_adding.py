"""Sums that go through the coordinator: the same whatever comes first, and nothing that does not belong."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from coordinator.adding import NotAddable, StreamSums
from coordinator.crew import Crew, Member
from node.bf16 import rounded
from node.errors import TandemError, WorkerLost
from node.events import Addend, Event, Heartbeat, Ready, RingFailed
from node.info import Backend, RingPart
from node.spec import PIECE_BYTES, PIECES_IN_FLIGHT, FileRef, Request, Total

READY = Ready("cpu", "llama", 2, 2, 10, 1, False, 0.0, 0)


def floats(*numbers: float) -> bytes:
    return np.array(numbers, "<f4").tobytes()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_order_of_arrival_does_not_matter(size: int) -> None:
    count = 2 * PIECES_IN_FLIGHT
    numbers = np.random.default_rng(size).normal(size=(size, count, 50)).astype(np.float32)
    expected = numbers[0].copy()
    for rank in range(1, size):
        expected += numbers[rank]
    for seed in range(20):
        draw = random.Random(seed)
        sums, sent, totals = StreamSums(size), [0] * size, []
        while min(sent) < count:
            # As ranks do: none is further ahead than the totals let it.
            able = [rank for rank in range(size) if sent[rank] < min(count, min(sent) + PIECES_IN_FLIGHT)]
            rank = draw.choice(able)
            total = sums.add(rank, Addend(1, sent[rank], numbers[rank, sent[rank]].tobytes()))
            sent[rank] += 1
            if total is not None:
                totals.append(total)
        assert totals == [piece.tobytes() for piece in expected]


def test_what_is_not_finite_is_added_like_all_else() -> None:
    sums = StreamSums(2)
    assert sums.add(0, Addend(1, 0, floats(3e38, np.inf, np.nan))) is None
    total = sums.add(1, Addend(1, 0, floats(3e38, -np.inf, 1)))
    assert total is not None
    assert str(np.frombuffer(total, "<f4").tolist()) == "[inf, nan, nan]"


@pytest.mark.parametrize(
    ("addend", "says"),
    [
        (Addend(3, 0, floats(1)), "rank 1 gave piece 0 of step 3 where 1 was due"),
        (Addend(3, 2, floats(1)), "rank 1 gave piece 2 of step 3 where 1 was due"),
        (Addend(3, 1, floats(1)), "rank 1 gave 4 bytes of step 3 for piece 1, others 8 bytes of step 3"),
        (Addend(4, 1, floats(1, 2)), "rank 1 gave 8 bytes of step 4 for piece 1, others 8 bytes of step 3"),
        (Addend(3, 1, b""), "rank 1 gave a piece of 0 bytes"),
        (Addend(3, 1, b"abc"), "rank 1 gave a piece of 3 bytes"),
        (Addend(3, 1, bytes(PIECE_BYTES + 4)), f"rank 1 gave a piece of {PIECE_BYTES + 4} bytes"),
    ],
)
def test_what_does_not_belong_is_refused_and_changes_nothing(addend: Addend, says: str) -> None:
    sums = StreamSums(2)
    sums.add(0, Addend(3, 0, floats(1)))
    sums.add(1, Addend(3, 0, floats(2)))
    sums.add(0, Addend(3, 1, floats(1, 2)))
    with pytest.raises(NotAddable, match=says):
        sums.add(1, addend)
    assert sums.add(1, Addend(3, 1, floats(5, 6))) == floats(6, 8)


def halves(*numbers: float) -> bytes:
    return rounded(np.array(numbers, np.float32)).astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("addend", "says"),
    [
        (Addend(2, 1, halves(1, 2), 0, bf16=True), "rank 1 gave piece 0 of a gradient of which 1 are known"),
        (Addend(2, 1, halves(1, 2), -1, bf16=True), "rank 1 gave piece -1 of a gradient of which 1 are known"),
        (
            Addend(2, 1, halves(1, 2), 2 + PIECES_IN_FLIGHT, bf16=True),
            f"rank 1 gave piece {2 + PIECES_IN_FLIGHT} of a gradient of which 1 are known",
        ),
        (Addend(2, 1, halves(1, 2, 3), 1, bf16=True), "rank 1 gave 6 bytes for 2 numbers of a gradient"),
        (Addend(2, 1, floats(1), 1), "rank 1 gave 4 bytes for 2 numbers of a gradient"),
        (Addend(2, 1, b"abc", 1, bf16=True), "rank 1 gave a piece of 3 bytes"),
        (Addend(2, 1, halves(1, 2), 2, bf16=True), "rank 1 gave another part of the gradient for piece 1 than others"),
        (Addend(2, 1, floats(1), 0), "rank 1 gave another part of the gradient for piece 1 than others"),
    ],
)
def test_parts_of_gradients_stand_where_they_stood(addend: Addend, says: str) -> None:
    sums = StreamSums(2)
    for rank in range(2):
        total = sums.add(rank, Addend(1, 0, halves(1, 2), 1, bf16=True))
    assert total == halves(2, 4)
    sums.add(0, Addend(2, 1, halves(3, 1), 1, bf16=True))
    with pytest.raises(NotAddable, match=says):
        sums.add(1, addend)
    assert sums.add(1, Addend(2, 1, halves(1, 2), 1, bf16=True)) == halves(4, 3)


def test_what_rounding_a_total_keeps_back_is_paid_with_the_next_or_when_it_is_settled() -> None:
    sums = StreamSums(2)

    def total(index: int, one: bytes, other: bytes, *, bf16: bool = True) -> bytes | None:
        sums.add(0, Addend(1, index, one, 1, bf16))
        return sums.add(1, Addend(1, index, other, 1, bf16))

    # Of numbers between 2 and 4 bf16 holds every 64th part.
    one, other = halves(1), halves(1 + 2**-7)
    assert [total(index, one, other) for index in range(2)] == [halves(2), halves(2 + 2**-6)]
    assert total(2, one, other) == halves(2)
    assert total(3, floats(1), floats(1), bf16=False) == floats(2 + 2**-7)
    assert total(4, floats(1), floats(1), bf16=False) == floats(2)


def test_memory_is_bounded() -> None:
    sums = StreamSums(2)
    for index in range(PIECES_IN_FLIGHT):
        sums.add(0, Addend(1, index, floats(1)))
    with pytest.raises(NotAddable, match=f"rank 0 gave piece {PIECES_IN_FLIGHT} before others gave piece 0"):
        sums.add(0, Addend(1, PIECES_IN_FLIGHT, floats(1)))


class Link:
    """A worker that says what it is told to say."""

    def __init__(self) -> None:
        self.generation = 0
        self.got: list[tuple[int, Request]] = []
        self.takes_in = asyncio.Event()
        self.takes_in.set()
        self.gone = False
        self._said: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self.closed = False

    def say(self, *said: Event) -> None:
        self._said.extend(said)
        self._arrived.set()

    async def receive(self) -> Event:
        while not self._said:
            self._arrived.clear()
            await self._arrived.wait()
        return self._said.popleft()

    async def send(self, request: Request) -> None:
        if self.gone:
            raise WorkerLost("gone")
        entry = self.generation, request
        await self.takes_in.wait()
        self.got.append(entry)

    async def form_ring(self, part: RingPart) -> None:
        self.part = part

    def cancel(self) -> None:
        self.generation += 1

    async def give(self, ref: FileRef, source: Path) -> None:
        raise AssertionError

    async def fetch(self, ref: FileRef, target: Path) -> None:
        raise AssertionError

    async def close(self) -> None:
        self.closed = True


async def form(crew: Crew, backend: Backend = "grpc") -> None:
    crew.cancel()
    size = len(crew)
    for index in range(size):
        # Ranks need not be numbered as members are.
        await crew.form(index, RingPart(size - 1 - index, size, backend, b"", b"", (), 1, 1.0, 1.0))


async def settled() -> None:
    """All that can go on without us has."""
    for _ in range(50):
        await asyncio.sleep(0)


def with_crew(work: Callable[[Crew, list[Link]], Awaitable[None]], size: int = 3) -> None:
    async def run() -> None:
        links = [Link() for _ in range(size)]
        crew = Crew([Member(str(index), str(index), link, READY) for index, link in enumerate(links)], asyncio.Event())
        try:
            async with asyncio.timeout(30):
                await work(crew, links)
        finally:
            await crew.close()
        assert all(link.closed for link in links)

    asyncio.run(run())


def test_all_get_the_total_though_nobody_calls_next() -> None:
    async def work(crew: Crew, links: list[Link]) -> None:
        await form(crew)
        for index, link in enumerate(links):
            assert not links[0].got
            link.say(Addend(1, 0, floats(index, 1)))
            await settled()
        assert [link.got for link in links] == [[(1, Total(1, 0, floats(3, 3)))]] * 3
        # They are no business of who listens to the crew.
        links[1].say(Addend(1, 1, floats(1)), Heartbeat("waiting", 1, 0))
        assert await crew.next() == (1, Heartbeat("waiting", 1, 0))

    with_crew(work)


def test_who_takes_nothing_in_or_is_gone_does_not_hold_up_the_others() -> None:
    async def work(crew: Crew, links: list[Link]) -> None:
        await form(crew)
        links[0].takes_in.clear()
        links[1].gone = True
        for index in range(3):
            for link in links:
                link.say(Addend(1, index, floats(1)))
        await settled()
        assert [request for _, request in links[2].got] == [Total(1, index, floats(3)) for index in range(3)]
        assert not links[0].got
        links[0].takes_in.set()
        await settled()
        assert links[0].got == links[2].got

    with_crew(work)


def test_a_group_that_is_over_gets_nothing_more() -> None:
    async def work(crew: Crew, links: list[Link]) -> None:
        await form(crew)
        links[0].takes_in.clear()
        for index in range(2):
            for link in links:
                link.say(Addend(1, index, floats(1)))
        links[0].say(Addend(1, 2, floats(1)))
        await settled()
        crew.cancel()
        links[0].takes_in.set()
        await settled()
        assert links[0].got == [(1, Total(1, 0, floats(3)))], "what was half sent, as of the group before"
        links[1].say(Addend(1, 2, floats(1)))  # of no group
        await settled()
        await form(crew)
        for link in links:
            link.say(Addend(1, 0, floats(2)))
        await settled()
        assert {link.got[-1] for link in links} == {(3, Total(1, 0, floats(6)))}

    with_crew(work)


def test_a_piece_that_does_not_belong_is_a_failure_of_the_group() -> None:
    async def work(crew: Crew, links: list[Link]) -> None:
        await form(crew)
        links[1].say(Addend(4, 7, floats(1)))
        index, event = await crew.next()
        assert index == 1
        assert event == RingFailed(4, "rank 1 gave piece 7 of step 4 where 0 was due")

    with_crew(work)


def test_a_ring_is_no_business_of_the_coordinator() -> None:
    async def work(crew: Crew, links: list[Link]) -> None:
        await form(crew, "ring")
        for link in links:
            link.say(Addend(1, 0, floats(1)))
        await settled()
        assert not any(link.got for link in links)

    with_crew(work)


def test_closing_does_not_wait_for_ever_and_breaks_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.adding.CLOSING_SECONDS", 0.05)

    async def work(crew: Crew, links: list[Link]) -> None:
        await form(crew)
        links[0].takes_in.clear()
        for link in links:
            link.say(Addend(1, 0, floats(1)))
        await settled()

    with_crew(work)


def test_refusals_are_errors_of_ours() -> None:
    assert issubclass(NotAddable, TandemError)
