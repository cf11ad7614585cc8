"""``python -m tests.docs.scaling``: the tables of ``docs/scaling.md``, from its assumptions, written into the page."""

from __future__ import annotations

import re

from coordinator.planner import JobFacts
from coordinator.simulation.fleets import Fleet, Growth, Kind, growth, speed_of, typical_rows
from coordinator.simulation.words import USUAL_WIRES
from tests.fixtures.commands import ROOT

PAGE = ROOT / "docs" / "scaling.md"
ROWS, ROW_LENGTH, MAX_SEQ_LENGTH = 16, 512, 2048
ADAPTERS, FULL = "adapters", "full"
GRADIENT_BYTES = {ADAPTERS: 20 << 20, FULL: 4 << 30}
SPEEDS = {
    ADAPTERS: {"Studio": 500, "MacBook Pro": 250, "mini": 120, "Air": 60},
    FULL: {"Studio": 3000, "MacBook Pro": 1500, "mini": 700, "Air": 360},
}
FLEETS: tuple[tuple[str, dict[str, int], str], ...] = (
    ("two Airs on Wi-Fi", {"Air": 2}, "wifi"),
    ("a Studio and an Air on Wi-Fi", {"Studio": 1, "Air": 1}, "wifi"),
    ("a Studio and a MacBook Pro, Thunderbolt", {"Studio": 1, "MacBook Pro": 1}, "thunderbolt"),
    ("three minis, 1 Gbit/s", {"mini": 3}, "ethernet"),
    ("three minis, 10 Gbit/s", {"mini": 3}, "10gbe"),
    ("three minis, Thunderbolt", {"mini": 3}, "thunderbolt"),
    ("four minis, 1 Gbit/s", {"mini": 4}, "ethernet"),
    ("four minis, 10 Gbit/s", {"mini": 4}, "10gbe"),
    ("four minis, Thunderbolt", {"mini": 4}, "thunderbolt"),
)
HEADING = "| fleet | speed-up | step | of it network | one more |\n|---|---|---|---|---|\n"
_TABLE = r"(<a id=\"{name}\"></a>\n\n)(?:\|.*\n)*"


def fleet(kinds: dict[str, int], wire: str, job: str) -> Fleet:
    """One of the page's."""
    facts = JobFacts(typical_rows(ROWS, ROW_LENGTH, MAX_SEQ_LENGTH), MAX_SEQ_LENGTH, ROWS, 1, GRADIENT_BYTES[job])
    members = tuple(Kind(name, speed_of(SPEEDS[job][name]), count) for name, count in kinds.items())
    return Fleet(members, facts, USUAL_WIRES[wire])


def line(label: str, found: Growth) -> str:
    """Of one fleet."""
    last = found.rows[-1]
    seconds = last.outcome.step_seconds
    network = 100 * last.outcome.network_seconds / seconds
    more = found.more[-1]
    gain = f"{more.kind}: {100 * more.gain:+.0f} %"
    step = f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"| {label} | {last.speed_up:.2f} | {step} | {network:.0f} % | {gain} |\n"


def table(job: str) -> str:
    """Of all fleets."""
    return HEADING + "".join(line(label, growth(fleet(kinds, wire, job))) for label, kinds, wire in FLEETS)


def found_in(page: str, job: str) -> str:
    """The table as it stands there."""
    match = re.search(_TABLE.format(name=job), page)
    assert match is not None, f"{PAGE.name} has no place for the table {job}"
    return match[0].removeprefix(match[1])


def main() -> None:
    """Write the tables."""
    page = PAGE.read_text()
    for job in (ADAPTERS, FULL):
        made = table(job)
        page = re.sub(_TABLE.format(name=job), lambda match, made=made: match[1] + made, page)  # type: ignore[misc]
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
