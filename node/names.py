"""What a node may be called: names that ``--nodes`` can tell from everything else it takes."""

from __future__ import annotations

import ipaddress
import re

AUTO, LOCAL = "auto", "local"
"""Words of ``--nodes``: everyone who is there, and this machine."""
HOST_AND_PORT = re.compile(r"(?:\[([^\]\s]+)\]|([^:\s]+)):(\d+)")
"""The whole of ``host:port`` or ``[IPv6]:port``."""
LONGEST = 60
FALLBACK = "mac"


def is_ip_address(text: str) -> bool:
    """Whether this is an address without a port, in brackets or not."""
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def name_problem(name: str) -> str:
    """Why ``--nodes`` could not take this for a node's name, as the end of a sentence; "" when it can."""
    if not name.strip():
        return "a node needs a name"
    if name != name.strip():
        return "a name neither begins nor ends with a blank"
    if len(name) > LONGEST or not name.isprintable():
        return f"a name has at most {LONGEST} characters, all of which can be printed"
    if "," in name:
        return "--nodes has commas between names, so a name has none"
    if name.casefold() in (AUTO, LOCAL):
        return f"--nodes {name.casefold()} means something else"
    if HOST_AND_PORT.fullmatch(name) or is_ip_address(name):
        return "--nodes would take it for an address"
    return ""


def usable_name(name: str | None) -> str:
    """A machine's own name as a node's: what ``--nodes`` could not take is left out of it."""
    printable = "".join(character if character.isprintable() else " " for character in name or "")
    cleaned = " ".join(printable.replace(",", " ").split())[:LONGEST].strip()
    return cleaned if not name_problem(cleaned) else FALLBACK
