"""What the local network lets this very program do: hear its own Bonjour advert and others', and connect to machines.

It must be tried by the program that needs it: macOS gives the permission to each program by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from zeroconf import BadTypeInNameException, Error, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from node.advert import SERVICE_TYPE, BonjourOff, fleet, open_bonjour, usable_addresses
from node.doctor.finding import Outcome, Reached
from node.errors import one_line
from node.info import Interface
from node.links import Address, system_addresses

TRIAL_TYPE = "_mlx-tandem-try._tcp.local."
"""Of adverts that nobody but who makes them looks for."""
LEAST_SECONDS = 2.5
MOST_SECONDS = 6.0
"""Where a node is expected that has not been heard: who has told everyone just now may wait before telling again."""
TOLD_SECONDS = 3.0
CONNECT_SECONDS = 3.0

_DENIED = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EACCES}


@dataclass(frozen=True)
class Heard:
    """What was heard by Bonjour.

    Attributes:
        self_heard: whether our own advert came back; None when it could not be tried.
        trouble: why it could not be tried, or "".
        ids: of nodes that advertise themselves.
        addresses: theirs, ``ip:port`` each.
        off: it is switched off here by ``TANDEM_BONJOUR``.
    """

    self_heard: bool | None = None
    trouble: str = ""
    ids: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    off: bool = False


@dataclass
class _Ear:
    """Listens for one advert of our own, and for those of nodes."""

    own: str
    expected: set[str]
    self_heard: asyncio.Event = field(default_factory=asyncio.Event)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    found: dict[str, list[str]] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def hear(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Called by zeroconf, which asks for these names, with every change."""
        if state_change is ServiceStateChange.Removed:
            return
        if service_type == TRIAL_TYPE:
            if name == self.own:
                self.self_heard.set()
                self._look()
            return
        task = asyncio.create_task(self._ask(zeroconf, service_type, name))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _ask(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        try:
            info = AsyncServiceInfo(service_type, name)
        except BadTypeInNameException:
            return  # a name that no node gives itself
        if not await info.async_request(zeroconf, TOLD_SECONDS * 1000):
            return
        text = {key: value or "" for key, value in info.decoded_properties.items()}
        if text.get("fleet", "") == fleet() and text.get("id"):
            self.found[text["id"]] = [f"{ip}:{info.port}" for ip in info.parsed_addresses(IPVersion.V4Only)]
            self._look()

    def _look(self) -> None:
        if self.self_heard.is_set() and self.expected <= self.found.keys():
            self.complete.set()


async def listen(own_id: str, expect: Iterable[str] = ()) -> Heard:
    """Make an advert of our own and listen for it, and for those of nodes.

    Args:
        own_id: of this node, whose advert tells nothing of others.
        expect: ids that should be heard; it is listened longer for them.
    """
    try:
        speaking, hearing = await _open_two()
    except BonjourOff as error:
        return Heard(trouble=str(error), off="switched off" in str(error))
    own = f"{secrets.token_hex(8)}.{TRIAL_TYPE}"
    ear, expected = _Ear(own, set(expect) - {own_id}), set(expect) - {own_id}
    trouble = ""
    try:
        browser = AsyncServiceBrowser(hearing.zeroconf, [TRIAL_TYPE, SERVICE_TYPE], handlers=[ear.hear])
        advert = AsyncServiceInfo(
            TRIAL_TYPE, own, port=9, server=f"{own.partition('.')[0]}.local.", parsed_addresses=list(usable_addresses())
        )
        try:
            announcing = await speaking.async_register_service(advert, cooperating_responders=True)
        except (Error, OSError) as error:
            trouble = f"the advert was not sent: {one_line(error)}"
        else:
            await asyncio.gather(announcing, asyncio.sleep(LEAST_SECONDS))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MOST_SECONDS - LEAST_SECONDS if expected or not ear.self_heard.is_set() else 0):
                await ear.complete.wait()
        await browser.async_cancel()
    finally:
        for task in tuple(ear.tasks):
            task.cancel()
        await asyncio.gather(*ear.tasks, return_exceptions=True)
        await asyncio.gather(speaking.async_close(), hearing.async_close(), return_exceptions=True)
    others = {key: at for key, at in ear.found.items() if key != own_id}
    addresses = [address for at in others.values() for address in at]
    return Heard(None if trouble else ear.self_heard.is_set(), trouble, tuple(sorted(others)), tuple(addresses))


async def _open_two() -> tuple[AsyncZeroconf, AsyncZeroconf]:
    """One to speak and one to hear: what comes back within one never was on the network."""
    first = open_bonjour()
    try:
        return first, open_bonjour()
    except BonjourOff:
        await first.async_close()
        raise


def permitted(
    addresses: Iterable[str],
    caller: IPv4Address | None,
    interfaces: Iterable[Interface],
    system: Callable[[], Sequence[Address]] = system_addresses,
) -> tuple[tuple[str, ...], tuple[Reached, ...]]:
    """Which of these a caller may have this machine connect to, and what is said of the others.

    A paired machine is to learn what the machines of a fleet reach, and not what listens on loopback here, or beyond
    our own networks. Who calls from this very machine could connect there by itself.

    Args:
        addresses: ``ip:port`` each.
        caller: where the call came from; None unknown.
        interfaces: by which this node serves others.
        system: how the system's addresses are asked.
    """
    own, served = system(), {item.address for item in interfaces}
    here = caller is not None and (caller.is_loopback or any(str(caller) == found.address for found in own))
    networks = [IPv4Network((found.address, found.prefix), strict=False) for found in own if found.address in served]
    allowed, refused = [], []
    for address in addresses:
        host = address.rpartition(":")[0]
        try:
            ip = IPv4Address(host)
        except ValueError:
            refused.append(Reached(address, "untried", f"{host!r} is no IPv4 address"))
            continue
        near = not ip.is_loopback and any(ip in network for network in networks)
        if here or near or ip == caller:
            allowed.append(address)
        else:
            refused.append(Reached(address, "untried", f"{ip} is on no network of its machine"))
    return tuple(allowed), tuple(refused)


async def reach(addresses: Sequence[str]) -> tuple[Reached, ...]:
    """Connect to each of these, and say nothing there."""
    return tuple(await asyncio.gather(*map(_reach, addresses)))


async def _reach(address: str) -> Reached:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        return Reached(address, "silent", f"no answer within {CONNECT_SECONDS:.0f} s")
    except (OSError, ValueError, OverflowError) as error:
        return Reached(address, outcome_of(error), _words(error))
    writer.transport.abort()
    return Reached(address, "answers")


def outcome_of(error: Exception) -> Outcome:
    """What a connection that failed says of the way there."""
    if isinstance(error, ConnectionRefusedError | ConnectionResetError):
        return "refuses"
    if isinstance(error, OSError) and error.errno in _DENIED:
        return "denied"
    return "failed"


def _words(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(error)
