"""Verdicts on how one machine is reached, and what it may reach."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence

from node.doctor.facts import MachineFacts
from node.doctor.finding import REACHED, Finding
from node.doctor.readings import FIREWALL
from node.info import DEFAULT_PORT

BY_HAND = "give addresses: --nodes HOST:PORT"
MULTICAST_MEND = (
    "allow UDP port 5353 in the firewall, and multicast in the router (no client isolation, no IGMP snooping);"
    f" until then {BY_HAND}"
)


def allow_mend(*, is_mac: bool, python: str | None = None, sources: Sequence[str] = ()) -> str:
    """How connections to this program are let through the firewall of its machine.

    Args:
        is_mac: whether that is macOS's.
        python: the program; None where it is not known.
        sources: addresses or networks that connections come from, where it is not macOS's.
    """
    if not is_mac:
        # Not the ports: the relay has another one each time.
        commands = " && ".join(f"sudo ufw allow proto tcp from {source}" for source in dict.fromkeys(sources))
        return f"{commands}, or as your firewall has it" if commands else "let TCP from the local network through"
    name = shlex.quote(python) if python else ""
    command = f"sudo {FIREWALL} --add {name} --unblockapp {name}, or " if name else ""
    return f"{command}System Settings › Network › Firewall › Options: allow Python; then start `node serve` again"


def leave_mend(*, is_mac: bool) -> str:
    """How this program is let out to others by the system of its machine."""
    if is_mac:
        return (
            "System Settings › Privacy & Security › Local Network: switch the program on that starts it (Terminal,"
            " Python); where launchd starts it, let it run as a LaunchDaemon with a UserName"
        )
    return "look at `ip route` and at the rules of the firewall for what goes out"


def local_network(facts: MachineFacts) -> Finding:
    """That this very program gets out to others: macOS asks for a permission, for each program by itself."""
    outside = [item for item in facts.reached if not item.address.startswith("127.")]
    reached = [item for item in outside if item.outcome in REACHED]
    if reached:
        return Finding("local-network", "ok", f"this program reaches {reached[0].address}")
    if not outside:
        return Finding("local-network", "unknown", "there is no other machine to be reached, and no router")
    tried = ", ".join(f"{item.address} ({item.reason or item.outcome})" for item in outside[:3])
    if all(item.outcome == "denied" for item in outside):
        mend, who = leave_mend(is_mac=facts.readings.is_mac), "macOS" if facts.readings.is_mac else "the system"
        return Finding("local-network", "wrong", f"{who} lets this program reach nobody: {tried}", mend)
    return Finding("local-network", "unknown", f"nobody answers: {tried}")


def firewall(facts: MachineFacts) -> Finding:
    """What the machine's own firewall does."""
    found, python = facts.readings.firewall, os.path.realpath(sys.executable)
    if not facts.readings.is_mac:
        seen = "its rules are not read; whether others get through is tried by them"
        mend = allow_mend(is_mac=False, sources=facts.networks) if facts.networks else ""
        return Finding("firewall", "unknown", seen, mend)
    if found.on is None:
        return Finding("firewall", "unknown", "socketfilterfw does not tell whether it is on")
    if not found.on:
        return Finding("firewall", "ok", "macOS's firewall is off")
    if found.blocks_all:
        mend = f"sudo {FIREWALL} --setblockall off, or System Settings › Network › Firewall › Options"
        return Finding("firewall", "wrong", "macOS's firewall blocks all incoming connections", mend)
    if found.blocks_us:
        return Finding("firewall", "wrong", f"macOS's firewall blocks {python}", allow_mend(is_mac=True, python=python))
    seen = f"on; whether it lets {python} be reached it does not tell, only others can try"
    return Finding("firewall", "unknown", seen, allow_mend(is_mac=True, python=python))


def multicast(facts: MachineFacts) -> Finding:
    """That an advert of our own comes back by Bonjour."""
    heard = facts.heard
    if heard.off:
        return Finding("multicast", "warning", heard.trouble, f"unset TANDEM_BONJOUR, or {BY_HAND}")
    if heard.self_heard is None:
        return Finding("multicast", "wrong", heard.trouble or "it could not be tried", MULTICAST_MEND)
    others = f"; {len(heard.ids)} {'node' if len(heard.ids) == 1 else 'nodes'} beside it heard"
    if not heard.self_heard:
        return Finding("multicast", "wrong", f"its own Bonjour advert did not come back{others}", MULTICAST_MEND)
    return Finding("multicast", "ok", f"its own Bonjour advert came back{others}")


def ports(facts: MachineFacts) -> Finding:
    """Where the node listens, and who has the usual port."""
    found = facts.serving
    if not found.port:
        taken = f"; port {DEFAULT_PORT} is taken by {found.usual_port_taken_by}" if found.usual_port_taken_by else ""
        return Finding("ports", "warning", f"no node serves here{taken}", "node serve")
    seen = f"the service listens on {found.port}, the relay on {found.relay_port}"
    if found.connected is False:
        mend = "Ctrl-C and `node serve` again; if that does not help, look at its log"
        return Finding("ports", "wrong", f"nobody answers on port {found.port} of this very machine", mend)
    if found.remark:
        who = f" ({found.usual_port_taken_by})" if found.usual_port_taken_by else ""
        mend = f"end what listens on {DEFAULT_PORT}, and start `node serve` again"
        return Finding("ports", "warning", f"{found.remark}{who}", mend)
    if found.connected is None:
        return Finding("ports", "unknown", f"{seen}; not tried")
    return Finding("ports", "ok", seen)


def interfaces(facts: MachineFacts) -> Finding:
    """Ways to other machines."""
    outside = [item for item in facts.info.interfaces if item.kind != "loopback"]
    if not outside:
        return Finding("interfaces", "wrong", "no network address", "plug a cable in, or join a Wi-Fi network")
    shown = []
    for item in outside:
        speed = facts.readings.speeds.get(item.name, "")
        shown.append(f"{item.name} {item.kind}{f' {speed}' if speed else ''} {item.address}")
    seen = ", ".join(shown)
    if all(item.kind == "wifi" for item in outside):
        mend = "a Thunderbolt or Ethernet cable is many times faster"
        return Finding("interfaces", "warning", f"{seen}: Wi-Fi only", mend)
    return Finding("interfaces", "ok", seen)


NETWORK_CHECKS: tuple[Callable[[MachineFacts], Finding], ...] = (
    *(interfaces, local_network, firewall, multicast, ports),
)
