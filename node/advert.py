"""A node's Bonjour advert: on every usable interface, gone when the node goes."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from collections.abc import Mapping
from typing import Any

import ifaddr
from zeroconf import Error, InterfaceChoice
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from node.errors import TandemError, UserError, one_line
from node.info import NodeInfo

EVERYWHERE = "0.0.0.0"
"""As an address to listen on: all of the machine's."""
SERVICE_TYPE = "_mlx-tandem._tcp.local."
REFRESH_SECONDS = 5.0
"""How often the machine's addresses are looked at; takes a millisecond."""
WITHDRAW_SECONDS = 3.0
LABEL_BYTES = 63  # of a DNS label
ID_CHARACTERS = 8
TEXT_BYTES = 255  # of one entry of a TXT record


class BonjourOff(TandemError):
    """Bonjour is switched off, or this machine cannot do it just now."""


def fleet() -> str:
    """The word that parts fleets on one network: ``TANDEM_FLEET``."""
    return os.environ.get("TANDEM_FLEET", "")


def wanted_interfaces() -> list[str] | InterfaceChoice:
    """Where ``TANDEM_BONJOUR`` allows Bonjour: these local addresses, or everywhere.

    Raises:
        BonjourOff: nowhere.
        UserError: it is neither ``off`` nor a list of addresses.
    """
    text = os.environ.get("TANDEM_BONJOUR", "").strip()
    if text.lower() == "off":
        raise BonjourOff("Bonjour is switched off here (TANDEM_BONJOUR=off)")
    if not text:
        return InterfaceChoice.All
    addresses = [part.strip() for part in text.split(",") if part.strip()]
    for address in addresses:
        try:
            ipaddress.IPv4Address(address)
        except ValueError:
            raise UserError(
                f"TANDEM_BONJOUR={text}: {address} is no IPv4 address; give addresses of this machine, or off"
            ) from None
    return addresses


def usable_addresses(host: str = EVERYWHERE) -> tuple[str, ...]:
    """The machine's IPv4 addresses that others can use, within ``TANDEM_BONJOUR``; loopback if there is no other.

    Args:
        host: address that is listened on; ``EVERYWHERE`` for all of them.
    """
    wanted = wanted_interfaces()
    found = _own_addresses()
    if isinstance(wanted, list):
        found = [address for address in found if address in wanted]
    if host != EVERYWHERE:
        return tuple(address for address in sorted(set(found)) if address == host)
    outside = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    return tuple(sorted(set(outside or found)))


