"""Who is there: what ``coordinator nodes`` lists, as data."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.discovery import Found, SeenNode, Wanted, look
from coordinator.view.nodes import state_text
from node.hardware import Facts, describe, facts
from node.info import NodeInfo
from node.peers import fingerprint


@dataclass(frozen=True)
class FleetNode:
    """A machine that was found.

    Attributes:
        name: what it is called, with a number where several have the same.
        id: stable across restarts; None while unknown.
        address: ``host:port`` where it answered, or should have.
        own: it serves from this program's ``TANDEM_HOME``.
        state: ``free``, what it does, or why it cannot be used; one line.
        info: chip, memory, versions, load, and so on, as it says itself; None when it did not answer.
        fingerprint: by which a paired node is known; None of another one.
    """

    name: str
    id: str | None
    address: str
    own: bool
    state: str
    info: NodeInfo | None
    fingerprint: str | None

    @property
    def free(self) -> bool:
        """Whether it can take a job now."""
        return self.state == "free"

    def __str__(self) -> str:
        known = self.name if self.info is None else describe(dataclasses.replace(self.info.facts, name=self.name))
        return f"{known}: {self.state}"


async def find_nodes(wanted: Wanted, tell: Callable[[str], None] = lambda _: None) -> tuple[Found, Facts]:
    """Who is there, and what this machine is. Nodes that wait with one of our invitations are paired with on the way.

    Args:
        wanted: what is looked for.
        tell: takes a line for each that was paired with.
    """
    found, ours = await asyncio.gather(look(wanted), asyncio.to_thread(facts))
    if any(seen.join and not seen.own for seen in found.nodes):
        from coordinator.home import home
        from coordinator.pairing import Pairing, join_all

        if await join_all(Pairing(home()), found, tell):
            found = await look(wanted)
    return found, ours


def as_fleet_nodes(nodes: Sequence[SeenNode], ours: Facts) -> tuple[FleetNode, ...]:
    """What was found, for programs.

    Args:
        nodes: that were found.
        ours: this machine's facts, for its versions.
    """
    now = time.time()
    return tuple(_node(seen, ours, now) for seen in nodes)


def _node(seen: SeenNode, ours: Facts, now: float) -> FleetNode:
    mark = None if seen.certificate is None else fingerprint(seen.certificate)
    state = state_text(seen, ours, now)
    return FleetNode(seen.label or seen.name, seen.id or None, seen.address, seen.own, state, seen.info, mark)
