from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from zeroconf import ServiceStateChange
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from node import advert as advert_module
from node.advert import SERVICE_TYPE, Advert, cut_utf8, instance_label, usable_addresses
from node.errors import UserError
from node.info import PROTOCOL
from tests.fixtures.told import told

WAIT_SECONDS = 20.0


@pytest.fixture(autouse=True)
def bonjour_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1")


class Ear:
    """Hears adverts of one fleet's nodes, told by the port's number."""

    def __init__(self) -> None:
        self.changes: asyncio.Queue[tuple[ServiceStateChange, str]] = asyncio.Queue()
        self.bonjour = AsyncZeroconf(interfaces=["127.0.0.1"])
        self.browser = AsyncServiceBrowser(self.bonjour.zeroconf, SERVICE_TYPE, handlers=[self._on_change])

    def _on_change(self, zeroconf: object, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        self.changes.put_nowait((state_change, name))

    async def hear(self, wanted: ServiceStateChange, label: str) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while await self.changes.get() != (wanted, f"{label}.{SERVICE_TYPE}"):
                pass

    async def resolve(self, label: str) -> AsyncServiceInfo:
        info = AsyncServiceInfo(SERVICE_TYPE, f"{label}.{SERVICE_TYPE}")
        assert await info.async_request(self.bonjour.zeroconf, 5000)
        return info

    async def close(self) -> None:
        await self.browser.async_cancel()
        await self.bonjour.async_close()


@contextlib.asynccontextmanager
async def heard(name: str) -> AsyncIterator[tuple[Ear, Advert]]:
    """A node's advert, and somebody who has heard it."""
    ear, advert = Ear(), Advert()
    try:
        await advert.start(told(name), 1)
        await ear.hear(ServiceStateChange.Added, instance_label(name, f"id-{name}"))
        yield ear, advert
    finally:
        await advert.stop()
        await ear.close()


def test_is_heard_and_withdrawn(tandem_home: Path) -> None:
    name = f"Büro.Mac {tandem_home.name}"
    info = told(name, id="0123456789abcdef", since=1_800_000_000)
    label = instance_label(name, info.id)

    async def run() -> None:
        ear, advert = Ear(), Advert()
        try:
            await advert.start(info, 4711)
            assert (advert.label, advert.trouble) == (label, "")
            await ear.hear(ServiceStateChange.Added, label)
            found = await ear.resolve(label)
            assert found.port == 4711
            assert found.parsed_addresses() == ["127.0.0.1"]
            assert found.decoded_properties == {
                "id": info.id,
                "home": info.home,
                "protocol": str(PROTOCOL),
                "version": "0.1.0",
                "fleet": os.environ["TANDEM_FLEET"],
                "name": name,
                "since": "1800000000",
            }
            await advert.stop()
            await ear.hear(ServiceStateChange.Removed, label)
        finally:
            await advert.stop()
            await ear.close()

    asyncio.run(run())


def test_two_of_one_name_are_both_advertised(tandem_home: Path) -> None:
    name = tandem_home.name

    async def run() -> None:
        ear, adverts = Ear(), (Advert(), Advert())
        try:
            await asyncio.gather(*(one.start(told(name, id=f"id{n}"), n + 1) for n, one in enumerate(adverts)))
            for number in range(2):
                assert (await ear.resolve(f"{name} id{number}")).port == number + 1
        finally:
            await asyncio.gather(*(one.stop() for one in adverts))
            await ear.close()

    asyncio.run(run())


def test_addresses_that_come_later_are_advertised(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tandem_home.name
    monkeypatch.setattr(advert_module, "REFRESH_SECONDS", 0.1)
    there: list[tuple[str, ...]] = [()]
    monkeypatch.setattr(advert_module, "usable_addresses", lambda _: there[0])

    async def run() -> None:
        ear, advert = Ear(), Advert()
        try:
            await advert.start(told(name), 4711)
            assert advert.trouble == "this machine has no network address"
            there[0] = ("127.0.0.1",)
            await ear.hear(ServiceStateChange.Added, instance_label(name, f"id-{name}"))
            there[0] = ("127.0.0.1", "127.0.0.7")
            async with asyncio.timeout(WAIT_SECONDS):
                while sorted((await ear.resolve(instance_label(name, f"id-{name}"))).parsed_addresses()) != [
                    "127.0.0.1",
                    "127.0.0.7",
                ]:
                    await ear.changes.get()
            assert advert.trouble == ""
        finally:
            await advert.stop()
            await ear.close()

    asyncio.run(run())


def test_an_update_changes_the_text(tandem_home: Path) -> None:
    name = tandem_home.name

    async def run() -> None:
        async with heard(name) as (ear, advert):
            await advert.update(told(name, version="0.2.0"))
            async with asyncio.timeout(WAIT_SECONDS):
                while (await ear.resolve(instance_label(name, f"id-{name}"))).decoded_properties["version"] != "0.2.0":
                    await ear.changes.get()

    asyncio.run(run())


def test_cancelling_stop_does_not_cut_the_farewell(tandem_home: Path) -> None:
    name = tandem_home.name

    async def run() -> None:
        async with heard(name) as (ear, advert):
            stopping = asyncio.create_task(advert.stop())
            await asyncio.sleep(0)
            stopping.cancel()
            await ear.hear(ServiceStateChange.Removed, instance_label(name, f"id-{name}"))

    asyncio.run(run())


def test_off_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BONJOUR", "off")

    async def run() -> None:
        advert = Advert()
        await advert.start(told("x"), 1)
        assert (advert.label, advert.trouble) == ("", "Bonjour is switched off here (TANDEM_BONJOUR=off)")
        await advert.stop()

    asyncio.run(run())


def test_addresses_that_are_none_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1,studio")
    with pytest.raises(UserError, match=r"studio is no IPv4 address"):
        usable_addresses()


def test_loopback_is_used_only_where_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_addresses() == ("127.0.0.1",)
    monkeypatch.delenv("TANDEM_BONJOUR")
    found = usable_addresses()
    assert found == ("127.0.0.1",) or not any(address.startswith("127.") for address in found)
    assert all(socket.inet_aton(address) for address in found)


def test_only_the_address_that_is_listened_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_BONJOUR")
    assert usable_addresses("127.0.0.1") == ("127.0.0.1",), "although there may be others"
    assert usable_addresses("203.0.113.9") == ()
    for address in usable_addresses():
        assert usable_addresses(address) == (address,)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Studio", "Studio 01234567"),
        ("Anna.s\tMac", "Anna s Mac 01234567"),
        ("ü" * 60, "ü" * 27 + " 01234567"),
        ("", "node 01234567"),
    ],
)
def test_labels_fit_dns(name: str, label: str) -> None:
    assert instance_label(name, "0123456789abcdef") == label
    assert len(label.encode()) <= 63


def test_text_is_cut_between_characters() -> None:
    assert cut_utf8("aüb", 2) == "a"
    assert cut_utf8("aüb", 3) == "aü"
