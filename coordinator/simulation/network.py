"""What is between machines: which transfers take turns, and when the last byte of each has arrived."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from coordinator.ring_order import Links, link_between

Medium = Literal["cable", "switch", "air"]
"""What a link is made of.

``cable``: one of its own between two machines, which carries both directions at once (Thunderbolt).
``switch``: each machine has one port, and what it sends to all others goes out through that; the same for what it gets.
``air``: one transfer at a time, whoever sends (Wi-Fi).
"""
MEDIA: tuple[Medium, ...] = ("cable", "switch", "air")

Pair = tuple[str, str]


@dataclass(frozen=True)
class Network:
    """Links and what they are made of.

    Attributes:
        links: as the planner knows them.
        media: by the ids of two machines, in either order.
        usual: of the pairs that are not in ``media``.
    """

    links: Links
    media: Mapping[Pair, Medium] = field(default_factory=dict)
    usual: Medium = "switch"

    def medium(self, one: str, other: str) -> Medium:
        """What is between two machines."""
        return self.media.get((one, other)) or self.media.get((other, one)) or self.usual


@dataclass(frozen=True)
class _Way:
    """From one machine to another.

    Attributes:
        seconds_per_byte: at the link's rate.
        latency_seconds: from the last byte sent to its arrival.
        sending: what transfers take turns for at the sender: places, and the seconds that each byte occupies them.
        receiving: the same at the receiver: what comes while it is busy waits in between, and holds up nobody else.
    """

    seconds_per_byte: float
    latency_seconds: float
    sending: tuple[tuple[int, float], ...]
    receiving: tuple[tuple[int, float], ...] = ()


class Traffic:
    """Transfers over a network, each begun in the order in which it is asked for.

    Args:
        network: the links.
        ids: machines; a port is as fast as the fastest of its links.
    """

    def __init__(self, network: Network, ids: Iterable[str]) -> None:
        self._network = network
        self._port_rates: dict[str, float] = {}
        self._free: list[float] = []
        self._index: dict[tuple[str, ...], int] = {}
        self._ways: dict[Pair, _Way] = {}
        members = list(ids)
        for one in members:
            rates = [
                link_between(network.links, one, other).bits_per_second
                for other in members
                if other != one and network.medium(one, other) == "switch"
            ]
            self._port_rates[one] = max(rates, default=0.0)

    def send(self, one: str, other: str, size_bytes: float, now: float) -> tuple[float, float]:
        """Begin a transfer as soon as what it needs is free.

        Returns:
            When it has left, and when it has arrived; infinite over a link that carries nothing.
        """
        way = self._ways.get((one, other)) or self._found(one, other)
        free = self._free
        begin = max(now, *(free[place] for place, _ in way.sending))
        left = begin + size_bytes * way.seconds_per_byte
        for place, seconds_per_byte in way.sending:
            free[place] = begin + size_bytes * seconds_per_byte
        arrived = left
        for place, seconds_per_byte in way.receiving:
            arrived = max(arrived, max(begin, free[place]) + size_bytes * seconds_per_byte)
            free[place] = arrived
        return left, arrived + way.latency_seconds

    def _found(self, one: str, other: str) -> _Way:
        link, medium = link_between(self._network.links, one, other), self._network.medium(one, other)
        seconds = _per_byte(link.bits_per_second)
        receiving: tuple[tuple[int, float], ...] = ()
        own = ("air",) if medium == "air" else ("way", one, other)
        sending = [(self._place(*own), seconds)]
        if medium == "switch":
            sending.append((self._place("out", one), _per_byte(self._port_rates[one])))
            receiving = ((self._place("in", other), _per_byte(self._port_rates[other])),)
        way = self._ways[one, other] = _Way(seconds, link.latency_seconds, tuple(sending), receiving)
        return way

    def _place(self, *name: str) -> int:
        if name not in self._index:
            self._index[name] = len(self._free)
            self._free.append(0.0)
        return self._index[name]


def _per_byte(bits_per_second: float) -> float:
    return 8 / bits_per_second if bits_per_second > 0 else math.inf
