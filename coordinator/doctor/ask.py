"""Find the machines of a fleet, have each look at itself and at the others, and measure their links."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator import addresses
from coordinator.discovery import (
    PATIENCE_SECONDS,
    SELECT_LEAST_SECONDS,
    SELECT_SECONDS,
    SILENT,
    Found,
    SeenNode,
    choose,
    look,
    parse_wanted,
    what_to_do,
)
from coordinator.doctor.checks import Measured, check_links, check_together
from coordinator.doctor.machine import Clock, Examined, Machine, clock_of
from coordinator.links import measure_links
from coordinator.view.format import one_line, shortened
from node.advert import fleet
from node.client import NodeClient
from node.daemon import Daemon
from node.doctor.finding import Diagnosis, Finding, Wanted
from node.doctor.lan import reach
from node.errors import NodeError
from node.hardware import Facts, facts
from node.identity import credentials
from node.info import NodeInfo
from node.names import usable_name
from node.peers import Peer, Peers

LINK_SECONDS = 0.2
MOST_FINDINGS, MOST_CHARACTERS = 100, 600
"""That are shown of what another machine says."""


@dataclass(frozen=True)
class _Known:
    """A machine that can be asked."""

    machine: Machine
    info: NodeInfo
    client: NodeClient
    certificate: bytes


async def examine_fleet(wanted: str, home: Path) -> Examined:
    """All findings on the machines that ``--nodes`` means, and on this one.

    Args:
        wanted: value of ``--nodes``.
        home: the ``TANDEM_HOME``.

    Raises:
        UserError: a name that nobody has, or several.
    """
    parsed = parse_wanted(wanted)
    last = _last_addresses(home, besides=parsed.addresses) if parsed.auto else {}
    # Who is given must answer, or its silence is told.
    asked = replace(parsed, addresses=(*parsed.addresses, *last))
    found, ours = await asyncio.gather(
        look(asked, home=home, seconds=SELECT_SECONDS, patience=PATIENCE_SECONDS, least=SELECT_LEAST_SECONDS),
        asyncio.to_thread(facts),
    )
    found = _with_peers(found, last)
    # An address where nobody answers is what a doctor is asked for.
    chosen = choose(replace(parsed, addresses=()), found) if parsed.names else found.nodes
    by_hand = [seen for seen in found.nodes if set(seen.by_hand.split()) & set(parsed.addresses)]
    nodes = tuple(dict.fromkeys([*chosen, *by_hand]))
    async with _known(nodes, home, ours) as known:
        machines = list(await asyncio.gather(*(_diagnose(one, known) for one in known)))
        measured = await _measure(known, machines)
    machines += await asyncio.gather(
        *(_without_answer(seen, remembered=seen.by_hand in last) for seen in nodes if seen.info is None)
    )
    return _judge(machines, measured, ours, _general(found, nodes, home, parsed.auto))


def _last_addresses(home: Path, besides: Sequence[str]) -> dict[str, Peer]:
    """Where paired machines have answered last, as far as that is remembered, but for these addresses."""
    known = addresses.load(home, fleet())
    found = {}
    for peer in Peers(home).all():
        for entry in known:
            if entry.home == peer.home or (not entry.home and entry.name == peer.name):
                found[entry.address] = peer
                break
    return {address: peer for address, peer in found.items() if address not in besides}


def _with_peers(found: Found, last: Mapping[str, Peer]) -> Found:
    """Call those by their names who are silent at their last address; who was found elsewhere is not missing."""
    there = {seen.home for seen in found.nodes}
    nodes = []
    for seen in found.nodes:
        peer = last.get(seen.by_hand) if seen.info is None else None
        if peer is None:
            nodes.append(seen)
        elif peer.home not in there:
            nodes.append(replace(seen, home=peer.home, name=peer.name, label=peer.name))
    return replace(found, nodes=tuple(nodes))


def _judge(machines: Sequence[Machine], measured: Measured, ours: Facts, general: tuple[Finding, ...]) -> Examined:
    judged = []
    for machine in machines:
        alone = machine.diagnosis.findings if machine.diagnosis is not None else ()
        judged.append((machine, (*alone, *check_together(machine, machines, measured, ours))))
    answered = [machine for machine in machines if machine.diagnosis is not None]
    return Examined(judged, check_links(answered, measured), general)


def _general(found: Found, nodes: Sequence[SeenNode], home: Path, auto: bool) -> tuple[Finding, ...]:
    """What is to be said of no machine that was found."""
    told = []
    if found.trouble:
        told.append(Finding("multicast", "warning", f"{found.trouble}: only known addresses were asked"))
    if auto and not any(not seen.own for seen in nodes):
        told.append(Finding("nodes", "warning", f"no other node found, looked {found.seconds:.1f} s", what_to_do()))
    if auto:
        homes = {seen.home for seen in found.nodes}
        for peer in Peers(home).all():
            if peer.home not in homes:
                mend = f"run `node serve` on {peer.name}, wake it, or give its address: --nodes auto,HOST:PORT"
                told.append(Finding("nodes", "unknown", f"{peer.name} is paired, and was not found", mend))
    return tuple(told)


@contextlib.asynccontextmanager
async def _known(nodes: Sequence[SeenNode], home: Path, ours: Facts) -> AsyncIterator[list[_Known]]:
    """Those that answer, this machine first: by its own node, or by one that serves for so long."""
    async with contextlib.AsyncExitStack() as stack:
        known = []
        if not any(seen.own and seen.info is not None for seen in nodes):
            name = usable_name(ours.name)
            label = f"{name} (here)" if name in {seen.label for seen in nodes} else name
            daemon = Daemon(home, label, takes_jobs=False, advertise=False)
            stack.push_async_callback(daemon.stop)
            await daemon.start()
            machine = Machine(label, own=True, address=daemon.address, advertised=False)
            client = NodeClient(daemon.address, label)
            stack.push_async_callback(client.close)
            known.append(_Known(machine, daemon.info(), client, credentials(home).certificate))
        for seen in sorted(nodes, key=lambda seen: not seen.own):
            if seen.info is not None and seen.certificate is not None:
                client = NodeClient(seen.address, seen.label, seen.certificate)
                stack.push_async_callback(client.close)
                known.append(
                    _Known(Machine(one_line(seen.label), seen.own, seen.address), seen.info, client, seen.certificate)
                )
        yield known


async def _diagnose(one: _Known, known: Sequence[_Known]) -> Machine:
    """A machine with what it says."""
    others = [replace(other.machine, diagnosis=Diagnosis(other.info, ())) for other in known if other is not one]
    targets = [
        address
        for other in others
        for address in (*other.service_seen_from(one.info), *other.relay_seen_from(one.info))
    ]
    expect = [other.info.id for other in others if other.advertised]
    sent = time.time()
    try:
        said = await one.client.diagnose(Wanted(tuple(dict.fromkeys(targets)), tuple(expect)))
    except NodeError as error:
        return replace(one.machine, problem=one_line(str(error)))
    arrived = time.time()
    clock = Clock(0.0, 0.0) if one.machine.own else clock_of(said, sent, arrived)
    return replace(one.machine, diagnosis=_clean(said), clock=clock)


def _clean(said: Diagnosis) -> Diagnosis:
    """What another machine says, fit to be shown."""

    def line(text: str) -> str:
        return shortened(one_line(text), MOST_CHARACTERS)

    findings = [
        Finding(line(item.check), item.verdict, line(item.seen), line(item.mend))
        for item in said.findings[:MOST_FINDINGS]
    ]
    return replace(said, findings=tuple(findings))


async def _measure(known: Sequence[_Known], machines: Sequence[Machine]) -> Measured:
    """The links between machines that have answered, and do not train just now."""
    answered = [(one, machine) for one, machine in zip(known, machines, strict=True) if machine.diagnosis is not None]
    free = [one for one, machine in answered if machine.info.busy is None]
    busy = tuple(machine.label for _, machine in answered if machine.info.busy is not None)
    if len(free) < 2:
        return Measured(None, busy)
    nodes = {one.info.id: (one.client, one.info) for one in free}
    paths = await measure_links(nodes, {one.info.id: one.certificate for one in free}, LINK_SECONDS)
    return Measured(paths, busy)


async def _without_answer(seen: SeenNode, *, remembered: bool) -> Machine:
    """A machine that did not say what it is; if nothing tells why, whether a connection gets there is tried."""
    problem = seen.problem or SILENT
    answer = None
    if problem == SILENT:
        (answer,) = await reach([seen.address])
    return Machine(
        one_line(seen.label or seen.name),
        seen.own,
        seen.address,
        problem=one_line(problem),
        answer=answer,
        remembered=remembered,
    )
