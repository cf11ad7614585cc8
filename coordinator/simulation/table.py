"""A simulated fleet for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.planner import TIMES
from coordinator.simulation.fleets import PAYS, Growth, More, Row
from coordinator.view.format import bits_text, speed_text
from node.sizes import show_size

HEADINGS = ("machines", "tokens/s", "step", "compute", "network", "waiting", "speed-up", "the last one adds")
NAMES_WIDTH = 34
MOST_LINKS = 3


def lines(found: Growth) -> list[str]:
    """A table with a line for each number of machines, whom the planner takes, and what one more gives."""
    rows = [HEADINGS, *(_cells(found, row, number) for number, row in enumerate(found.rows))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    told = [_aligned(row, widths) for row in rows]
    return [*about(found), "", *told, "", *_planned(found), *(more_text(found, more) for more in found.more)]


def about(found: Growth) -> list[str]:
    """What was assumed, in lines."""
    fleet, job = found.fleet, found.fleet.job
    rows = [len(step) for step in job.steps]
    tokens = sum(int(step.sum()) for step in job.steps) / sum(rows)
    usual = _wire_text(fleet.usual.link.bits_per_second, fleet.usual.medium)
    texts = {pair: _wire_text(wire.link.bits_per_second, wire.medium) for pair, wire in fleet.wires.items()}
    others = [f"{one} - {other}: {text}" for (one, other), text in texts.items() if text != usual]
    listed = "; ".join([*others[:MOST_LINKS], *(["…"] if len(others) > MOST_LINKS else [])])
    network = f"links {usual}" + (f" ({listed})" if listed else "")
    step = f"a step: {max(rows)} rows of {tokens:.0f} tokens on average; {show_size(job.gradient_bytes)} to add up"
    return [f"{step}; {network}"]


def _cells(found: Growth, row: Row, number: int) -> tuple[str, ...]:
    outcome = row.outcome
    before = found.rows[number - 1].machines if number else ()
    return (
        _names(row.machines, before),
        speed_text(outcome.tokens_per_second),
        _seconds(outcome.step_seconds),
        _seconds(outcome.compute_seconds),
        _seconds(outcome.network_seconds) if len(row.machines) > 1 else "-",
        _seconds(outcome.waiting_seconds) if len(row.machines) > 1 else "-",
        f"{row.speed_up:.2f} {TIMES}",
        "" if row.gain is None else f"{_percent(row.gain)}{_verdict(row)}",
    )


def _verdict(row: Row) -> str:
    return "" if row.pays else ", stops paying"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *middle, last = (
        cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *middle, last]).rstrip()


def _names(machines: Sequence[str], before: Sequence[str]) -> str:
    """Those that the row before has not; how many there are altogether."""
    added = [name for name in machines if name not in before]
    text = ", ".join(added) if len(added) < 3 else f"{added[0]} … {added[-1]}"
    text = f"+ {text}" if before else text
    return text if len(text) <= NAMES_WIDTH else f"{text[: NAMES_WIDTH - 1]}…"


def _planned(found: Growth) -> list[str]:
    names = [member.candidate.name for member in found.plan.members]
    told = f"all {len(names)} machines" if len(names) == found.fleet.size > 1 else ", ".join(names)
    if found.fleet.size == 1:
        return list(found.plan.advice)
    left = [f"{one.name} is left out: {one.reason}" for one in found.plan.left_out]
    return [f"the planner takes {told}", *left, *found.plan.advice]


def more_text(found: Growth, more: More) -> str:
    """What one more of a kind gives, in words."""
    text = f"one more {more.kind}: {_percent(more.gain)}, "
    text += "pays" if more.pays else f"stops paying (less than {100 * PAYS:.0f} %)"
    if more.stops_at is not None and more.stops_at > found.fleet.size + 1:
        text += f"; number {more.stops_at} would not"
    return text


def as_json(found: Growth) -> dict[str, Any]:
    """The same for programs: seconds, bytes, tokens per second; gains as parts of the speed."""
    job = found.fleet.job
    return {
        "job": {
            "rows": max(len(step) for step in job.steps),
            "mean_row_tokens": sum(int(step.sum()) for step in job.steps) / sum(len(step) for step in job.steps),
            "gradient_bytes": job.gradient_bytes,
        },
        "rows": [
            {
                "machines": list(row.machines),
                "tokens_per_second": row.outcome.tokens_per_second,
                "step_seconds": row.outcome.step_seconds,
                "compute_seconds": row.outcome.compute_seconds,
                "network_seconds": row.outcome.network_seconds,
                "waiting_seconds": row.outcome.waiting_seconds,
                "speed_up": row.speed_up,
                "gain": row.gain,
                "pays": row.pays,
            }
            for row in found.rows
        ],
        "planned": [member.candidate.name for member in found.plan.members],
        "left_out": [{"name": left.name, "reason": left.reason} for left in found.plan.left_out],
        "advice": list(found.plan.advice),
        "one_more": [
            {"kind": more.kind, "gain": more.gain, "pays": more.pays, "stops_at": more.stops_at} for more in found.more
        ],
    }


def _wire_text(bits_per_second: float, medium: str) -> str:
    shared = {"cable": "cables", "switch": "at a switch", "air": "in the air"}[medium]
    return f"{bits_text(bits_per_second)} {shared}"


def _percent(gain: float) -> str:
    return f"{100 * gain:+.0f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
