"""What a machine runs on and what presses it: battery, memory, heat. The unknown is never taken for good."""

from __future__ import annotations

import platform
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from node.events import Condition
from node.hardware import Read, Run, read_text, run_text
from node.info import MemoryLevel, ThermalLevel

SUPPLIES = Path("/sys/class/power_supply")
BETTER_LOOKS = 6
"""Looks, of about 5 s each, for which a level must have been better before it is believed."""

# macOS: the kernel's own levels, and those of its thermal daemon (OSThermalNotification.h: nominal, moderate, heavy,
# trapping, sleeping; heavy is where the processors are slowed down).
MAC_MEMORY: dict[str, MemoryLevel] = {"1": "normal", "2": "warn", "4": "critical"}
MAC_HEAT: dict[str, ThermalLevel] = {"0": "nominal", "1": "fair", "2": "serious", "3": "critical", "4": "critical"}
THERMAL_KEY = "com.apple.system.thermalpressurelevel"
# Linux: percent of ten seconds in which somebody waited for memory; where the kernel does not count that, the percent
# of memory that is left.
STALLED: tuple[tuple[float, MemoryLevel], ...] = ((40.0, "critical"), (10.0, "warn"))
LEFT: tuple[tuple[float, MemoryLevel], ...] = ((3.0, "critical"), (10.0, "warn"))

_L = TypeVar("_L", bound=str)


@dataclass(frozen=True)
class Pressure:
    """What presses a machine; see ``events.Condition``."""

    memory: MemoryLevel = "unknown"
    thermal: ThermalLevel = "unknown"


def on_battery(
    system: str | None = None, run: Run = run_text, read: Read = read_text, supplies: Path = SUPPLIES
) -> bool | None:
    """Whether the machine runs on its battery (or on a UPS's); None when that cannot be known.

    Args:
        system: ``Darwin`` or ``Linux``; None takes this machine's.
        run: how commands are asked.
        read: how files are asked.
        supplies: where Linux tells of its power supplies.
    """
    if (system or platform.system()) == "Darwin":
        source = re.search(r"^Now drawing from '(\w+)", run(["pmset", "-g", "batt"]) or "", re.MULTILINE)
        return {"AC": False, "Battery": True, "UPS": True}.get(source[1]) if source else None
    return _linux_on_battery(read, supplies)


def pressure(system: str | None = None, run: Run = run_text, read: Read = read_text) -> Pressure:
    """What presses the machine now; the arguments are those of ``on_battery``."""
    if (system or platform.system()) == "Darwin":
        memory = MAC_MEMORY.get(run(["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]) or "", "unknown")
        return Pressure(memory, _mac_heat(run))
    return Pressure(_linux_memory(read))


def condition() -> Condition:
    """How this machine is now."""
    now, battery = pressure(), on_battery()
    return Condition(now.memory, now.thermal, "" if battery is None else "yes" if battery else "no")


class Watch:
    """Looks at a machine in a row, without swinging: worse is believed at once, better when it has lasted."""

    def __init__(self) -> None:
        self._looks: deque[Condition] = deque(maxlen=BETTER_LOOKS)

    def saw(self, now: Condition) -> Condition:
        """The condition after one more look: the worst pressure of the last looks, and the power as it is now."""
        self._looks.append(now)
        memory = worst([look.memory for look in self._looks], MemoryLevel)
        thermal = worst([look.thermal for look in self._looks], ThermalLevel)
        return Condition(memory, thermal, now.battery)


def worst(levels: Sequence[_L], kind: Any) -> _L:
    """The worst of these levels that is known, in the order of their kind; unknown where none is."""
    order = get_args(kind)
    return max(levels, key=order.index)


def _mac_heat(run: Run) -> ThermalLevel:
    """The worse of what the thermal daemon tells without root, and of what slows an Intel processor down."""
    state = (run(["notifyutil", "-g", THERMAL_KEY]) or "").rpartition(" ")[2]
    shown = run(["pmset", "-g", "therm"]) or ""
    found: list[ThermalLevel] = ["unknown", MAC_HEAT.get(state, "unknown")]
    # An Apple chip says "No thermal warning level has been recorded", hot or not: that is no good news.
    if speed := re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", shown):
        percent = int(speed[1])
        slowed: ThermalLevel = "critical" if percent < 50 else "serious" if percent < 80 else "fair"
        found.append("nominal" if percent >= 100 else slowed)
    if warning := re.search(r"thermal warning level\s*[=:]\s*(\d+)", shown, re.IGNORECASE):
        level = int(warning[1])  # 0 normal, 5 danger, 10 critical
        warned: ThermalLevel = "critical" if level >= 10 else "serious" if level >= 5 else "fair"
        found.append("nominal" if level == 0 else warned)
    return worst(found, ThermalLevel)


def _linux_on_battery(read: Read, supplies: Path) -> bool | None:
    """A charger that is plugged in decides, then what the battery does."""
    fed: list[bool] = []
    for folder in sorted(supplies.glob("*")):
        kind, scope = read(f"{folder}/type"), read(f"{folder}/scope")
        if scope == "Device":  # the battery of a mouse
            continue
        online, status = read(f"{folder}/online"), read(f"{folder}/status")
        if kind in ("Mains", "USB") and online == "1":
            return False
        if kind in ("Battery", "UPS") and status in ("Charging", "Discharging", "Full", "Not charging"):
            fed.append(status != "Discharging")
    return not all(fed) if fed else None


def _linux_memory(read: Read) -> MemoryLevel:
    stalled = re.search(r"^some avg10=(\d+(?:\.\d+)?)", read("/proc/pressure/memory") or "", re.MULTILINE)
    if stalled:
        share = float(stalled[1])
        return next((level for least, level in STALLED if share >= least), "normal")
    counts = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo") or "", re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= counts.keys():
        return "unknown"
    left = 100 * int(counts["MemAvailable"]) / max(int(counts["MemTotal"]), 1)
    return next((level for most, level in LEFT if left < most), "normal")
