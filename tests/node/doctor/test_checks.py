"""Verdicts on one machine: each illness has its name and its cure, and what is not known is not called good."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.doctor.checks import check_machine
from node.doctor.facts import Device, Disk, MachineFacts, Serving, needed_versions
from node.doctor.finding import Finding, Reached, worst
from node.doctor.lan import Heard
from node.doctor.readings import Bridge, Firewall, Readings, Sleep, Thunderbolt
from node.hardware import GIB, MIB, Facts
from node.info import Interface, NodeInfo
from tests.node.doctor.machines import HEALTHY, INFO, info, machine, reads, with_

THUNDERBOLT_5 = Thunderbolt(3, "Up to 120 Gb/s", ("Air",), ())
CABLE = Interface("bridge0", "thunderbolt", "169.254.1.1")


def only(facts: MachineFacts, check: str) -> Finding:
    (finding,) = (finding for finding in check_machine(facts) if finding.check == check)
    return finding


def test_a_healthy_mac_has_no_complaint() -> None:
    found = check_machine(HEALTHY)
    assert {finding.verdict for finding in found} == {"ok"}, found
    assert not [finding for finding in found if finding.mend]
    assert len({finding.check for finding in found}) == len(found)


ILL = {
    "translated python": (reads(translated=True), "python", "wrong", "Rosetta", "arm64|Apple chips"),
    "old python": (machine(python="3.10.1"), "python", "wrong", "3.10.1", "install"),
    "no mlx": (machine(mlx=None), "mlx", "wrong", "not installed", "pip install 'mlx>=0.32.4,<0.33'|pip install"),
    "old mlx": (machine(mlx="0.31.0"), "mlx", "wrong", "0.31.0", "pip install"),
    "other mlx-lm": (machine(mlx_lm="0.32.1"), "mlx-lm", "wrong", "==0.32.2", "pip install mlx-lm==0.32.2"),
    "odd mlx": (machine(mlx="of today"), "mlx", "unknown", "of today", ""),
    "needs not told": (with_(needs={}), "mlx", "unknown", "not told", ""),
    "old macOS": (reads(version="13.6.1"), "system", "wrong", "macOS 14", "Software Update"),
    "macOS unknown": (reads(version=None), "system", "unknown", "sw_vers", ""),
    "broken MLX": (with_(device=Device("symbol not found")), "metal", "wrong", "symbol not found", "import mlx.core"),
    "no Metal": (with_(device=Device()), "metal", "wrong", "CPU", "virtual machine"),
    "too much wired": (reads(wired_limit_mb=63 * 1024), "wired-memory", "warning", "64512", "iogpu.wired_limit_mb=0"),
    "too little wired": (reads(wired_limit_mb=8 * 1024), "wired-memory", "warning", "48", "iogpu.wired_limit_mb=0"),
    "wired unknown": (reads(wired_limit_mb=None), "wired-memory", "unknown", "iogpu", ""),
    "full disk": (with_(disk=Disk("/d", 100 * MIB, GIB)), "disk", "wrong", "no model fits", "node store prune"),
    "short disk": (with_(disk=Disk("/d", 3 * GIB, GIB)), "disk", "warning", "small models", "TANDEM_HOME"),
    "read-only": (with_(disk=Disk("/d", 90 * GIB, GIB, 0, "Read-only")), "disk", "wrong", "Read-only", "TANDEM_HOME"),
    "disk unknown": (with_(disk=Disk("/d", None, None, 0, "no such")), "disk", "unknown", "no such", ""),
    "no address": (info(interfaces=()), "interfaces", "wrong", "no network", "cable"),
    "Wi-Fi only": (info(interfaces=(Interface("en1", "wifi", "10.0.0.1"),)), "interfaces", "warning", "Wi-Fi", "cable"),
    "LAN denied": (
        with_(reached=(Reached("10.0.0.2:1", "denied", "No route to host"),)),
        "local-network",
        "wrong",
        "No route to host",
        "Privacy & Security › Local Network",
    ),
    "nobody answers": (with_(reached=(Reached("10.0.0.2:1", "silent"),)), "local-network", "unknown", "10.0.0.2", ""),
    "alone": (with_(reached=()), "local-network", "unknown", "no other machine", ""),
    "only itself": (with_(reached=(Reached("127.0.0.1:1", "answers"),)), "local-network", "unknown", "no other", ""),
    "firewall on": (reads(firewall=Firewall(True, False, None)), "firewall", "unknown", "only others", "--unblockapp"),
    "blocks us": (reads(firewall=Firewall(True, False, True)), "firewall", "wrong", "blocks", "--unblockapp"),
    "blocks all": (reads(firewall=Firewall(True, True, None)), "firewall", "wrong", "all", "--setblockall off"),
    "firewall unknown": (reads(firewall=Firewall(None, None, None)), "firewall", "unknown", "socketfilterfw", ""),
    "not heard": (with_(heard=Heard(False)), "multicast", "wrong", "did not come back", "5353"),
    "Bonjour fails": (with_(heard=Heard(None, "no device")), "multicast", "wrong", "no device", "5353"),
    "Bonjour off": (with_(heard=Heard(None, "it is off", off=True)), "multicast", "warning", "off", "TANDEM_BONJOUR"),
    "no node": (with_(serving=Serving()), "ports", "warning", "no node serves", "node serve"),
    "port taken": (with_(serving=Serving(usual_port_taken_by="nc (7)")), "ports", "warning", "nc", "node serve"),
    "other port": (
        with_(serving=Serving(4000, 5000, True, "port 21617 is taken", "nc (process 7)", True)),
        "ports",
        "warning",
        "nc (process 7)",
        "21617",
    ),
    "dead port": (with_(serving=Serving(4000, 5000, connected=False)), "ports", "wrong", "4000", "node serve"),
    "port not tried": (with_(serving=Serving(4000, 5000)), "ports", "unknown", "not tried", ""),
    "on battery": (reads(on_battery=True), "power", "warning", "battery", "--allow-battery"),
    "power unknown": (reads(on_battery=None), "power", "unknown", "not told", ""),
    "low power": (reads(sleep=Sleep(0, True)), "power", "warning", "low power", "pmset -a lowpowermode 0"),
    "sleeps": (reads(sleep=Sleep(15)), "sleep", "warning", "15 min", "pmset -c sleep 0"),
    "sleep unknown": (reads(sleep=Sleep(None)), "sleep", "unknown", "not told", ""),
    "Thunderbolt unknown": (reads(thunderbolt=None), "thunderbolt", "unknown", "system_profiler", ""),
    "cable without network": (
        reads(thunderbolt=THUNDERBOLT_5, bridge=Bridge(False)),
        "thunderbolt",
        "wrong",
        "no Thunderbolt bridge",
        "Thunderbolt Bridge",
    ),
    "RDMA off": (reads(thunderbolt=THUNDERBOLT_5), "rdma", "warning", "switched off", "rdma_ctl enable"),
    "RDMA unknown": (reads(thunderbolt=THUNDERBOLT_5, rdma_switch=None), "rdma", "unknown", "rdma_ctl", ""),
    "RDMA not ready": (
        reads(thunderbolt=THUNDERBOLT_5, rdma_switch="enabled", rdma={"rdma_en2": "PORT_DOWN"}),
        "rdma",
        "warning",
        "Air is connected",
        "ibv_devinfo",
    ),
    "ports unknown": (reads(thunderbolt=None), "rdma", "unknown", "Thunderbolt 5", ""),
    "paired with nobody": (with_(peers=()), "pairing", "warning", "nobody", "coordinator pair"),
    "peers unknown": (with_(peers=None), "pairing", "unknown", "cannot be read", "/peers"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILL)
def test_each_illness_is_named_with_its_cure(name: str) -> None:
    facts, check, verdict, seen, mend = ILL[name]
    finding = only(facts, check)
    assert finding.verdict == verdict, finding
    assert seen in finding.seen
    assert any(part in finding.mend for part in mend.split("|")), finding
    assert finding.mend or verdict == "unknown", "what is wrong can be mended"


def test_thunderbolt_and_rdma_that_work() -> None:
    ready = reads(thunderbolt=THUNDERBOLT_5, rdma_switch="enabled", rdma={"rdma_en3": "PORT_ACTIVE"})
    ready = replace(ready, info=replace(INFO, interfaces=(CABLE, *INFO.interfaces)))
    assert only(ready, "thunderbolt").seen == "3 ports, Up to 120 Gb/s; cable to Air; network on bridge0"
    assert only(ready, "rdma") == Finding("rdma", "ok", "on, ready on rdma_en3")
    assert only(reads(thunderbolt=Thunderbolt(0, "", (), ())), "rdma").verdict == "ok"


def test_nothing_is_called_good_of_a_machine_that_tells_nothing() -> None:
    """Whatever cannot be found out is unknown, or wrong where it was tried; never ok."""
    nothing = MachineFacts(
        NodeInfo("", "", "x", 1, "0", Facts(None, None, None, None, None, None, None, "unknown", None, None)),
        Readings("Darwin"),
        Device("not tried"),
        Disk("/d", None, None, 0, "not looked at"),
        Serving(1, 2),
        Heard(),
    )
    assert "ok" not in {finding.verdict for finding in check_machine(nothing)}
    linux = replace(nothing, readings=Readings("Linux"))
    assert "ok" not in {finding.verdict for finding in check_machine(linux)}


def test_what_macs_alone_have_is_not_asked_of_linux() -> None:
    checks = {finding.check for finding in check_machine(reads(system="Linux"))}
    assert not checks & {"thunderbolt", "rdma", "wired-memory"}
    assert only(with_(readings=Readings("Linux"), device=Device()), "metal").verdict == "ok"


def test_our_own_package_says_which_versions_it_needs() -> None:
    needs = needed_versions()
    assert set(needs) == {"python", "mlx", "mlx-lm"}
    assert needs["mlx-lm"].startswith("==")


def test_the_worst_verdict_counts() -> None:
    verdicts = ("warning", "ok", "unknown")
    assert worst([Finding("a", verdict, "") for verdict in verdicts]) == "warning"  # type: ignore[arg-type]
    assert worst([]) == "ok"
