"""The figures on the page about scaling are what the simulator says now."""

from __future__ import annotations

import re

import pytest

from coordinator.simulation.words import USUAL_WIRES
from coordinator.view.format import bits_text
from tests.docs.scaling import ADAPTERS, FULL, PAGE, SPEEDS, found_in, table


@pytest.mark.parametrize("job", [ADAPTERS, FULL])
def test_tables_are_of_now(job: str) -> None:
    assert found_in(PAGE.read_text(), job) == table(job), "python -m tests.docs.scaling writes them"


def test_assumptions_are_those_of_the_tables() -> None:
    page = PAGE.read_text()
    for speeds in SPEEDS.values():
        cells = " | ".join(str(speed) for speed in speeds.values())
        assert re.search(rf"^\| tokens/s, .* \| {re.escape(cells)} \|$", page, re.M)
    for name, wire in USUAL_WIRES.items():
        latency = f"{1000 * wire.link.latency_seconds:g} ms"
        assert f"| `{name}` | {bits_text(wire.link.bits_per_second)} | {latency} |" in page
