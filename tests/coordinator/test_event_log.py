"""A run's events for many readers: all of them, in order, in whatever thread or loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from coordinator import event_log
from coordinator.callbacks import Callbacks, call_back
from coordinator.event_log import EventLog
from coordinator.stream import MISSED, Noted, RunEvent


def note(number: int) -> Noted:
    return Noted("number", str(number))


def numbers(events: list[RunEvent]) -> list[int]:
    return [int(event.message) for event in events if isinstance(event, Noted)]


def test_every_reader_gets_everything_from_the_beginning() -> None:
    log, found = EventLog(), [list[RunEvent](), list[RunEvent]()]
    log.handle(note(0))
    readers = [threading.Thread(target=lambda into=into: into.extend(log)) for into in found]  # type: ignore[misc]
    for reader in readers:
        reader.start()
    for number in range(1, 500):
        log.handle(note(number))
    log.close()
    for reader in readers:
        reader.join(30)
    assert [numbers(events) for events in found] == [list(range(500))] * 2
    assert numbers(list(log)) == list(range(500))


def test_a_reader_in_an_event_loop_is_woken_from_another_thread() -> None:
    log = EventLog()

    async def read() -> list[RunEvent]:
        writer: threading.Thread | None = None
        found = []
        async for event in log:
            found.append(event)
            if writer is None:
                writer = threading.Thread(target=write)
                writer.start()
        return found

    def write() -> None:
        for number in range(1, 100):
            log.handle(note(number))
        log.close()

    log.handle(note(0))
    assert numbers(asyncio.run(read())) == list(range(100))
    log.handle(note(100))  # its loop is closed: nobody is told, nothing fails


def test_a_reader_that_leaves_early_is_forgotten() -> None:
    log = EventLog()

    async def read_one() -> None:
        events = aiter(log)
        await anext(events)
        assert len(log._listeners) == 1
        await events.aclose()  # type: ignore[attr-defined]

    log.handle(note(0))
    asyncio.run(read_one())
    assert not log._listeners


def test_a_long_run_keeps_its_last_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT_EVENTS", 10)
    log = EventLog()
    for number in range(95):
        log.handle(note(number))
    log.close()
    gap, *told = log
    kept = numbers(told)
    assert kept == list(range(95 - len(kept), 95))
    assert 10 <= len(kept) < 20
    assert isinstance(gap, Noted)
    assert (gap.kind, gap.details) == (MISSED, {"events": 95 - len(kept)})


def test_who_reads_too_slowly_is_told_how_many_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "KEPT_EVENTS", 10)
    log = EventLog()

    def slowly() -> Iterator[RunEvent]:
        for event in log:
            if isinstance(event, Noted) and event.message == "0":
                for number in range(1, 36):
                    log.handle(note(number))
                log.close()
            yield event

    async def slowly_in_a_loop() -> list[RunEvent]:
        return [event async for event in log]

    log.handle(note(0))
    told: list[RunEvent] = []
    with pytest.warns(RuntimeWarning, match="callbacks: 19 events before the next are lost"):
        call_back(slowly(), [Callbacks(on_event=told.append)], pytest.fail)
    first, gap, *rest = told
    assert numbers([first, *rest]) == [0, *range(20, 36)]
    assert isinstance(gap, Noted)
    assert (gap.kind, gap.level, gap.details) == (MISSED, "warning", {"events": 19})
    assert numbers(asyncio.run(slowly_in_a_loop())[1:]) == list(range(20, 36)), "who comes late is told, too"
