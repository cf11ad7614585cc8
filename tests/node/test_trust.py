"""Who may do what, and who may no more; TLS between sockets of our own, with real connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from pathlib import Path

import pytest

from node import trust as trusts
from node.errors import UserError
from node.identity import credentials
from node.peers import Peers, fingerprint
from node.trust import Standing, Trust


def mark(home: Path) -> str:
    return fingerprint(credentials(home).certificate)


def test_standings(tmp_path: Path) -> None:
    ours, paired, guest, stranger = (tmp_path / name for name in ("ours", "paired", "guest", "stranger"))
    trust = Trust(ours)
    Peers(ours).add("Air", credentials(paired).certificate)
    trust.introduce([credentials(guest).certificate, credentials(paired).certificate])
    assert trust.standing(mark(ours)) is Standing.OWN
    assert trust.standing(mark(paired)) is Standing.PAIRED, "an introduction takes nothing away"
    assert trust.standing(mark(guest)) is Standing.INTRODUCED
    assert trust.standing(mark(stranger)) is None
    assert len(trust.certificates()) == 4
    trust.introduce([])
    assert trust.standing(mark(guest)) is None
    with pytest.raises(UserError, match="no certificate"):
        trust.introduce([b"nonsense"])
    with pytest.raises(UserError, match="for one job"):
        trust.introduce([b""] * 1000)


def test_who_is_trusted_no_more_is_told_within_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusts, "LOOK_SECONDS", 0.01)
    ours, air = tmp_path / "ours", tmp_path / "air"
    peers = Peers(ours)
    peer = peers.add("Air", credentials(air).certificate)
    trust = Trust(ours)

    async def work() -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        end = trust.on_revoked(told.put_nowait)
        watching = asyncio.create_task(trust.watch())
        peers.remove(peer.home)
        assert await asyncio.wait_for(told.get(), 10) == peer.fingerprint
        peers.add("Air", credentials(air).certificate)
        trust.look()
        end()
        peers.remove(peer.home)
        trust.look()
        assert told.empty()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(work())


def test_who_is_trusted_less_is_told_of_too(tmp_path: Path) -> None:
    """Forgotten while a coordinator introduces it; paired and forgotten between two looks; whatever a listener does."""
    ours, air = tmp_path / "ours", credentials(tmp_path / "air")
    peers, trust = Peers(ours), Trust(ours)
    told: list[str] = []

    def fail(mark: str) -> None:
        raise BrokenPipeError

    trust.on_revoked(told.append)
    end = trust.on_revoked(fail)
    trust.on_revoked(told.append)
    peers.add("Air", air.certificate)
    trust.introduce([air.certificate])
    assert told == []
    peers.remove(air.home)
    with pytest.raises(BrokenPipeError):
        trust.look()
    assert told == [mark(tmp_path / "air")] * 2
    end()
    peers.add("Air", air.certificate)
    trust.look()
    assert len(told) == 2, "trusted more is no matter"
    trust.introduce([])
    peers.remove(air.home)
    trust.look()
    assert len(told) == 4
    peers.add("Air", air.certificate)
    assert trust.standing(mark(tmp_path / "air")) is Standing.PAIRED
    peers.remove(air.home)
    trust.look()
    assert len(told) == 6


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str | None, str]:
    """The version and the fingerprint that the client sees; raises what either side raises."""
    near, far = socket.socketpair()
    wrong: list[BaseException] = []

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True) as end:
                end.sendall(end.recv(4))
        except OSError as error:
            wrong.append(error)
            far.close()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with client.wrap_socket(near) as end:
            end.sendall(b"ping")
            assert end.recv(4) == b"ping"
            seen = end.getpeercert(binary_form=True)
            assert seen is not None
            return end.version(), fingerprint(ssl.DER_cert_to_PEM_cert(seen).encode())
    finally:
        near.close()
        serving.join()
        if wrong:
            raise wrong[0]


def test_only_those_who_know_each_other_shake_hands(tmp_path: Path) -> None:
    one, other, stranger = (Trust(tmp_path / name) for name in ("one", "other", "stranger"))
    one.peers.add("other", other.credentials.certificate)
    other.peers.add("one", one.credentials.certificate)
    server = one.context(server=True)
    assert shake_hands(server, other.context(server=False)) == ("TLSv1.3", mark(tmp_path / "one"))
    # Its own home is trusted, too: several nodes of one machine.
    assert shake_hands(server, one.context(server=False))[0] == "TLSv1.3"
    with pytest.raises(OSError, match=r"(?i)certificate|unknown ca"):
        shake_hands(server, stranger.context(server=False, peers=[one.credentials.certificate]))
    with pytest.raises(OSError, match=r"(?i)certificate|unknown ca"):
        shake_hands(stranger.context(server=True), other.context(server=False))
    # One of the paired is not any of them.
    with pytest.raises(OSError, match=r"(?i)certificate|unknown ca"):
        shake_hands(server, other.context(server=False, peers=[other.credentials.certificate]))
    old = other.context(server=False)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError, match=r"(?i)version|unsupported protocol"):
        shake_hands(server, old)
