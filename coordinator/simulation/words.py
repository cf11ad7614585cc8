"""Machines and links as people write them: ``Studio: 12000``, ``4 x mini: 2500``, ``Studio - Air: thunderbolt``."""

from __future__ import annotations

import math
import re

from coordinator.ring_order import Link
from coordinator.simulation.fleets import MOST_MACHINES, Kind, Wire, speed_of
from coordinator.simulation.network import MEDIA
from node.errors import UserError

MS = 1e-3
# What such links carry between two programs, and one way's delay: assumptions, as on the page about scaling.
USUAL_WIRES = {
    "wifi": Wire(Link(300e6, 3.0 * MS), "air"),
    "ethernet": Wire(Link(940e6, 0.3 * MS), "switch"),
    "10gbe": Wire(Link(9.4e9, 0.15 * MS), "switch"),
    "thunderbolt": Wire(Link(16e9, 0.1 * MS), "cable"),
}
_COUNTED = re.compile(r"^(\d+)\s*(?:x\s+|\*\s*)(.+)$")
_RATE = re.compile(
    r"^(\d+(?:\.\d+)?)\s*([mg])(?:bit(?:/s)?|bps)(?:\s+(\d+(?:\.\d+)?)\s*ms)?(?:\s+(\w+))?$", re.IGNORECASE
)
_USUAL_LATENCY_SECONDS = 0.3 * MS
MACHINE_FORM = 'write it as "NAME: TOKENS_PER_SECOND" or "COUNT x NAME: TOKENS_PER_SECOND"'
LINK_FORM = f'write {", ".join(USUAL_WIRES)}, or a rate as "1 Gbit/s", "200 Mbit/s 5 ms" or "16 Gbit/s 0.1 ms cable"'


def parse_machine(text: str, option: str) -> Kind:
    """A machine, or several alike.

    Args:
        text: as people write it.
        option: where it stands.

    Raises:
        UserError: it cannot be meant.
    """
    head, colon, tail = (part.strip() for part in text.rpartition(":"))
    counted = _COUNTED.match(head)
    name, count = (counted[2].strip(), int(counted[1])) if counted else (head, 1)
    if not colon or not name:
        raise UserError(f"{option} {text!r}: {MACHINE_FORM}")
    try:
        tokens_per_second = float(tail.replace(",", "").replace("_", ""))
    except ValueError:
        tokens_per_second = math.nan
    if not (tokens_per_second > 0 and math.isfinite(tokens_per_second)):
        raise UserError(f"{option} {text!r}: {tail!r} is no number of tokens per second above 0; {MACHINE_FORM}")
    if not 1 <= count <= MOST_MACHINES:
        raise UserError(f"{option} {text!r}: 1 to {MOST_MACHINES} machines can be simulated, not {count}")
    return Kind(name, speed_of(tokens_per_second), count)


def parse_link(text: str, names: list[str], option: str) -> tuple[tuple[str, str] | None, Wire]:
    """A link between all machines, or between two kinds of them.

    Args:
        text: as people write it.
        names: of the kinds that there are.
        option: where it stands.

    Returns:
        The names of two kinds, or None for all; and what is between them.

    Raises:
        UserError: it cannot be meant.
    """
    head, colon, tail = (part.strip() for part in text.rpartition(":"))
    wire = _wire(tail)
    if wire is None:
        raise UserError(f"{option} {text!r}: {tail!r} is no link; {LINK_FORM}")
    if not colon:
        return None, wire
    for at in (match.start() for match in re.finditer("-", head)):
        one, other = head[:at].strip(), head[at + 1 :].strip()
        if one in names and other in names:
            return (one, other), wire
    raise UserError(f'{option} {text!r}: name two of the machines, as in "{names[0]} - {names[-1]}: {tail}"')


def _wire(text: str) -> Wire | None:
    """A link by its usual name, or by its rate; None where it is neither."""
    usual = USUAL_WIRES.get(text.lower().replace("-", "").replace(" ", ""))
    match = _RATE.match(text)
    if usual is not None or match is None:
        return usual
    rate = float(match[1]) * (1e9 if match[2].lower() == "g" else 1e6)
    medium = next((medium for medium in MEDIA if medium == (match[4] or "switch").lower()), None)
    if rate <= 0 or medium is None:
        return None
    return Wire(Link(rate, float(match[3]) * MS if match[3] else _USUAL_LATENCY_SECONDS), medium)
