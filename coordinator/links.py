"""Which addresses machines reach each other by, how fast, and which of them a group's ring uses."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol

from coordinator.ring_order import Link
from coordinator.stream import FleetLink
from coordinator.view.format import bits_text
from node.errors import NodeError
from node.info import Interface, Measured, NodeInfo

MOST_ADDRESSES = 4
"""Of one machine that another one tries."""
PARALLEL_SHARE = 0.6
"""A second path is used at once with the first when it is at least this fast: the ring gives each the same."""
WORTH_MORE = 1.1
"""More connections must carry more by this factor."""
TRIES = 2
"""A way is given up when it was not found so often: a machine that is busy at that moment may be late once."""
EVERY_PAIR_NODES = 8
"""Of more machines each is measured against the next few only, in the order of their names."""
NEXT_FEW = 3
GIGABIT = 1e9
LEADER_PORTS = range(42000, 48000)

_KINDS = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi", "loopback": "loopback", "other": ""}


class Measuring(Protocol):
    """What is asked of a node; see ``node.client.NodeClient``."""

    async def measure(self, addresses: Sequence[str], seconds: float, certificate: bytes) -> tuple[Measured, ...]:
        """How fast it reaches these addresses."""


@dataclass(frozen=True)
class Path:
    """One way from a machine to another.

    Attributes:
        address: ``ip:port`` of the other's relay.
        kind: of the other's interface.
        interface: that packets leave by, or "".
        bits_per_second, latency_seconds: as measured.
    """

    address: str
    kind: str
    interface: str
    bits_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Paths:
    """All that was measured.

    Attributes:
        found: from one id to another; the fastest first, those that are not reached left out.
        names: of the machines, by id.
    """

    found: Mapping[tuple[str, str], tuple[Path, ...]]
    names: Mapping[str, str]

    def joined(self, later: Paths) -> Paths:
        """These, with what was measured later in their place."""
        return Paths({**self.found, **later.found}, {**self.names, **later.names})

    def between(self) -> dict[tuple[str, str], Link]:
        """The link of each pair that was measured: the slower of its directions."""
        links = {}
        for one, other in self.found:
            if one > other:
                continue
            there, back = self.found[one, other], self.found.get((other, one), ())
            if there and back:
                bits = min(there[0].bits_per_second, back[0].bits_per_second)
                latency = max(there[0].latency_seconds, back[0].latency_seconds) / 2
            else:
                bits, latency = 0.0, 0.0
            links[one, other] = Link(bits, latency, self.describe(one, other))
        return links

    def told(self) -> tuple[FleetLink, ...]:
        """The same for people and files."""
        return tuple(
            FleetLink(self.names[one], self.names[other], link.bits_per_second, link.latency_seconds, link.text)
            for (one, other), link in self.between().items()
        )

    def describe(self, one: str, other: str) -> str:
        """``Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)``: the slower direction, and the round trip."""
        heading = f"{self.names[one]} ↔ {self.names[other]}"
        paths, back = self.found[one, other], self.found.get((other, one))
        if not paths:
            return f"{heading}: not reached"
        if back is not None and not back:
            return f"{heading}: {self.names[other]} does not reach {self.names[one]}"
        best, chosen = paths[0], _parallel(paths)
        rest = [path for path in paths if path not in chosen]
        by = best.interface or _KINDS[best.kind]
        unused = ", ".join(f"{_KINDS[p.kind] or p.interface} {p.bits_per_second / GIGABIT:.2g}" for p in rest)
        both = (best, back[0]) if back else (best,)
        bits = min(path.bits_per_second for path in both)
        round_trip = max(path.latency_seconds for path in both)
        text = f"{heading}: {by} {bits_text(bits)} {1000 * round_trip:.1f} ms"
        return f"{text} ({unused} unused)" if unused else text


def same_machine(one: NodeInfo, other: NodeInfo) -> bool:
    """Whether two nodes are programs of one machine: they have an address in common, loopback apart.

    A node that listens on loopback only can be reached from nowhere else.
    """
    mine, others = ({item.address for item in info.interfaces if item.kind != "loopback"} for info in (one, other))
    return not mine or not others or bool(mine & others)


def interfaces_of(info: NodeInfo, seen_from: NodeInfo) -> list[Interface]:
    """Addresses of a machine that another one may reach it by, the most promising first.

    A Thunderbolt cable goes from one machine to another: its addresses are tried where both have one, and the
    self-assigned ones only where both have such.
    """
    if same_machine(info, seen_from):
        near = [item for item in info.interfaces if item.kind == "loopback"]
        return near[:1] or list(info.interfaces[:1])
    kinds = {item.kind for item in seen_from.interfaces}
    assigns_itself = any(_self_assigned(item) for item in seen_from.interfaces)
    outside = [
        item
        for item in info.interfaces
        if item.kind != "loopback"
        and (item.kind != "thunderbolt" or item.kind in kinds)
        and (assigns_itself or not _self_assigned(item))
    ]
    return sorted(outside, key=lambda item: item.kind not in kinds)[:MOST_ADDRESSES]


def _self_assigned(interface: Interface) -> bool:
    return IPv4Address(interface.address).is_link_local


def rounds(ids: Sequence[str], wanted: Set[frozenset[str]]) -> list[list[tuple[str, str]]]:
    """Pairs in rounds in which nobody is in two pairs.

    Args:
        ids: of all machines.
        wanted: pairs of them.

    Returns:
        For all pairs, those of a tournament (the circle method); for fewer, about as many as anybody has partners.
    """
    seats: list[str | None] = [*ids, *([None] if len(ids) % 2 else [])]
    found: list[list[tuple[str, str]]] = []
    for _ in range(len(seats) - 1):
        for one, other in zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True):
            if one is not None and other is not None and frozenset((one, other)) in wanted:
                both = {one, other}
                free = next((pairs for pairs in found if not any(both & {*pair} for pair in pairs)), None)
                if free is None:
                    found.append(free := [])
                free.append((one, other))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def worth_measuring(infos: Mapping[str, NodeInfo]) -> set[frozenset[str]]:
    """Pairs to measure: all of up to eight machines; of more, each with the next three by name."""
    ids = sorted(infos, key=lambda i: (infos[i].name, i))
    reach = len(ids) if len(ids) <= EVERY_PAIR_NODES else NEXT_FEW + 1
    return {
        frozenset((one, ids[(index + step) % len(ids)]))
        for index, one in enumerate(ids)
        for step in range(1, min(reach, len(ids)))
    }


async def measure_links(
    nodes: Mapping[str, tuple[Measuring, NodeInfo]],
    certificates: Mapping[str, bytes],
    seconds: float,
    only: str | None = None,
) -> Paths:
    """Measure all pairs, in both directions; no machine takes part in two measurements at once.

    Args:
        nodes: by id.
        certificates: of the nodes, by id, in PEM.
        seconds: for each address.
        only: the id of a machine, to measure its own links only; None measures all.
    """
    infos = {key: info for key, (_, info) in nodes.items()}
    found: dict[tuple[str, str], tuple[Path, ...]] = {}

    async def one_way(one: str, other: str) -> None:
        items = interfaces_of(infos[other], infos[one])
        port = infos[other].relay_port
        by_address = {f"{item.address}:{port}": item for item in items}
        reached: list[Measured] = []
        for _ in range(TRIES):
            try:
                results = await nodes[one][0].measure(list(by_address), seconds, certificates[other])
            except NodeError:
                results = ()  # it will be missed soon enough; here it is only not reached
            reached = [result for result in results if result.bits_per_second > 0 and result.address in by_address]
            if reached:
                break
        paths = [
            Path(
                result.address,
                by_address[result.address].kind,
                result.interface,
                result.bits_per_second,
                result.latency_seconds,
            )
            for result in reached
        ]
        found[one, other] = tuple(sorted(paths, key=lambda path: -path.bits_per_second))

    wanted = worth_measuring(infos) if only is None else {frozenset((only, key)) for key in nodes if key != only}
    for pairs in rounds(list(nodes), wanted):
        await asyncio.gather(*(one_way(one, other) for one, other in pairs))
        await asyncio.gather(*(one_way(other, one) for one, other in pairs))
    return Paths(found, {key: info.name for key, info in infos.items()})


def ring_connections(order: Sequence[str], paths: Paths) -> list[tuple[str, ...]]:
    """Addresses of the next rank's relay, for each rank, one for each connection.

    The ring gives every connection the same, on every rank as many of them. There are several where the slowest pair of
    neighbours gains by it; a pair that has fewer paths sends twice over its fastest.

    Raises:
        NodeError: two neighbours do not reach each other.
    """
    found = []
    for index, one in enumerate(order):
        other = order[(index + 1) % len(order)]
        if not paths.found.get((one, other)):
            raise NodeError(f"{paths.names[one]} does not reach {paths.names[other]} over the network")
        found.append(_parallel(paths.found[one, other]))
    choices = [[_spread(ways, count) for ways in found] for count in range(1, MOST_ADDRESSES + 1)]
    rates = [min(rate for rate, _ in choice) for choice in choices]
    chosen = next(choice for choice, rate in zip(choices, rates, strict=True) if rate * WORTH_MORE >= max(rates))
    return [addresses for _, addresses in chosen]


def by_cable(one: str, other: str, addresses: Sequence[str], infos: Mapping[str, NodeInfo], paths: Paths) -> bool:
    """Whether all these connections go over a Thunderbolt cable that ends at the two machines.

    Of a Thunderbolt bridge that leads to further machines it is not known which of them it passes through.

    Args:
        one: id of the machine that connects.
        other: id of the machine that is connected to.
        addresses: by which the one connects to the other.
        infos: of both.
        paths: between all.
    """
    ways = {way.address: way for way in paths.found.get((one, other), ())}

    def is_cable(address: str) -> bool:
        way = ways.get(address)
        if way is None or way.kind != "thunderbolt":
            return False
        host = address.rpartition(":")[0]
        far = next((item.name for item in infos[other].interfaces if item.address == host), "")
        kinds = {item.name: item.kind for item in infos[one].interfaces}
        return (
            kinds.get(way.interface) == "thunderbolt"
            and _reached_by(one, way.interface, paths) == {other}
            and _reached_by(other, far, paths) <= {one}
        )

    return bool(addresses) and all(map(is_cable, addresses))


def _reached_by(one: str, interface: str, paths: Paths) -> set[str]:
    """Machines that this one reaches over one of its interfaces."""
    return {
        other
        for (start, other), ways in paths.found.items()
        if start == one and any(way.interface == interface for way in ways)
    }


def _parallel(found: Sequence[Path]) -> list[Path]:
    """The fastest path, and those that are worth using beside it: nearly as fast, by interfaces of their own."""
    chosen: list[Path] = []
    for path in found:
        shared = path.interface and any(path.interface == other.interface for other in chosen)
        if not shared and path.bits_per_second >= PARALLEL_SHARE * found[0].bits_per_second:
            chosen.append(path)
    return chosen


def _spread(ways: Sequence[Path], count: int) -> tuple[float, tuple[str, ...]]:
    """The best ways for so many connections that carry the same each.

    Returns:
        Bits per second of all together, and their addresses.
    """
    load = [0] * len(ways)
    order = []
    for _ in range(count):
        best = min(range(len(ways)), key=lambda i: (load[i] + 1) / ways[i].bits_per_second)
        load[best] += 1
        order.append(ways[best].address)
    slowest = max(carried / way.bits_per_second for carried, way in zip(load, ways, strict=True))
    return count / slowest, tuple(order)


def jaccl_matrix(
    order: Sequence[str], infos: Mapping[str, NodeInfo], paths: Paths
) -> tuple[tuple[str, ...], str] | None:
    """RDMA devices from each rank to each other, row after row, and rank 0's address; None where a pair has none.

    RDMA works over the Thunderbolt cable between two machines, so every pair needs one of its own.
    """
    devices = []
    for one in order:
        by_interface = {device.interface: device.name for device in infos[one].rdma}
        for other in order:
            ways = paths.found.get((one, other), ())
            found = next((by_interface[way.interface] for way in ways if way.interface in by_interface), "")
            if one != other and not found:
                return None
            devices.append("" if one == other else found)
    ways = paths.found.get((order[1], order[0]), ())
    host = ways[0].address.rpartition(":")[0]
    return tuple(devices), f"{host}:{secrets.choice(LEADER_PORTS)}"


def jaccl_lack(order: Sequence[str], infos: Mapping[str, NodeInfo], paths: Paths) -> str:
    """What the machines lack for ``jaccl_matrix``: one of them by name, or a pair; "" when they lack nothing."""
    for one in order:
        if not infos[one].rdma:
            return f"{infos[one].name} has no RDMA device (Thunderbolt 5, switched on by rdma_ctl enable)"
    for one in order:
        by_interface = {device.interface for device in infos[one].rdma}
        for other in order:
            ways = paths.found.get((one, other), ())
            if one != other and not any(way.interface in by_interface for way in ways):
                names = ", ".join(sorted(by_interface))
                return (
                    f"{infos[one].name} does not reach {infos[other].name} over an interface with RDMA ({names}):"
                    " connect them by a Thunderbolt cable"
                )
    return ""
