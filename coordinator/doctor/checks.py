"""Verdicts that take several machines, from facts alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.discovery import NOT_PAIRED, SILENT, mismatch
from coordinator.doctor.machine import Machine, outcome_at, refused_at
from coordinator.links import Paths, worth_measuring
from coordinator.view.format import one_line, shortened
from node.doctor.finding import Finding, Outcome, Verdict
from node.doctor.network_checks import MULTICAST_MEND, allow_mend, leave_mend
from node.hardware import Facts

CLOCK_WARNING_SECONDS, CLOCK_WRONG_SECONDS = 2.0, 60.0
SLOW_BITS_PER_SECOND = 100e6
"""Over a slower link, sums take longer than computing for all but small adapters."""
SLOW_SECONDS = 0.02
"""For a small message one way."""
MOST_REASON = 200
"""Characters that are shown of why another machine did not try something."""
FORGOTTEN = "pair the two again"
"""Ends the problem of a node that trusts us no more."""

_CLOCK_MEND = (
    "macOS: System Settings › General › Date & Time: set automatically, or sudo sntp -sS time.apple.com;"
    " Linux: sudo timedatectl set-ntp true"
)
_ANSWERS: Mapping[Outcome | None, str] = {
    "silent": "no answer",
    "refuses": "nothing listens there",
    "answers": "it takes the connection, but nothing comes through",
    "denied": "the system of the machine that asks does not let it",
    "failed": "the connection fails",
    "untried": "not tried",
    None: "not tried",
}


@dataclass(frozen=True)
class Measured:
    """Links between machines.

    Attributes:
        paths: by id; None when nothing was measured.
        busy: names of machines that train and were left alone.
    """

    paths: Paths | None = None
    busy: tuple[str, ...] = ()


def check_together(
    machine: Machine, machines: Sequence[Machine], measured: Measured, ours: Facts
) -> tuple[Finding, ...]:
    """What the others tell of one machine.

    Args:
        machine: this one.
        machines: all, this one among them.
        measured: between those that answered.
        ours: of the machine that trains, for its versions.
    """
    if machine.diagnosis is None:
        return (no_answer(machine, ours),)
    answered = [one for one in machines if one.diagnosis is not None]
    found = [versions(machine, ours), clock(machine, answered)]
    if len(answered) > 1:
        found += [heard(machine, answered), reachable(machine, answered, measured)]
    return tuple(finding for finding in found if finding is not None)


def no_answer(machine: Machine, ours: Facts) -> Finding:
    """Why a machine gives no diagnosis.

    Args:
        machine: this one.
        ours: of the machine that asks, for what mends it there.
    """
    problem, name = machine.problem or SILENT, shlex.quote(machine.label)
    if machine.remembered and problem.startswith(NOT_PAIRED):
        mend = f"run `node serve` on {machine.label}, wake it, or give its address: --nodes auto,HOST:PORT"
        seen = f"it is paired, and was not found; another machine answers at its last address, {machine.address}"
        return Finding("answer", "unknown", seen, mend)
    if problem.startswith(NOT_PAIRED):
        return Finding("pairing", "warning", "not paired with this machine", f"coordinator pair {name}")
    if FORGOTTEN in problem:
        mend = f"coordinator unpair {name}; `node pair` there; coordinator pair {name}"
        return Finding("pairing", "wrong", problem, mend)
    if problem != SILENT:
        seen, _, mend = problem.rpartition("; ")
        return Finding("answer", "wrong", seen or mend, mend if seen else "install the same mlx-tandem on both")
    outcome = machine.answer.outcome if machine.answer is not None else None
    seen = f"{machine.address}: {_ANSWERS[outcome]}"
    mend = {
        "refuses": "run `node serve` there, or give the port that it says there: --nodes HOST:PORT",
        "answers": f"it is frozen, overloaded, or another program: look at `node doctor` on {machine.label}",
        "denied": leave_mend(is_mac=_is_mac(ours)),
    }.get(outcome or "", "wake it, plug it in; or its firewall is in the way: `node doctor` there says what opens it")
    if not machine.remembered:
        return Finding("answer", "wrong", seen, mend)
    # Nobody has asked for it, and who is switched off is not at fault.
    verdicts: Mapping[Outcome | None, Verdict] = {"answers": "wrong", "refuses": "warning", "denied": "warning"}
    where = f"it is paired, and was not found; where it answered last, {seen}"
    return Finding("answer", verdicts.get(outcome, "unknown"), where, mend)


def versions(machine: Machine, ours: Facts) -> Finding | None:
    """That its MLX goes with ours; None for our own."""
    if machine.own:
        return None
    problem = mismatch(ours, machine.info)
    if problem:
        seen, _, mend = problem.rpartition("; ")
        return Finding("versions", "wrong", seen, mend)
    if None in (ours.mlx, ours.mlx_lm):
        return Finding("versions", "unknown", "this machine's own mlx or mlx-lm is not known")
    return Finding("versions", "ok", "mlx and mlx-lm go with those here")


def clock(machine: Machine, answered: Sequence[Machine]) -> Finding:
    """Its clock against those of most others; of two that differ, ours counts."""
    if machine.clock is None:
        return Finding("clock", "unknown", "it was not compared")
    if len(answered) < 2:
        return Finding("clock", "unknown", "there is no other machine to compare it with")
    clocks = [one.clock.ahead_seconds for one in answered if one.clock is not None]
    own = next((one.clock.ahead_seconds for one in answered if one.own and one.clock is not None), 0.0)

    def agreeing(time: float) -> tuple[int, bool]:
        return sum(abs(time - other) <= CLOCK_WARNING_SECONDS for other in clocks), time == own

    ahead = machine.clock.ahead_seconds - max(clocks, key=agreeing)
    off, unsure = abs(ahead), machine.clock.uncertain_seconds
    if off <= CLOCK_WARNING_SECONDS:
        return Finding("clock", "ok", f"within {max(off, unsure, 0.1):.1f} s of the others")
    seen = f"{off:.0f} s {'ahead of' if ahead > 0 else 'behind'} the others (± {max(unsure, 0.1):.1f} s)"
    if off - unsure <= CLOCK_WARNING_SECONDS:
        return Finding("clock", "unknown", f"{seen}: the network is too slow to tell")
    verdict: Verdict = "wrong" if off - unsure > CLOCK_WRONG_SECONDS else "warning"
    return Finding("clock", verdict, f"{seen}; times in logs, tokens and held states rest on it", _CLOCK_MEND)


def heard(machine: Machine, answered: Sequence[Machine]) -> Finding | None:
    """Who hears its Bonjour advert, and whose it hears; None where it takes no part in Bonjour."""
    taking_part = [one for one in answered if one.diagnosis is not None and one.diagnosis.bonjour]
    if machine not in taking_part:
        return None

    def hears(one: Machine, other: Machine) -> bool:
        return one.diagnosis is not None and other.info.id in one.diagnosis.heard

    def deaf(one: Machine) -> bool:
        others = [other for other in taking_part if other is not one and other.advertised]
        return bool(others) and not any(hears(one, other) for other in others)

    def mute(one: Machine) -> bool:
        others = [other for other in taking_part if other is not one]
        return one.advertised and bool(others) and not any(hears(other, one) for other in others)

    if deaf(machine) or mute(machine):
        parts = (["hears no other node"] if deaf(machine) else []) + (["is heard by none"] if mute(machine) else [])
        return Finding("bonjour", "wrong", f"it {' and '.join(parts)}: multicast does not get through", MULTICAST_MEND)
    others = [one for one in taking_part if one is not machine and not deaf(one) and not mute(one)]
    missed = [one.label for one in others if one.advertised and not hears(machine, one)]
    if missed:
        return Finding("bonjour", "warning", f"it does not hear {', '.join(missed)}", MULTICAST_MEND)
    if not others:
        return Finding("bonjour", "unknown", "no other node could be heard, or hear it")
    heard_ones = [one.label for one in others if one.advertised]
    if not heard_ones:
        return Finding("bonjour", "unknown", "there is no other node that it could hear")
    return Finding("bonjour", "ok", f"it hears {', '.join(heard_ones)}")


def reachable(machine: Machine, answered: Sequence[Machine], measured: Measured) -> Finding:
    """Whether the others get to its service and its relay."""
    others = [one for one in answered if one is not machine]
    service = {one.label: outcome_at(one, machine.service_seen_from(one.info)) for one in others}
    relay = {one.label: _to_relay(one, machine, measured.paths) for one in others}
    told, failing, outcomes, cut_off = [], 0, set(), set()
    for what, port, found in (
        ("service", machine.port, service),
        ("relay", machine.info.relay_port, relay),
    ):
        short = {label: outcome for label, outcome in found.items() if outcome not in ("answers", None)}
        if short:
            failing = max(failing, len(short))
            cut_off |= set(short)
            outcomes |= set(short.values())
            who = ", ".join(f"{label} ({_ANSWERS[outcome]})" for label, outcome in short.items())
            told.append(f"the {what}'s port {port} is not reached by {who}")
    if told:
        mend = f"on {machine.label}: {_opened(machine, [one for one in others if one.label in cut_off])}"
        if outcomes <= {"denied"}:
            mend = "on those that ask: `node doctor` says what lets them out"
        elif outcomes <= {"refuses"}:
            mend = f"on {machine.label}: start `node serve` again"
        return Finding("reachable", "wrong" if failing == len(others) else "warning", "; ".join(told), mend)
    untried = {}
    for one in others:
        for found, at in ((service, machine.service_seen_from(one.info)), (relay, machine.relay_seen_from(one.info))):
            if found[one.label] is None and one.label not in untried:
                why = shortened(one_line(refused_at(one, at)), MOST_REASON)
                untried[one.label] = f"{one.label} ({why})" if why else one.label
    if untried:
        return Finding("reachable", "unknown", f"not tried by {', '.join(untried.values())}")
    ports = f"ports {machine.port} and {machine.info.relay_port}"
    return Finding("reachable", "ok", f"{ports} are reached by {', '.join(service)}")


def _opened(machine: Machine, others: Sequence[Machine]) -> str:
    """How others get through the firewall of a machine: as it says itself, which knows its program."""
    said = machine.diagnosis.findings if machine.diagnosis is not None else ()
    by_itself = next((finding.mend for finding in said if finding.check == "firewall" and finding.mend), "")
    sources = [at.rpartition(":")[0] for one in others for at in one.service_seen_from(machine.info)[:1]]
    return by_itself or allow_mend(is_mac=_is_mac(machine.info.facts), sources=sources)


def _is_mac(facts: Facts) -> bool:
    return (facts.os or "").startswith("macOS")


def _to_relay(one: Machine, other: Machine, paths: Paths | None) -> Outcome | None:
    """What came of the way to a relay. That a connection is taken shows nothing: macOS's firewall takes it, too."""
    outcome = outcome_at(one, other.relay_seen_from(one.info))
    if paths is None or (one.info.id, other.info.id) not in paths.found:
        return outcome
    if paths.found[one.info.id, other.info.id]:
        return "answers"
    return "failed" if outcome == "answers" else outcome


