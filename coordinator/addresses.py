"""Addresses of nodes that a person gave by hand: remembered for networks where Bonjour does not reach."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from node.errors import UserError
from node.files import make_private_folder, write_text_atomically
from node.names import HOST_AND_PORT, is_ip_address

MOST = 64


@dataclass(frozen=True)
class Remembered:
    """A node that answered at an address given by hand.

    Attributes:
        address: as it was given.
        id, name: of the node.
        fleet: ``TANDEM_FLEET`` at that time.
        seen: when it answered last; seconds since 1970.
        home: of the node; "" where an older version has noted it.
    """

    address: str
    id: str
    name: str
    fleet: str
    seen: float
    home: str = ""


def split_address(text: str) -> tuple[str, int] | None:
    """Host and port of ``host:port`` or ``[IPv6]:port``; None where the text is a name.

    Raises:
        UserError: a port that cannot be, or an address without one.
    """
    match = HOST_AND_PORT.fullmatch(text)
    if match is None:
        if not is_ip_address(text):
            return None
        shown = f"[{text.strip('[]')}]" if ":" in text else text
        raise UserError(f"--nodes {text}: give the port, too, as {shown}:PORT; `node serve` shows it")
    host, port = match[1] or match[2], int(match[3])
    if not 0 < port < 65536:
        raise UserError(f"--nodes {text}: {port} is no port; `node serve` shows the one to give")
    if match[1]:
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            raise UserError(f"--nodes {text}: {host} is no IPv6 address") from None
    return host, port


def load(home: Path, fleet: str) -> tuple[Remembered, ...]:
    """What is remembered of this fleet, the latest first. A file that cannot be read is as none."""
    return tuple(known for known in _load_all(home) if known.fleet == fleet)


def remember(home: Path, answered: Sequence[Remembered]) -> None:
    """Add these, or bring them up to date; the oldest beyond ``MOST`` are forgotten.

    Raises:
        OSError: the file cannot be written.
    """
    if not answered:
        return
    kept = {(known.fleet, known.address): known for known in _load_all(home)}
    kept.update({(known.fleet, known.address): known for known in answered})
    latest = sorted(kept.values(), key=lambda known: -known.seen)[:MOST]
    make_private_folder(home)
    write_text_atomically(_file(home), json.dumps([asdict(known) for known in latest], indent=1, ensure_ascii=False))


def _load_all(home: Path) -> list[Remembered]:
    try:
        found = [Remembered(**entry) for entry in json.loads(_file(home).read_text(encoding="utf-8"))]
        return sorted(found, key=lambda known: -known.seen)
    except (OSError, ValueError, TypeError):
        return []


def _file(home: Path) -> Path:
    return home / "addresses.json"
