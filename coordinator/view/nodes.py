"""Nodes as a table and as data. What is unknown says so."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from coordinator.discovery import Found, SeenNode, unusable, what_to_do
from coordinator.pressure import HEAT_WORDS, MEMORY_WORDS
from coordinator.view.format import GIB, one_line
from node.hardware import Facts
from node.info import Busy, NodeInfo
from node.peers import fingerprint, shown

UNKNOWN = "unknown"
SHORT_GROUPS = 3
"""Of four digits of a fingerprint, in the table."""
_BLANKS_AT_THE_END = re.compile(r" +((?:\x1b\[[0-9;]*m)*) *$")
COLUMNS = ("name", "chip", "memory", "system", "mlx", "mlx-lm", "load", "power", "address", "fingerprint", "state")


def state_text(seen: SeenNode, ours: Facts, now: float) -> str:
    """What a node does, or why it cannot be used.

    Args:
        seen: the node.
        ours: this machine's facts, for its versions.
        now: seconds since 1970.
    """
    if seen.info is not None and not seen.problem:
        if seen.info.busy is not None:
            return _busy_text(seen.info.busy, now)
        if seen.info.paused:
            return "paused"
    return one_line(unusable(seen, ours)) or "free"


def table_row(seen: SeenNode, ours: Facts, now: float) -> tuple[str, ...]:
    """One row, in the order of ``COLUMNS``."""
    name = one_line(seen.label) + (" (here)" if seen.own else "")
    cells = [UNKNOWN] * (len(COLUMNS) - 4) if seen.info is None else _info_cells(seen.info)
    return (name, *cells, seen.address, _short_mark(seen), state_text(seen, ours, now))


def _short_mark(seen: SeenNode) -> str:
    """The beginning of the fingerprint by which a paired node is known: enough for `coordinator unpair`."""
    return "" if seen.certificate is None else " ".join(shown(fingerprint(seen.certificate)).split()[:SHORT_GROUPS])


def as_data(found: Found, nodes: Sequence[SeenNode], ours: Facts, now: float) -> dict[str, Any]:
    """All of it for programs; null where a thing is unknown."""
    return {
        "nodes": [
            {
                "name": seen.name,
                "label": seen.label,
                "id": seen.id or None,
                "address": seen.address,
                "own": seen.own,
                "fingerprint": None if seen.certificate is None else fingerprint(seen.certificate),
                "state": state_text(seen, ours, now),
                "problem": seen.problem or None,
                "info": None if seen.info is None else _info_data(seen.info),
            }
            for seen in nodes
        ],
        "looked_seconds": round(found.seconds, 2),
        "trouble": found.trouble or None,
    }


def closing_line(found: Found, count: int) -> str:
    """How long it was looked, and what to do when nobody was found."""
    looked = f"looked {found.seconds:.1f} s"
    if count:
        trouble = f"; {found.trouble}: only known addresses were asked" if found.trouble else ""
        return f"{count} {'node' if count == 1 else 'nodes'}, {looked}{trouble}"
    trouble = f"{found.trouble}. " if found.trouble else ""
    return f"No node found, {looked}. {trouble}To mend it: {what_to_do()}"


def print_table(found: Found, nodes: Sequence[SeenNode], ours: Facts) -> None:
    """Write the table to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 240  # what reads a pipe has no margin
    if nodes:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in COLUMNS:
            table.add_column(column, overflow="fold", justify="right" if column == "load" else "left")
        now = time.time()
        for seen in nodes:
            cells = table_row(seen, ours, now)
            style = {"free": "green"}.get(cells[-1], "yellow")
            table.add_row(*(Text(cell) for cell in cells[:-1]), Text(cells[-1], style))
        with console.capture() as drawn:
            console.print(table)
        # Cells are filled up to their column's width, the last ones for nobody; colours end after that.
        sys.stdout.writelines(_BLANKS_AT_THE_END.sub(r"\1", line) + "\n" for line in drawn.get().splitlines())
    console.print(Text(closing_line(found, len(nodes))), soft_wrap=True)


def _busy_text(busy: Busy, now: float) -> str:
    since = time.localtime(busy.since)
    today = time.localtime(now)[:3] == since[:3]
    when = time.strftime("%H:%M" if today else "%d %b %H:%M", since)
    return one_line(f"training {busy.run} for {busy.owner} since {when}")


def _info_cells(info: NodeInfo) -> list[str]:
    found = info.facts
    load = UNKNOWN if info.load < 0 else f"{info.load:.2f}"
    texts = [found.chip, _memory_text(info), found.os, found.mlx, found.mlx_lm, load, _power_text(info)]
    return [one_line(text) if text else UNKNOWN for text in texts]


def _memory_text(info: NodeInfo) -> str:
    total, free = info.facts.total_memory_bytes, info.facts.free_memory_bytes
    texts = [UNKNOWN if size is None else f"{size / GIB:.0f}" for size in (total, free)]
    limit = f", at most {info.max_memory_bytes / GIB:.0f}" if info.max_memory_bytes else ""
    return f"{texts[0]} GB ({texts[1]} free{limit})" if total is not None else f"{UNKNOWN} ({texts[1]} free{limit})"


def _power_text(info: NodeInfo) -> str:
    """What it runs on, and what presses it where that is known and not good: ``battery, memory yellow, hot``."""
    power = {"yes": "battery", "no": "mains"}.get(info.on_battery, UNKNOWN)
    memory, heat = MEMORY_WORDS.get(info.memory_pressure), HEAT_WORDS.get(info.thermal_pressure)
    return ", ".join([power, *([f"memory {memory}"] if memory else []), *([heat] if heat else [])])


def _info_data(info: NodeInfo) -> dict[str, Any]:
    data = dataclasses.asdict(info)
    return data | {
        "load": info.load if info.load >= 0 else None,
        "max_memory_bytes": info.max_memory_bytes or None,
        "on_battery": {"yes": True, "no": False}.get(info.on_battery),
        "memory_pressure": None if info.memory_pressure == UNKNOWN else info.memory_pressure,
        "thermal_pressure": None if info.thermal_pressure == UNKNOWN else info.thermal_pressure,
    }
