"""The doctor hears and connects for real, on loopback."""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from ipaddress import IPv4Address

import pytest

from node.advert import Advert
from node.doctor import lan
from node.doctor.finding import Reached
from node.doctor.lan import Heard, listen, outcome_of, permitted, reach
from node.info import Interface
from node.links import Address
from tests.fixtures.told import told


def test_its_own_advert_comes_back_and_nodes_of_its_fleet_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1")
    name = f"n{secrets.token_hex(3)}"

    async def work() -> Heard:
        advert = Advert()
        await advert.start(told(name), 4321)
        try:
            return await listen("id-me", [f"id-{name}"])
        finally:
            await advert.stop()

    found = asyncio.run(work())
    assert found == Heard(True, "", (f"id-{name}",), ("127.0.0.1:4321",))


def test_an_advert_that_does_not_come_back_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1")
    monkeypatch.setattr(lan, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(lan, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(lan._Ear, "hear", lambda *_, **__: None)  # nothing arrives
    assert asyncio.run(listen("id-me")) == Heard(False)


def test_bonjour_that_is_off_or_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    off = asyncio.run(listen("id-me"))
    assert (off.self_heard, off.off) == (None, True)
    monkeypatch.setenv("TANDEM_BONJOUR", "192.0.2.7")  # no address of this machine
    failing = asyncio.run(listen("id-me"))
    assert (failing.self_heard, failing.off) == (None, False)
    assert failing.trouble


def test_who_asks_from_elsewhere_has_only_our_own_networks_tried() -> None:
    served = (Interface("en0", "ethernet", "10.0.0.5"), Interface("lo0", "loopback", "127.0.0.1"))
    system = (Address("lo0", "127.0.0.1", 8), Address("en0", "10.0.0.5", 24), Address("bridge100", "192.168.64.1", 24))

    def tried(caller: str | None, *addresses: str) -> list[str]:
        from_where = IPv4Address(caller) if caller else None
        allowed, refused = permitted(addresses, from_where, served, lambda: system)
        assert sorted([*allowed, *(item.address for item in refused)]) == sorted(addresses)
        assert all(item.outcome == "untried" and item.reason for item in refused)
        return list(allowed)

    near = ["10.0.0.5:22", "10.0.0.77:21617"]
    far = ["127.0.0.1:22", "127.8.8.8:22", "10.0.1.1:80", "192.168.64.2:22", "203.0.113.9:443", "0.0.0.0:22"]
    names = ["router.local:80", "localhost:22", "[::1]:22", "010.0.0.5:22", "10.0.0.5", ""]
    assert tried("10.0.0.9", *near, *far, *names) == near
    assert tried(None, *near, *far, *names) == near
    assert tried("172.16.0.3", "172.16.0.3:21617", "172.16.0.4:21617") == ["172.16.0.3:21617"], "the caller itself"
    for here in ("127.0.0.1", "10.0.0.5", "192.168.64.1"):
        assert tried(here, *near, *far, *names) == near + far, "a program of this machine could do so by itself"
    _, (refused,) = permitted(["10.0.1.1:80"], IPv4Address("10.0.0.9"), served, lambda: system)
    assert refused == Reached("10.0.1.1:80", "untried", "10.0.1.1 is on no network of its machine")


def test_what_comes_of_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        at = [f"127.0.0.1:{server.getsockname()[1]}" for server in (open_, closed)]
        answers, refuses, nonsense = asyncio.run(reach([*at, "127.0.0.1:99999"]))
    assert answers == Reached(at[0], "answers")
    assert (refuses.outcome, bool(refuses.reason)) == ("refuses", True)
    assert nonsense.outcome == "failed"
    assert outcome_of(OSError(errno.EHOSTUNREACH, "No route to host")) == "denied"
    assert outcome_of(OSError(errno.EPERM, "Operation not permitted")) == "denied"
    assert outcome_of(ConnectionResetError()) == "refuses"


def test_a_port_that_says_nothing_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lan, "CONNECT_SECONDS", 0.2)
    # A queue that is full: the system answers no further connection.
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        at = full.getsockname()
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(at)
        (found,) = asyncio.run(reach([f"127.0.0.1:{at[1]}"]))
    assert found.outcome == "silent"
