"""The relay, between real sockets and under real rings; strangers get nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from node import relay as module
from node.events import Joined, ReduceEntered, RingFailed
from node.relay import KIND_MEASURE, KIND_ROUTE, MAGIC, PREAMBLE, VERSION, Relay, ReservedPorts, preamble
from node.secure import SecureStream
from node.spec import Rows, Share, TrainStep
from node.trust import Trust
from tests.fixtures.models import tiny_model
from tests.fixtures.ranks import Ranks, ranks, ring_specs
from tests.fixtures.relays import Caller, address, neighbour, refused
from tests.fixtures.training import as_rows, random_batches

ROUNDS, MOST_USES = 30, 60


@pytest.fixture
def trust(tandem_home: Path) -> Trust:
    return Trust(tandem_home)


@pytest.fixture
def relays(trust: Trust) -> Iterator[list[Relay]]:
    found = [Relay("127.0.0.1", trust=trust) for _ in range(3)]
    for relay in found:
        relay.start()
    yield found
    for relay in found:
        relay.stop()
    assert relay_threads() == [], "a stopped relay leaves no threads"


def relay_threads() -> list[threading.Thread]:
    """Other threads are not its own: asyncio has one for each process, which may outlive its loop by a moment."""
    return [thread for thread in threading.enumerate() if thread.name == "relay"]


def route() -> bytes:
    return secrets.token_bytes(16)


def beside(relay: Relay, *, encrypted: bool = True) -> dict[str, Any]:
    """Both neighbours are of the relay's own home."""
    one = neighbour(relay.trust, encrypted=encrypted)
    return {"next": one, "previous": one}


def listening() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(20)
    return server


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_bytes_arrive_at_the_next_rank_in_both_directions(count: int, encrypted: bool, relays: list[Relay]) -> None:
    here, there = relays[:2]
    names = route(), route()
    rings = [listening() for _ in range(count)]
    sides = beside(here, encrypted=encrypted)
    ports = here.open(names[0], [1] * count, names[1], [address(there)] * count, 20, **sides)
    assert len(set(ports)) == count
    ours = [socket.create_connection(("127.0.0.1", port), 10) for port in ports]
    # The peer's end is opened only now: who dials early waits.
    ring_ports = [ring.getsockname()[1] for ring in rings]
    there.open(names[1], ring_ports, names[0], [address(here)] * count, 20, **sides)
    theirs = [ring.accept()[0] for ring in rings]
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        text = secrets.token_bytes(3_000_000)
        sender = threading.Thread(target=one.sendall, args=(text,))
        sender.start()
        other.settimeout(20)
        got = _read(other, len(text))
        sender.join()
        assert got == text
        other.sendall(struct.pack("!I", index))
        one.settimeout(20)
        assert one.recv(4) == struct.pack("!I", index)
    here.close(names[0])
    for other in theirs:
        assert other.recv(1) == b"", "the other end hears of it"
    for connection in (*ours, *theirs, *rings):
        connection.close()


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return bytes(data)


def test_an_end_is_given_once(relays: list[Relay], trust: Trust) -> None:
    there, name = relays[0], route()
    with listening() as ring:
        there.open(name, [ring.getsockname()[1]], route(), [address(relays[1])], 20, **beside(there))
        first = Caller(there, trust, preamble(KIND_ROUTE, name))
        accepted, _ = ring.accept()
        assert refused(there, trust, preamble(KIND_ROUTE, name))
        assert refused(there, trust, preamble(KIND_ROUTE, name, index=7))
        first.stream.send(b"still here")
        assert accepted.recv(20) == b"still here"
        first.close()
        accepted.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
        bytes(PREAMBLE.size),
        preamble(KIND_ROUTE).replace(MAGIC + bytes([VERSION]), MAGIC + bytes([VERSION + 1])),
        preamble(9),
        preamble(KIND_MEASURE),
    ],
    ids=["http", "zeros", "version", "kind", "no measuring here"],
)
def test_garbage_is_closed_without_a_word(data: bytes, relays: list[Relay], trust: Trust) -> None:
    assert refused(relays[0], trust, data)