def check_links(answered: Sequence[Machine], measured: Measured) -> tuple[Finding, ...]:
    """Speed of each pair's link."""
    infos = {one.info.id: one.info for one in answered}
    names = {one.info.id: one.label for one in answered}
    found, order = [], list(infos)
    for pair in sorted(worth_measuring(infos), key=lambda pair: sorted(map(order.index, pair))):
        one, other = sorted(pair, key=order.index)
        found.append(_link(one, other, names, measured))
    return tuple(found)


def _link(one: str, other: str, names: Mapping[str, str], measured: Measured) -> Finding:
    heading, paths = f"{names[one]} ↔ {names[other]}", measured.paths
    if paths is None or (one, other) not in paths.found or (other, one) not in paths.found:
        busy = [name for name in (names[one], names[other]) if name in measured.busy]
        return Finding("link", "unknown", f"{heading}: not measured{f', {busy[0]} trains' if busy else ''}")
    lost = [(start, end) for start, end in ((one, other), (other, one)) if not paths.found[start, end]]
    if lost:
        ways = " and ".join(f"{names[start]} does not reach {names[end]}" for start, end in lost)
        mend = f"see what is said of {names[lost[0][1]]}: its ports must be reached"
        return Finding("link", "wrong", f"{heading}: {ways}", mend)
    forth, back = paths.found[one, other][0], paths.found[other, one][0]
    bits = min(forth.bits_per_second, back.bits_per_second)
    latency = max(forth.latency_seconds, back.latency_seconds) / 2
    seen = paths.describe(one, other)
    if bits < SLOW_BITS_PER_SECOND or latency > SLOW_SECONDS:
        return Finding("link", "warning", f"{seen}: slow", "a Thunderbolt or Ethernet cable between the two")
    return Finding("link", "ok", seen)
