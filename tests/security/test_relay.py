"""Whom the relay lets in, and what becomes of everybody else: the ring itself never gets a byte of theirs."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from node import halfopen
from node import relay as module
from node.errors import NodeError
from node.identity import credentials
from node.peers import Peers, fingerprint
from node.relay import KIND_MEASURE, KIND_ROUTE, PREAMBLE, Relay, preamble
from node.secure import SecureStream
from node.trust import Trust
from tests.fixtures.pairs import pair
from tests.fixtures.relays import Caller, address, neighbour, refused

SECONDS = 20.0
MESSAGES = 10_000
"""Of each of three kinds."""
ROUTE = b"the ring's route"
FLOOD = 1000
BROKEN = (ssl.SSLError, ConnectionError)


@pytest.fixture
def previous(tmp_path: Path) -> Trust:
    """The machine of the previous rank, with which the relay's is paired."""
    pair(tmp_path / "ours", tmp_path / "previous")
    return Trust(tmp_path / "previous")


@pytest.fixture
def stranger(tmp_path: Path, previous: Trust) -> Trust:
    """A machine that trusts the relay's, and is not trusted."""
    Peers(tmp_path / "stranger").add("ours", credentials(tmp_path / "ours").certificate)
    return Trust(tmp_path / "stranger")


class End:
    """A relay with one route to a ring, which counts what it gets.

    Attributes:
        relay: of the home.
        port: of the relay, for the ring to send to the next rank.
        got: what the ring got, a list of connections.
    """

    def __init__(self, home: Path, before: Trust, *, encrypted: bool = True) -> None:
        self.relay = Relay("127.0.0.1", measured=lambda stream: stream.send(b"measured"), trust=Trust(home))
        self.relay.start()
        self.server = socket.create_server(("127.0.0.1", 0))
        ports = [self.server.getsockname()[1]] * 3
        beside = neighbour(before, encrypted=encrypted)
        self.relay.open(ROUTE, ports, b"next rank's name", ["127.0.0.1:1"] * 3, 60, next=beside, previous=beside)

    def ring_got_nothing(self) -> bool:
        """Whether nobody has come as far as the ring."""
        self.server.settimeout(0.0)
        try:
            connection, _ = self.server.accept()
        except BlockingIOError:
            return True
        connection.close()
        return False

    def accept(self) -> socket.socket:
        """The ring's side of a connection."""
        self.server.settimeout(SECONDS)
        connection, _ = self.server.accept()
        connection.settimeout(SECONDS)
        return connection

    def close(self) -> None:
        """End it."""
        self.relay.stop()
        self.server.close()


@pytest.fixture
def end(tmp_path: Path, previous: Trust) -> Iterator[End]:
    before = threading.active_count()
    found = End(tmp_path / "ours", previous)
    yield found
    found.close()
    assert threading.active_count() == before


def works(end: End, previous: Trust, index: int = 0) -> bool:
    """Whether the previous rank gets through to the ring."""
    with Caller(end.relay, previous, preamble(KIND_ROUTE, ROUTE, index)) as caller, end.accept() as ring:
        caller.stream.send(b"there")
        ring.sendall(b"back")
        return (_read(ring, 5), caller.recv(4)) == (b"there", b"back")


def _read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def _ended(connection: socket.socket) -> bool:
    """Whether the other side ends it, having said nothing but what TLS says of a failure."""
    connection.settimeout(SECONDS)
    said = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(4096):
            said += more
    return not said or said[0] == 21  # an alert


def plain(end: End) -> socket.socket:
    return socket.create_connection(("127.0.0.1", end.relay.port), SECONDS)


# --- who is no one ----------------------------------------------------------------------------------------------------


def test_the_previous_rank_gets_through(end: End, previous: Trust) -> None:
    assert works(end, previous)