def test_those_who_say_nothing_give_way_to_others(relays: list[Relay]) -> None:
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", relays[0].port), 20))
            for _ in range(module.MOST_HALF_OPEN + 8)
        ]
        assert [connection.recv(1) for connection in silent[:8]] == [b""] * 8, "the oldest are closed at once"
        silent[-1].settimeout(0.0)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)


@pytest.mark.parametrize("uses", range(6))
def test_no_thread_outlives_it_whatever_it_is_used_for_meanwhile(uses: int, trust: Trust) -> None:
    for _ in range(ROUNDS):
        relay = Relay("127.0.0.1", measured=_hear, trust=trust)
        used = threading.Semaphore(0)
        relay.start()
        with listening() as ring:
            # Taken down here: once it has stopped, nobody can ask for it.
            public = relay.port
            users = [
                threading.Thread(target=carry_to_itself, args=(relay, public, ring.getsockname()[1], used)),
                threading.Thread(target=pester, args=(relay, public, used)),
            ]
            for user in users:
                user.start()
            for _ in range(uses):
                used.acquire(timeout=20)
            relay.stop()
            left = relay_threads()
            for user in users:
                user.join()
        assert left == []


def _hear(stream: SecureStream) -> None:
    stream.recv(1)


def carry_to_itself(relay: Relay, public: int, ring_port: int, used: threading.Semaphore) -> None:
    """Open routes whose next rank is their own, use them, and close every other one, until the relay has stopped."""
    at = f"127.0.0.1:{public}"
    for number in range(MOST_USES):
        name = route()
        try:
            (port,) = relay.open(name, [ring_port], name, [at], 20, **beside(relay))
        except ValueError:
            return
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as ours:
            ours.sendall(b"hello")
            used.release()
            if number % 2:
                relay.close(name)


def pester(relay: Relay, public: int, used: threading.Semaphore) -> None:
    """Connect as strangers and measurers do, until nobody listens any more."""
    words = (b"", b"GET", preamble(KIND_ROUTE, route()), preamble(KIND_MEASURE))
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        for number, word in enumerate(itertools.islice(itertools.cycle(words), MOST_USES)):
            if number % 4 > 1:
                stack.enter_context(Caller(relay, relay.trust, word))
            else:
                stranger = stack.enter_context(socket.create_connection(("127.0.0.1", public), 10))
                stranger.sendall(word)
            used.release()


