from __future__ import annotations

import queue
import socket
import threading
import time

import pytest

from node import wire
from node.channel import BlockingChannel
from node.events import Event, Heartbeat, Restored
from node.spec import CopyState, Request, Stop, Total
from node.worker.inbox import Inbox


class Line(BlockingChannel):
    """A channel that tells when all that was put in has been read. It never ends: its end would end the process."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        super().__init__(ours)
        self._messages: queue.Queue[bytes] = queue.Queue()

    def put(self, generation: int, *requests: Request) -> None:
        for request in requests:
            self._messages.put(wire.encode_request(request, generation))

    def wait_until_read(self) -> None:
        done = threading.Thread(target=self._messages.join, daemon=True)
        done.start()
        done.join(30)
        assert not done.is_alive()

    _taken = False

    def receive(self) -> bytes | None:
        if self._taken:
            self._messages.task_done()
        message = self._messages.get()
        self._taken = True
        return message


@pytest.fixture
def line() -> Line:
    return Line()


def test_requests_come_in_order(line: Line) -> None:
    inbox = Inbox(line)
    line.put(0, CopyState(1), CopyState(2), Stop())
    assert [inbox.next() for _ in range(3)] == [CopyState(1), CopyState(2), Stop()]


def test_a_newer_generation_drops_what_has_not_begun(line: Line) -> None:
    inbox = Inbox(line)
    line.put(0, CopyState(1))
    assert inbox.next() == CopyState(1)
    assert not inbox.superseded()
    line.put(0, CopyState(2), CopyState(3))
    line.put(2, CopyState(4))
    line.put(1, CopyState(5))  # late, of a generation that has ended
    line.put(2, CopyState(6))
    line.wait_until_read()
    assert inbox.superseded()
    assert [inbox.next(), inbox.next()] == [CopyState(4), CopyState(6)]
    assert not inbox.superseded()


def test_events_carry_the_generation_of_the_request_that_has_begun(line: Line) -> None:
    inbox = Inbox(line)
    reader = BlockingChannel(line.peer)

    def sent(event: Event, *generation: int) -> int:
        inbox.send(event, *generation)
        data = reader.receive()
        assert data is not None
        stamp, back = wire.decode_event(data)
        assert back == event
        return stamp

    line.put(3, CopyState(1))
    inbox.next()
    assert sent(Restored(7)) == 3
    line.put(5, CopyState(2))
    line.wait_until_read()
    # What is still said of the older request must not pass for an answer to the newer one.
    assert sent(Restored(7)) == 3
    assert sent(Heartbeat("CopyState", 1, 0), inbox.newest) == 5
    inbox.next()
    assert sent(Restored(8)) == 5
    assert sent(Restored(7), 3) == 3


def soon() -> float:
    return time.monotonic() + 30


def test_totals_overtake_requests(line: Line) -> None:
    inbox = Inbox(line)
    line.put(1, CopyState(1))
    assert inbox.next() == CopyState(1)
    line.put(1, CopyState(2), Total(1, 0, b"abcd"), CopyState(3), Total(1, 1, b"efgh"))
    assert [inbox.total(soon()), inbox.total(soon())] == [Total(1, 0, b"abcd"), Total(1, 1, b"efgh")]
    assert [inbox.next(), inbox.next()] == [CopyState(2), CopyState(3)]


def test_waiting_for_a_total_has_an_end(line: Line) -> None:
    inbox = Inbox(line)
    assert inbox.total(time.monotonic() + 0.01) is None
    assert not inbox.superseded()


def test_a_newer_generation_ends_waiting_for_a_total_and_drops_those_that_came(line: Line) -> None:
    inbox = Inbox(line)
    line.put(1, CopyState(1))
    inbox.next()
    line.put(1, Total(1, 0, b"abcd"))
    line.put(2, CopyState(2))
    line.put(1, Total(1, 1, b"efgh"))  # late
    line.wait_until_read()
    assert inbox.total(soon()) is None
    assert inbox.superseded()
    assert inbox.next() == CopyState(2)
    line.put(2, Total(1, 2, b"ijkl"))
    assert inbox.total(soon()) == Total(1, 2, b"ijkl")


def test_a_newer_generation_wakes_who_waits_for_a_total(line: Line) -> None:
    inbox = Inbox(line)
    found: list[Total | None] = []
    waiting = threading.Thread(target=lambda: found.append(inbox.total(soon())), daemon=True)
    waiting.start()
    line.put(1, CopyState(1))
    waiting.join(20)
    assert found == [None]