def _own_addresses() -> list[str]:
    return [str(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips if ip.is_IPv4]


def open_bonjour() -> AsyncZeroconf:
    """Take part in multicast DNS.

    Raises:
        BonjourOff: it is switched off, or the system refuses.
        UserError: ``TANDEM_BONJOUR`` makes no sense.
    """
    interfaces = wanted_interfaces()
    if isinstance(interfaces, list):
        own = _own_addresses()
        # Where none is, zeroconf would fail, too, and leave a socket open.
        if not any(address in own for address in interfaces):
            raise BonjourOff(f"Bonjour does not work here: this machine has no address {' or '.join(interfaces)}")
    # It reports every interface that it cannot use; on a laptop there is always one.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    try:
        return AsyncZeroconf(interfaces=interfaces)
    except (OSError, RuntimeError) as error:
        raise BonjourOff(f"Bonjour does not work on this machine: {one_line(error)}") from error


def instance_label(name: str, node_id: str) -> str:
    """What a node is advertised as: its name as far as it fits a DNS label, and the beginning of its id.

    So no two are the same, and nobody must be asked first: of nodes that start at one moment, as machines do after a
    power cut, two of one name would both find it free.
    """
    suffix = f" {node_id[:ID_CHARACTERS]}"
    # A dot would part the label in two; control characters are not allowed.
    clean = "".join(" " if character == "." or not character.isprintable() else character for character in name)
    return cut_utf8(" ".join(clean.split()) or "node", LABEL_BYTES - len(suffix.encode())) + suffix


def cut_utf8(text: str, limit: int) -> str:
    """As many characters as fit into so many bytes."""
    return text.encode()[:limit].decode(errors="ignore").rstrip()


class Advert:
    """Says on the network that a node is here.

    Args:
        host: IPv4 address that the node listens on; no other is told.

    Attributes:
        label: what is advertised, "" while nothing is.
        trouble: why nothing is advertised, or "".
    """

    def __init__(self, host: str = EVERYWHERE) -> None:
        self._host = host
        self.label = ""
        self.trouble = ""
        self._bonjour: AsyncZeroconf | None = None
        self._info: NodeInfo | None = None
        self._pairing: Mapping[str, str] = {}
        self._port = 0
        self._addresses: tuple[str, ...] = ()
        self._announcing: asyncio.Future[Any] | None = None
        self._stopping = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def start(self, info: NodeInfo, port: int, pairing: Mapping[str, str] | None = None) -> None:
        """Advertise, and go on doing so when the machine changes networks.

        Where Bonjour does not work, ``trouble`` says why, and it is tried again every few seconds.

        Args:
            info: of the node.
            port: TCP port of its service.
            pairing: entries that say how it can be paired.

        Raises:
            UserError: ``TANDEM_BONJOUR`` makes no sense.
        """
        self._info, self._port, self._pairing = info, port, dict(pairing or {})
        try:
            wanted_interfaces()
        except BonjourOff as error:
            self.trouble = str(error)
            return
        await self._refresh()
        self._refreshing = asyncio.create_task(self._keep_fresh())

    async def update(self, info: NodeInfo) -> None:
        """Say what has changed.

        Raises:
            OSError, BonjourOff: that cannot be said just now.
        """
        before, self._info = self._info, info
        if self._bonjour is not None and before is not None and _text_of(before) != _text_of(info):
            await self._publish()

    async def offer(self, pairing: Mapping[str, str]) -> None:
        """Say how it can be paired now.

        Raises:
            OSError, BonjourOff: that cannot be said just now.
        """
        before, self._pairing = self._pairing, dict(pairing)
        if self._bonjour is not None and before != self._pairing:
            await self._publish()

    async def stop(self) -> None:
        """Withdraw the advert. Goes on to its end even when the caller is cancelled: a cut-off farewell would leave
        the node listed for minutes.
        """
        self._stopping.set()
        self._leaving = self._leaving or asyncio.create_task(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        if self._refreshing is not None:
            await self._refreshing
        await self._close()

    async def _keep_fresh(self) -> None:
        while not self._stopping.is_set():
            try:
                await asyncio.wait_for(self._stopping.wait(), REFRESH_SECONDS)
            except TimeoutError:
                await self._refresh()

    async def _refresh(self) -> None:
        """Bring the advert in line with the machine's addresses."""
        try:
            addresses = usable_addresses(self._host)
            if not addresses:
                where = "" if self._host == EVERYWHERE else f" {self._host} that Bonjour may tell of"
                raise BonjourOff(f"this machine has no network address{where}")
            if self._bonjour is None:
                self._addresses = addresses
                self._bonjour = open_bonjour()
                await self._register(self._bonjour)
            elif addresses != self._addresses:
                self._addresses = addresses
                await self._bonjour.async_update_interfaces(wanted_interfaces())
                await self._publish()
            self.trouble = ""
        except (BonjourOff, OSError) as error:
            self.trouble = one_line(error)
            await self._close()

    async def _register(self, bonjour: AsyncZeroconf) -> None:
        info = self._known()
        self.label = instance_label(info.name, info.id)
        # Repeats itself for a second, which nobody needs to wait for.
        sending = await bonjour.async_register_service(self._describe(info), cooperating_responders=True)
        self._announcing = asyncio.ensure_future(sending)

    async def _publish(self) -> None:
        """Advertise the same name with what is true now."""
        if self._bonjour is not None:
            try:
                await (await self._bonjour.async_update_service(self._describe(self._known())))
            except Error as error:
                raise BonjourOff(f"the advert could not be changed: {one_line(error)}") from error

    def _describe(self, info: NodeInfo) -> AsyncServiceInfo:
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{self.label}.{SERVICE_TYPE}",
            port=self._port,
            properties={**_text_of(info), **self._pairing},
            server=f"tandem-{info.id}.local.",
            parsed_addresses=list(self._addresses),
        )

    def _known(self) -> NodeInfo:
        assert self._info is not None, "start() comes first"
        return self._info

    async def _close(self) -> None:
        bonjour, self._bonjour, self.label = self._bonjour, None, ""
        if bonjour is None:
            return
        if self._announcing is not None:
            # An announcement after the farewell would bring the node back.
            self._announcing.cancel()
            await asyncio.gather(self._announcing, return_exceptions=True)
        try:
            await asyncio.wait_for(bonjour.async_close(), WITHDRAW_SECONDS)
        except (OSError, TimeoutError) as error:
            self.trouble = f"the advert could not be withdrawn: {one_line(error)}"


def _text_of(info: NodeInfo) -> Mapping[str, str]:
    """The TXT record: what must be known before a node is called."""
    entries = {
        "id": info.id,
        "home": info.home,
        "protocol": str(info.protocol),
        "version": info.version,
        "fleet": fleet(),
        "name": info.name,
        "since": str(info.since),
    }
    return {key: cut_utf8(value, TEXT_BYTES - len(key) - 1) for key, value in entries.items()}
