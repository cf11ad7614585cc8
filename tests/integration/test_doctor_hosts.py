"""``coordinator doctor`` on three hosts, one of which is broken in five ways: it names all five, and no others."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.disks import own_disk
from tests.fixtures.hosts import Host, hosts, switch_available
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair
from tests.fixtures.switch import Switch
from tests.integration.test_fleet_hosts import environment_of

REASON = switch_available()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow]

COORDINATOR = str(Path(sys.executable).parent / "coordinator")
AN_HOUR = "import time\n_real = time.time\ntime.time = lambda: _real() + 3600.0\n"
"""For every process that has it on its path: its clock is an hour ahead."""
OLD_MLX = "Metadata-Version: 2.1\nName: mlx\nVersion: 0.31.0\n"


def packages(folder: Path) -> dict[str, str]:
    """An environment with a clock that is wrong, and an MLX that calls itself old."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(AN_HOUR)
    (folder / "mlx-0.31.0.dist-info").mkdir()
    (folder / "mlx-0.31.0.dist-info" / "METADATA").write_text(OLD_MLX)
    return {"PYTHONPATH": str(folder)}


def doctor(host: Host, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*host.prefix, COORDINATOR, "doctor", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def wrong(findings: list[dict[str, Any]]) -> set[str]:
    return {finding["check"] for finding in findings if finding["verdict"] == "wrong"}


@pytest.mark.timeout(290)
def test_all_five_faults_of_a_machine_are_named_and_the_others_are_well(tmp_path: Path) -> None:
    homes = {name: tmp_path / f"home-{name}" for name in ("anna", "ben", "cleo")}
    broken, switch = packages(tmp_path / "packages"), Switch()
    with hosts(3, switch=switch) as lab, own_disk(homes["cleo"]) as disk, contextlib.ExitStack() as stack:
        environments = {name: environment_of(host, homes[name]) for name, host in zip(homes, lab, strict=True)}
        environments["cleo"] |= broken
        nodes = {
            name: stack.enter_context(
                ServingNode(
                    name, homes[name], environment=environments[name], prefix=host.prefix, friends=[homes["anna"]]
                )
            )
            for name, host in zip(homes, lab, strict=True)
        }
        pair(homes["ben"], homes["cleo"])
        anna, _, cleo = lab
        here = environments["anna"]
        address = f"{cleo.address}:{nodes['cleo'].port}"

        well = json.loads(doctor(anna, here, "--json", "--nodes", "auto").stdout)
        by_name = {machine["name"]: machine["findings"] for machine in well["machines"]}
        assert wrong(by_name["anna"]) | wrong(by_name["ben"]) == set(), well

        disk.fill()
        switch.conditions(without_multicast=[2])
        relay = relay_port(well, "cleo")
        cleo.block(relay)
        done = doctor(anna, here, "--json", "--nodes", f"auto,{address}")
        assert done.returncode == 1, done.stderr
        said = json.loads(done.stdout)
        by_name = {machine["name"]: machine["findings"] for machine in said["machines"]}
        found = {finding["check"]: finding for finding in by_name["cleo"] if finding["verdict"] == "wrong"}
        # The wrong MLX is wrong for the program itself, and does not go with the others.
        assert set(found) == {"mlx", "versions", "disk", "clock", "bonjour", "reachable"}, found
        assert "0.31.0" in found["mlx"]["seen"]
        assert "pip install" in found["versions"]["mend"]
        assert "node store prune" in found["disk"]["mend"]
        assert "3600 s ahead of the others" in found["clock"]["seen"]
        assert "hears no other node" in found["bonjour"]["seen"]
        for name in ("anna", "ben"):
            assert f"{name} (no answer)" in found["reachable"]["seen"]
            assert wrong(by_name[name]) == set(), by_name[name]
        assert f"port {relay} " in found["reachable"]["seen"]
        links = {finding["seen"].partition(":")[0]: finding["verdict"] for finding in said["links"]}
        assert links == {"anna ↔ ben": "ok", "anna ↔ cleo": "wrong", "ben ↔ cleo": "wrong"}

        # The service itself behind the firewall: the machine is there, and says nothing.
        cleo.block(nodes["cleo"].port)
        shown = doctor(anna, here, "--nodes", f"auto,{address}")
        assert shown.returncode == 1, shown.stderr
        lines = shown.stdout.splitlines()
        at = next(number for number, line in enumerate(lines) if line.split()[:2] == ["wrong", "answer"])
        assert address in lines[at]
        assert "no answer" in lines[at]
        assert "firewall" in lines[at + 1]
        disk.free()

        report = tmp_path / "report.zip"
        doctor(anna, here, "--nodes", f"auto,{address}", "--debug", "--out", str(report))
        with zipfile.ZipFile(report) as bundle:
            assert json.loads(bundle.read("doctor.json"))["verdict"] == "wrong"
            assert {"README.txt", "versions.json"} < set(bundle.namelist())


def relay_port(said: dict[str, Any], name: str) -> int:
    """Where this machine's relay listens, as its own finding says."""
    (machine,) = (machine for machine in said["machines"] if machine["name"] == name)
    (ports,) = (finding for finding in machine["findings"] if finding["check"] == "ports")
    return int(ports["seen"].rpartition(" ")[2])
