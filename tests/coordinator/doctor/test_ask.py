"""Who is missing, by what is remembered: real nodes on loopback."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from coordinator.doctor.ask import examine_fleet
from coordinator.doctor.machine import Examined
from node.doctor.finding import Finding
from node.home import home
from tests.fixtures.nodes import loopback, serving


@pytest.fixture(autouse=True)
def by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**loopback(), "TANDEM_BONJOUR": "off"}.items():
        monkeypatch.setenv(name, value)


def examine(wanted: str) -> Examined:
    return asyncio.run(examine_fleet(wanted, home()))


def found(examined: Examined, name: str, check: str) -> Finding:
    (finding,) = (
        finding
        for machine, findings in examined.machines
        for finding in findings
        if (machine.label, finding.check) == (name, check)
    )
    return finding


def test_a_paired_node_is_looked_for_where_it_has_answered(tmp_path: Path) -> None:
    with serving(tmp_path, "Air") as (air,):
        well = examine(f"auto,{air.address}")
        assert {machine.label for machine, _ in well.machines} >= {"Air"}
        assert found(examine("auto"), "Air", "reachable").verdict == "ok"
        air.process.send_signal(signal.SIGSTOP)
        try:
            frozen = found(examine("auto"), "home-Air", "answer")
        finally:
            air.process.send_signal(signal.SIGCONT)
        assert frozen.verdict == "wrong"
        assert f"{air.address}: it takes the connection, but nothing comes through" in frozen.seen
    gone = found(examine("auto"), "home-Air", "answer")  # as it was called when it was paired
    assert gone.verdict == "warning"
    assert f"it is paired, and was not found; where it answered last, {air.address}: nothing listens" in gone.seen


def test_nobody_else_is_missed_where_nobody_else_was_asked_for() -> None:
    assert [finding for finding in examine("local").general if finding.check == "nodes"] == []
    assert [finding.verdict for finding in examine("auto").general if finding.check == "nodes"] == ["warning"]
