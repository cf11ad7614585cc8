"""One machine of a fleet, as the doctor sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.links import interfaces_of, same_machine
from node.doctor.finding import Diagnosis, Finding, Outcome, Reached
from node.info import NodeInfo

MOST_ADDRESSES = 2
"""Of one machine that another one connects to."""


@dataclass(frozen=True)
class Clock:
    """A clock against ours.

    Attributes:
        ahead_seconds: negative where it is behind.
        uncertain_seconds: by so much the way there and back may falsify it.
    """

    ahead_seconds: float
    uncertain_seconds: float


@dataclass(frozen=True)
class Machine:
    """A machine that was found, or should have been.

    Attributes:
        label: what it is called.
        own: it is this one.
        address: ``host:port`` of its service.
        advertised: whether others should hear of it.
        diagnosis: what it says; None when it did not.
        problem: why it did not, or "".
        clock: against ours; None unknown.
        answer: what came of a connection of our own, where it did not say anything; None not tried.
        remembered: nobody says that it is there: it is paired, and has answered at this address once.
    """

    label: str
    own: bool
    address: str
    advertised: bool = True
    diagnosis: Diagnosis | None = None
    problem: str = ""
    clock: Clock | None = None
    answer: Reached | None = None
    remembered: bool = False

    @property
    def info(self) -> NodeInfo:
        """Of one that has answered."""
        assert self.diagnosis is not None, "only those that have answered are asked"
        return self.diagnosis.info

    @property
    def port(self) -> int:
        """Of its service."""
        return int(self.address.rpartition(":")[2])

    def service_seen_from(self, info: NodeInfo) -> tuple[str, ...]:
        """Addresses of its service for another machine."""
        return _addresses(self.info, info, self.port)

    def relay_seen_from(self, info: NodeInfo) -> tuple[str, ...]:
        """Addresses of its relay for another machine."""
        return _addresses(self.info, info, self.info.relay_port)


@dataclass(frozen=True)
class Examined:
    """A fleet and all findings on it.

    Attributes:
        machines: with the findings on each.
        links: on each pair.
        general: on none of them.
    """

    machines: Sequence[tuple[Machine, tuple[Finding, ...]]]
    links: tuple[Finding, ...] = ()
    general: tuple[Finding, ...] = field(default=())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them."""
        return (*(finding for _, found in self.machines for finding in found), *self.links, *self.general)


def clock_of(diagnosis: Diagnosis, sent: float, arrived: float) -> Clock:
    """A clock against ours, as NTP compares them (RFC 5905, section 8).

    Args:
        diagnosis: with what that clock showed when it was asked and when it answered.
        sent: when it was asked by our clock.
        arrived: when the answer was here.
    """
    ahead = ((diagnosis.received - sent) + (diagnosis.replied - arrived)) / 2
    under_way = (arrived - sent) - (diagnosis.replied - diagnosis.received)
    return Clock(ahead, max(under_way, 0.0) / 2)


def outcome_at(one: Machine, addresses: Sequence[str]) -> Outcome | None:
    """What came of a machine's connections to any of these addresses, the best of them; None for not tried."""
    order: tuple[Outcome, ...] = ("answers", "refuses", "silent", "denied", "failed")
    found = [item.outcome for item in _reached(one, addresses) if item.outcome != "untried"]
    return min(found, key=order.index, default=None)


def refused_at(one: Machine, addresses: Sequence[str]) -> str:
    """Why a machine did not try these addresses, or ""."""
    return next((item.reason for item in _reached(one, addresses) if item.outcome == "untried"), "")


def _reached(one: Machine, addresses: Sequence[str]) -> list[Reached]:
    reached = one.diagnosis.reached if one.diagnosis is not None else ()
    return [item for item in reached if item.address in addresses]


def _addresses(info: NodeInfo, seen_from: NodeInfo, port: int) -> tuple[str, ...]:
    found = interfaces_of(info, seen_from)[:MOST_ADDRESSES]
    if same_machine(info, seen_from):
        # Loopback is tried for callers on that machine only.
        found += [item for item in info.interfaces if item.kind != "loopback" and item not in found][:1]
    return tuple(f"{item.address}:{port}" for item in found)