@pytest.mark.parametrize(
    "said",
    [preamble(KIND_ROUTE, ROUTE), preamble(KIND_MEASURE), b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\x16\x03\x01\xff"],
)
def test_who_speaks_no_tls_gets_nothing(
    said: bytes, end: End, previous: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PREAMBLE_SECONDS", 0.5)
    with plain(end) as connection:
        connection.sendall(said)
        assert _ended(connection)
    assert end.ring_got_nothing()
    assert works(end, previous)


def client(trust: Trust, change: Callable[[ssl.SSLContext], None]) -> ssl.SSLContext:
    context = trust.context(server=False, peers=[*trust.certificates()])
    change(context)
    return context


def test_an_older_tls_gets_nothing(end: End, previous: Trust) -> None:
    def older(context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    with plain(end) as connection, pytest.raises(BROKEN):
        client(previous, older).wrap_socket(connection)
    assert end.ring_got_nothing()


def test_who_shows_no_certificate_gets_nothing(end: End, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with plain(end) as connection, contextlib.suppress(*BROKEN), context.wrap_socket(connection) as secured:
        secured.sendall(preamble(KIND_ROUTE, ROUTE))
        assert secured.recv(1) == b""
    assert end.ring_got_nothing()


@pytest.mark.parametrize("said", [preamble(KIND_ROUTE, ROUTE), preamble(KIND_MEASURE)])
def test_a_stranger_gets_nothing(said: bytes, end: End, stranger: Trust, previous: Trust) -> None:
    assert refused(end.relay, stranger, said)
    assert end.ring_got_nothing()
    assert works(end, previous)


def test_a_certificate_that_only_looks_like_a_known_one_gets_nothing(end: End, previous: Trust, tmp_path: Path) -> None:
    """The same name in it, another key: the name is what chains of certificates are built by."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from node.identity import self_signed

    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "forged.pem").write_bytes(self_signed(key, previous.credentials.home))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "forged.key").write_bytes(pem)

    def forge(context: ssl.SSLContext) -> None:
        context.load_cert_chain(tmp_path / "forged.pem", tmp_path / "forged.key")

    context = client(previous, forge)
    with plain(end) as connection, contextlib.suppress(OSError):
        stream = SecureStream(connection, context, server=False, deadline=time.monotonic() + SECONDS)
        stream.send(preamble(KIND_ROUTE, ROUTE))
        assert stream.recv(1) == b""
    assert end.ring_got_nothing()


# --- who is someone else ----------------------------------------------------------------------------------------------


def test_a_paired_machine_that_is_not_the_previous_rank_is_measured_and_no_more(
    end: End, previous: Trust, tmp_path: Path
) -> None:
    pair(tmp_path / "ours", tmp_path / "other")
    other = Trust(tmp_path / "other")
    with Caller(end.relay, other, preamble(KIND_MEASURE)) as caller:
        assert caller.recv(8) == b"measured"
    assert refused(end.relay, other, preamble(KIND_ROUTE, ROUTE))
    assert end.ring_got_nothing()
    assert works(end, previous)


def test_our_own_home_is_not_the_previous_rank_either(end: End) -> None:
    assert refused(end.relay, end.relay.trust, preamble(KIND_ROUTE, ROUTE))
    assert end.ring_got_nothing()


def test_the_previous_rank_gets_no_other_route(end: End, previous: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIAL_SECONDS", 0.2)
    assert refused(end.relay, previous, preamble(KIND_ROUTE, secrets.token_bytes(16)))
    assert refused(end.relay, previous, preamble(KIND_ROUTE, ROUTE, index=3))
    assert end.ring_got_nothing()


def test_a_neighbour_in_clear_is_one_only_where_both_say_so(end: End, previous: Trust) -> None:
    assert refused(end.relay, previous, preamble(KIND_ROUTE, ROUTE, in_clear=True))
    assert end.ring_got_nothing()
    assert works(end, previous)


def test_no_neighbour_is_encrypted_where_it_was_to_be_in_clear(tmp_path: Path, previous: Trust) -> None:
    found = End(tmp_path / "ours", previous, encrypted=False)
    try:
        assert refused(found.relay, previous, preamble(KIND_ROUTE, ROUTE))
        assert found.ring_got_nothing()
        with (
            Caller(found.relay, previous, preamble(KIND_ROUTE, ROUTE, in_clear=True)) as caller,
            found.accept() as ring,
        ):
            assert caller.stream.receive_record() == module.IN_CLEAR
            ring.sendall(b"in clear")
            assert _read(caller.socket, 8) == b"in clear"
        # Who does not wait for the answer is not waited for.
        with Caller(found.relay, previous, preamble(KIND_ROUTE, ROUTE, 1, in_clear=True) + b"early") as caller:
            with found.accept() as ring:
                assert ring.recv(1) == b""
    finally:
        found.close()


def test_who_answers_in_place_of_the_next_rank_is_sent_nothing(tmp_path: Path, previous: Trust) -> None:
    """A machine that both are paired with has taken the next rank's address."""
    pair(tmp_path / "ours", tmp_path / "other")
    impostor = Relay("127.0.0.1", trust=Trust(tmp_path / "other"))
    impostor.start()
    here = Relay("127.0.0.1", trust=Trust(tmp_path / "ours"))
    here.start()
    try:
        with socket.create_server(("127.0.0.1", 0)) as other_ring:
            us, them = neighbour(tmp_path / "ours"), neighbour(previous)
            ring_port = other_ring.getsockname()[1]
            impostor.open(b"n" * 16, [ring_port], ROUTE, [address(here)], 20, next=us, previous=us)
            (port,) = here.open(ROUTE, [1], b"n" * 16, [address(impostor)], 1.0, next=them, previous=them)
            with socket.create_connection(("127.0.0.1", port), SECONDS) as ring:
                ring.sendall(b"gradients")
                ring.settimeout(SECONDS)
                with contextlib.suppress(ConnectionResetError):
                    assert ring.recv(1) == b"", "given up at the deadline"
            other_ring.settimeout(0.0)
            with pytest.raises(BlockingIOError):
                other_ring.accept()
    finally:
        here.stop()
        impostor.stop()


def test_a_group_with_a_machine_that_is_not_trusted_is_not_opened(end: End, stranger: Trust, previous: Trust) -> None:
    known, unknown = neighbour(previous), neighbour(stranger)
    for before, after in ((known, unknown), (unknown, known)):
        with pytest.raises(NodeError, match="not paired with"):
            end.relay.open(b"another's route.", [1], b"n" * 16, ["127.0.0.1:1"], 5, next=after, previous=before)


# --- who is no one any more -------------------------------------------------------------------------------------------


def test_a_machine_that_is_forgotten_loses_its_open_connection(end: End, previous: Trust, tmp_path: Path) -> None:
    with Caller(end.relay, previous, preamble(KIND_ROUTE, ROUTE)) as caller, end.accept() as ring:
        caller.stream.send(b"there")
        assert _read(ring, 5) == b"there"
        Peers(tmp_path / "ours").remove(previous.credentials.home)
        began = time.monotonic()
        end.relay.trust.look()
        assert caller.recv(1) == b""
        assert ring.recv(1) == b""
        assert time.monotonic() - began < 5
    assert refused(end.relay, previous, preamble(KIND_ROUTE, ROUTE, 1))
    assert refused(end.relay, previous, preamble(KIND_MEASURE))
    assert end.ring_got_nothing()


def test_a_machine_that_is_forgotten_is_measured_no_longer(tmp_path: Path, previous: Trust) -> None:
    ended = threading.Event()

    def measured(stream: SecureStream) -> None:
        stream.send(b"begun")
        stream.settimeout(SECONDS)
        with contextlib.suppress(ConnectionError):
            stream.recv(1)
        ended.set()

    relay = Relay("127.0.0.1", measured=measured, trust=Trust(tmp_path / "ours"))
    relay.start()
    try:
        with Caller(relay, previous, preamble(KIND_MEASURE)) as caller:
            assert caller.recv(5) == b"begun"
            Peers(tmp_path / "ours").remove(previous.credentials.home)
            relay.trust.look()
            assert ended.wait(5)
    finally:
        relay.stop()


def test_a_machine_of_a_job_is_let_in_until_the_job_ends(tmp_path: Path) -> None:
    ours, guest = Trust(tmp_path / "ours"), Trust(tmp_path / "guest")
    ours.introduce([guest.credentials.certificate])
    Peers(tmp_path / "guest").add("ours", ours.credentials.certificate)
    assert ours.standing(fingerprint(guest.credentials.certificate)) is not None
    relay = Relay("127.0.0.1", measured=lambda stream: stream.send(b"measured"), trust=ours)
    relay.start()
    try:
        with Caller(relay, guest, preamble(KIND_MEASURE)) as caller:
            assert caller.recv(8) == b"measured"
        ours.introduce([])
        assert refused(relay, guest, preamble(KIND_MEASURE))
    finally:
        relay.stop()


# --- garbage ----------------------------------------------------------------------------------------------------------


def hello(trust: Trust) -> bytes:
    """What a client of TLS says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trust.context(server=False, peers=[trust.credentials.certificate]).wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """These bytes with some changed, cut off, put in or said twice."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(4):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at : at + chance.randint(1, 64)]
            case 2:
                changed[at:at] = chance.randbytes(chance.randint(1, 64))
            case _:
                changed[at:at] = changed[at : at + 64]
    return bytes(changed)


def test_garbage_in_place_of_a_handshake(end: End, previous: Trust) -> None:
    """Against the same stream and context as the relay's, over socket pairs: ten thousand in some seconds."""
    chance = random.Random(1)
    context = end.relay.trust.context(server=True)
    good = hello(previous)
    for number in range(MESSAGES):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(chance.randbytes(chance.randint(1, 400)) if number % 2 else mutated(good, chance))
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(BROKEN):
                SecureStream(ours, context, server=True, deadline=time.monotonic() + SECONDS)
    # Some of the same at the real door.
    for number in range(200):
        with plain(end) as connection, contextlib.suppress(OSError):
            connection.sendall(chance.randbytes(400) if number % 2 else mutated(good, chance))
            connection.shutdown(socket.SHUT_WR)
    assert works(end, previous)
    assert end.ring_got_nothing()


class Said:
    """A stream on which this was said, and no more."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def settimeout(self, seconds: float | None) -> None:
        del seconds

    def recv(self, most: int) -> bytes:
        part, self._data = self._data[:most], self._data[most:]
        return part


def test_garbage_in_place_of_a_preamble(end: End, previous: Trust) -> None:
    chance = random.Random(2)
    good = preamble(KIND_ROUTE, ROUTE, 3)  # there is no such connection: nothing that it becomes may reach the ring
    understood = 0
    for number in range(MESSAGES):
        said = Said(chance.randbytes(PREAMBLE.size) if number % 2 else mutated(good, chance))
        head = module._read_preamble(said, time.monotonic() + SECONDS)  # type: ignore[arg-type]
        understood += head is not None
        if head is not None:
            kind, name, index, in_clear = head
            assert (len(name), isinstance(in_clear, bool)) == (16, True)
            assert 0 <= kind < 256
            assert 0 <= index < 1 << 16
    assert 0 < understood < MESSAGES / 2
    for number in range(100):
        assert refused(end.relay, previous, chance.randbytes(PREAMBLE.size) if number % 2 else bytes([number]) * 99)
    assert works(end, previous)
    assert end.ring_got_nothing()


class Pair:
    """Two streams that have shaken hands, over a socket pair."""

    def __init__(self, here: Trust, there: Trust) -> None:
        self.sockets = socket.socketpair()
        made: list[SecureStream] = []
        deadline = time.monotonic() + SECONDS

        def serve() -> None:
            made.append(SecureStream(self.sockets[1], here.context(server=True), server=True, deadline=deadline))

        thread = threading.Thread(target=serve)
        thread.start()
        context = there.context(server=False, peers=[here.credentials.certificate])
        self.client = SecureStream(self.sockets[0], context, server=False, deadline=deadline)
        thread.join()
        (self.server,) = made
        for one in self.sockets:
            one.settimeout(SECONDS)

    def close(self) -> None:
        for one in self.sockets:
            one.close()


def test_garbage_inside_an_established_stream(tmp_path: Path, previous: Trust) -> None:
    """Records that were changed on their way: all of what was said before is given, and not a byte of what was not."""
    chance = random.Random(3)
    ours = Trust(tmp_path / "ours")
    records, broken = 0, 0
    while records < MESSAGES:
        pair_of_streams = Pair(ours, previous)
        try:
            sent = b""
            for _ in range(40):  # so many, unread, a socket pair takes
                said = chance.randbytes(chance.randint(1, 300))
                pair_of_streams.client._tls.write(said)
                sealed = pair_of_streams.client._outgoing.read()
                records += 1
                if chance.randrange(50) == 0:
                    changed = chance.randbytes(len(sealed)) if chance.randrange(2) else mutated(sealed, chance)
                    pair_of_streams.sockets[0].sendall(changed if changed != sealed else changed[1:])
                    pair_of_streams.sockets[0].shutdown(socket.SHUT_WR)
                    break
                pair_of_streams.sockets[0].sendall(sealed)
                sent += said
            else:
                pair_of_streams.client.end()
            got = b""
            try:
                while more := bytes(pair_of_streams.server.receive()):
                    got += more
            except OSError:
                broken += 1
                assert sent.startswith(got)
            else:
                assert got == sent
        finally:
            pair_of_streams.close()
    assert broken > 10


def test_garbage_inside_a_ring_s_connection_ends_it_and_reaches_no_ring(end: End, previous: Trust) -> None:
    with Caller(end.relay, previous, preamble(KIND_ROUTE, ROUTE)) as caller, end.accept() as ring:
        caller.stream.send(b"there")
        assert _read(ring, 5) == b"there"
        with contextlib.suppress(OSError):
            caller.socket.sendall(secrets.token_bytes(100_000))
        assert ring.recv(1) == b""
    assert works(end, previous, 1)


def test_a_connection_that_is_cut_is_broken_and_one_that_is_ended_is_not(tmp_path: Path, previous: Trust) -> None:
    ours = Trust(tmp_path / "ours")
    for cut in (True, False):
        both = Pair(ours, previous)
        both.client.send(b"all of it")
        both.sockets[0].shutdown(socket.SHUT_WR) if cut else both.client.end()
        assert both.server.recv(100) == b"all of it"
        if cut:
            with pytest.raises(ConnectionError, match="cut"):
                both.server.receive()
        else:
            assert bytes(both.server.receive()) == bytes(both.server.receive()) == b""
            both.server.send(b"after its end")  # it is still heard
            both.server.end()
            assert both.client.recv(100) == b"after its end"
            assert both.client.recv(100) == b""
        both.close()


def test_one_half_may_end_while_much_comes_the_other_way(tmp_path: Path, previous: Trust) -> None:
    both = Pair(Trust(tmp_path / "ours"), previous)
    text = secrets.token_bytes(5_000_000)

    def say() -> None:
        for at in range(0, len(text), 100_000):
            both.server.send(text[at : at + 100_000])
        both.server.end()

    sender = threading.Thread(target=say)
    sender.start()
    got = bytes(both.client.receive())
    both.client.end()  # in the middle of it
    while more := bytes(both.client.receive()):
        got += more
    assert bytes(both.server.receive()) == b""
    sender.join()
    assert got == text
    both.close()


# --- crowds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_files() -> Iterator[None]:
    """Enough of them for both ends of a flood."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * FLOOD
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this machine allows {hard} open files, and {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_a_thousand_who_say_nothing_neither_pile_up_nor_keep_others_out(
    end: End, previous: Trust, many_files: None
) -> None:
    with contextlib.ExitStack() as stack:
        threads = 0
        for number in range(FLOOD):
            stack.enter_context(plain(end))
            if number % 100 == 0:
                threads = max(threads, threading.active_count())
        assert threads <= 2 * module.MOST_HALF_OPEN + 16
        # All of them are still there.
        assert works(end, previous, 0)
    assert works(end, previous, 1)
    assert end.ring_got_nothing()


@pytest.mark.slow
def test_memory_does_not_grow_with_those_who_say_half_of_it(end: End, previous: Trust) -> None:
    half = hello(previous)[:100]

    def crowd(count: int) -> int:
        for _ in range(count):
            with plain(end) as connection:
                connection.sendall(half)
        return _resident_bytes()

    before = crowd(200)
    assert crowd(800) - before < 10_000_000
    assert works(end, previous)


def _resident_bytes() -> int:
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return 1024 * int(shown.stdout)


def test_who_says_it_slowly_is_not_waited_for(end: End, previous: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then: no single wait is long, and the whole of it is."""
    monkeypatch.setattr(module, "PREAMBLE_SECONDS", 1.0)
    with plain(end) as connection:
        assert _seconds_until_cut(connection.sendall, hello(previous)) < 8
    with Caller(end.relay, previous) as caller:
        assert _seconds_until_cut(caller.stream.send, preamble(KIND_ROUTE, ROUTE)) < 8
    assert end.ring_got_nothing()


def _seconds_until_cut(send: Callable[[bytes], None], words: bytes) -> float:
    """How long a connection lasts on which these are said one by one; fails when all of them can be."""
    began, pause = time.monotonic(), threading.Event()
    try:
        for byte in words:
            send(bytes([byte]))
            pause.wait(0.2)
    except BROKEN:
        return time.monotonic() - began
    raise AssertionError("it was listened to, to the end")


def test_a_crowd_from_one_address_displaces_its_own_only() -> None:
    kept = halfopen.HalfOpen(4)
    crowd = [socket.socketpair() for _ in range(6)]
    try:
        for (one, _), host in zip(crowd, ("10.0.0.1", "10.0.0.9", "10.0.0.9", "10.0.0.9", "10.0.0.2"), strict=False):
            one.settimeout(0.0)
            kept.enter(one, host)
        assert crowd[1][0].recv(1) == b"", "the oldest of the three"
        for place in (0, 2, 3, 4):
            with pytest.raises(BlockingIOError):
                crowd[place][0].recv(1)
        kept.leave(crowd[1][0])
        kept.leave(crowd[0][0])
        kept.enter(crowd[5][0], "10.0.0.9")
        with pytest.raises(BlockingIOError):
            crowd[2][0].recv(1)
    finally:
        for one, other in crowd:
            one.close()
            other.close()


# --- what TLS says in between -----------------------------------------------------------------------------------------


def test_keys_are_renewed_in_both_directions_while_both_send(end: End, previous: Trust, tmp_path: Path) -> None:
    """By the ``openssl`` command, as Python cannot: a line K has both sides renew their keys."""
    ours, theirs = end.relay.trust.credentials, previous.credentials
    (tmp_path / "known.pem").write_bytes(ours.certificate)
    try:
        process = subprocess.Popen(
            [
                "openssl", "s_client", "-connect", address(end.relay), "-tls1_3", "-brief",
                "-cert", str(theirs.certificate_path), "-key", str(theirs.key_path),
                "-CAfile", str(tmp_path / "known.pem"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs the command openssl")
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(preamble(KIND_ROUTE, ROUTE))
            process.stdin.flush()
            with end.accept() as ring:
                for number in range(20):
                    time.sleep(0.05)  # a command is one only at the beginning of what is read at once
                    process.stdin.write(b"K\n")
                    process.stdin.flush()
                    time.sleep(0.05)
                    process.stdin.write(b"line %02d\n" % number)
                    process.stdin.flush()
                    assert _read(ring, 8) == b"line %02d\n" % number
                    ring.sendall(b"answer\n")
                    assert process.stdout.readline().endswith(b"answer\n")
        finally:
            process.kill()