def test_unknown_routes_are_closed(relays: list[Relay], trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIAL_SECONDS", 0.2)
    assert refused(relays[0], trust, preamble(KIND_ROUTE, route()))


def test_measurements_are_passed_on(trust: Trust) -> None:
    def measured(stream: SecureStream) -> None:
        stream.send(stream.recv(10).upper())

    relay = Relay("127.0.0.1", measured=measured, trust=trust)
    relay.start()
    with Caller(relay, trust, preamble(KIND_MEASURE) + b"hello") as caller:
        assert caller.recv(10) == b"HELLO"
    relay.stop()


def test_reserved_ports_are_not_given_to_others_and_the_same_port_cannot_be_taken_alone() -> None:
    reserved = ReservedPorts(3)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", reserved.ports[0]))
    reserved.release()
    with socket.socket() as other:
        other.bind(("127.0.0.1", reserved.ports[0]))


class Through:
    """Groups of real workers, each behind a relay of its own."""

    def __init__(self, group: Ranks, relays: list[Relay], connections: int = 1, *, encrypted: bool = True) -> None:
        self._group = group
        self._relays = relays[: len(group.workers)]
        self._connections = connections
        self._encrypted = encrypted
        self._names: list[bytes] = []
        self._reserved: list[ReservedPorts] = []

    async def join(self, wait_seconds: float = 30.0) -> None:
        """Form a group, with routes and ports of its own."""
        size = len(self._relays)
        self._names = [route() for _ in range(size)]
        self._reserved = [ReservedPorts(self._connections) for _ in range(size)]
        specs = ring_specs(size, wait_seconds=wait_seconds)
        for rank, (here, reserved) in enumerate(zip(self._relays, self._reserved, strict=True)):
            after = (rank + 1) % size
            addresses = [address(self._relays[after])] * self._connections
            sides = beside(here, encrypted=self._encrypted)
            ports = here.open(self._names[rank], reserved.ports, self._names[after], addresses, 20, **sides)
            specs[rank] = replace(
                specs[rank],
                listen=tuple(f"127.0.0.1:{port}" for port in reserved.ports),
                connect=tuple(f"127.0.0.1:{port}" for port in ports),
            )
        joined = await self._group.join(specs)
        assert all(isinstance(event, Joined) for event in joined), joined

    def close(self) -> None:
        for here, name, reserved in zip(self._relays, self._names, self._reserved, strict=True):
            here.close(name)
            reserved.release()

    def parts(self, step: int) -> list[tuple[Rows, ...]]:
        size = len(self._relays)
        (rows,) = random_batches(1, rows=2 * size, seed=step)
        return [(as_rows(rows[2 * rank : 2 * rank + 2], 2 * rank),) for rank in range(size)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize(("size", "connections", "encrypted"), [(2, 1, True), (3, 2, True), (2, 1, False)])
def test_a_real_ring_through_relays(
    size: int, connections: int, encrypted: bool, model: Path, relays: list[Relay], tmp_path: Path
) -> None:
    async def work() -> None:
        async with ranks(size, tmp_path, model) as group:
            through = Through(group, relays, connections, encrypted=encrypted)
            for step in (1, 2):  # twice: every group has routes and ports of its own
                await through.join()
                done = await group.step(step, through.parts(step))
                assert len({report.loss_sum for report in done}) == 1
                through.close()
            # The routes are closed: what is asked for now has no sum.
            await group.send_step(3, through.parts(3))
            assert {event.step for event in await group.all(RingFailed)} == {3}

    asyncio.run(work())


def test_a_rank_that_is_killed_is_noticed_through_relays_before_any_deadline(
    model: Path, relays: list[Relay], tmp_path: Path
) -> None:
    async def work() -> None:
        async with ranks(3, tmp_path, model) as group:
            through = Through(group, relays)
            await through.join(wait_seconds=1000.0)
            for rank, share in enumerate(through.parts(1)[:2]):
                await group.workers[rank].send(TrainStep(Share(1, share)))
            await group.all(ReduceEntered, among=[0, 1])
            group.workers[2].kill()
            failed = await group.all(RingFailed, among=[0, 1])
            assert {event.step for event in failed} == {1}
            through.close()

    asyncio.run(work())


def test_of_those_who_name_a_route_that_is_not_there_a_few_may_wait(
    relays: list[Relay], trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays[0], "_early", threading.BoundedSemaphore(1))
    name = route()
    with Caller(relays[0], trust, preamble(KIND_ROUTE, name)) as early, listening() as ring:
        while relays[0]._early._value:  # type: ignore[attr-defined]
            threading.Event().wait(0.01)
        assert refused(relays[0], trust, preamble(KIND_ROUTE, route()))
        relays[0].open(name, [ring.getsockname()[1]], route(), [address(relays[1])], 20, **beside(relays[0]))
        accepted, _ = ring.accept()
        accepted.sendall(b"hello")
        assert early.recv(5) == b"hello"
        accepted.close()


class Exhausted(socket.socket):
    """Has no descriptor left for the first who comes."""

    failed = False

    def accept(self) -> tuple[socket.socket, Any]:
        if not self.failed:
            self.failed = True
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_running_out_of_descriptors_does_not_deafen_it(trust: Trust) -> None:
    relay = Relay("127.0.0.1", measured=lambda stream: stream.send(b"here"), trust=trust)
    relay._listener = Exhausted()
    relay._listener.bind(("127.0.0.1", 0))
    relay._listener.listen()
    relay._spawn(relay._accept_public, relay._listener)
    with Caller(relay, trust, preamble(KIND_MEASURE)) as caller:
        assert caller.recv(4) == b"here"
    relay.stop()


def test_a_relay_that_finds_no_thread_for_one_serves_the_next(
    relays: list[Relay], trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = relays[0]
    spawn, left = relay._spawn, []

    def crowded(work: Any, *arguments: object) -> None:
        if not left:
            left.append(work)
            raise RuntimeError("can't start new thread")
        spawn(work, *arguments)

    monkeypatch.setattr(relay, "_spawn", crowded)
    with socket.create_connection(("127.0.0.1", relay.port), 10) as unlucky:
        assert unlucky.recv(1) == b""
    assert not relay._waiting
    with Caller(relay, trust):
        pass
