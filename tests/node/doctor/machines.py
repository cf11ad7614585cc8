"""Machines in good health, to be made ill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from node.doctor.facts import Device, Disk, MachineFacts, Serving
from node.doctor.finding import Reached
from node.doctor.lan import Heard
from node.doctor.readings import Firewall, Readings, Sleep, Thunderbolt
from node.hardware import GIB, Facts
from node.info import Interface, NodeInfo

NEEDS = {"python": ">=3.11", "mlx": ">=0.32.4,<0.33", "mlx-lm": "==0.32.2"}
MACHINE = Facts("Studio", "Apple M4 Max", 64 * GIB, 50 * GIB, 48 * GIB, 16, "macOS 26.2", "3.12.4", "0.32.5", "0.32.2")
ADDRESSES = (Interface("en0", "ethernet", "192.168.1.5"), Interface("lo0", "loopback", "127.0.0.1"))
INFO = NodeInfo("id-studio", "home-studio", "Studio", 1, "0.1.0", MACHINE, ADDRESSES, relay_port=5000)
READINGS = Readings(
    "Darwin",
    version="26.2",
    architecture="arm64",
    translated=False,
    wired_limit_mb=0,
    firewall=Firewall(False, False, None),
    sleep=Sleep(0, False),
    on_battery=False,
    thunderbolt=Thunderbolt(4, "Up to 40 Gb/s", (), ()),
    rdma_switch="disabled",
    speeds={"en0": "10Gbase-T"},
)
HEALTHY = MachineFacts(
    INFO,
    READINGS,
    Device("", True, 48 * GIB),
    Disk("/data/tandem", 200 * GIB, 500 * GIB),
    Serving(21617, 5000, True, connected=True),
    Heard(True, "", ("id-air",)),
    (Reached("192.168.1.7:21617", "answers"),),
    ("Air",),
    NEEDS,
)


def info(**changed: Any) -> MachineFacts:
    """With another node."""
    return replace(HEALTHY, info=replace(INFO, **changed))


def machine(**changed: Any) -> MachineFacts:
    """With other versions or memory."""
    return info(facts=replace(MACHINE, **changed))


def reads(**changed: Any) -> MachineFacts:
    """With other readings."""
    return replace(HEALTHY, readings=replace(READINGS, **changed))


def with_(**changed: Any) -> MachineFacts:
    """With other facts."""
    return replace(HEALTHY, **changed)
