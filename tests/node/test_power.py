"""What a machine runs on and what presses it, from what macOS and Linux tell. The unknown is never taken for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from node.events import Condition
from node.power import BETTER_LOOKS, Pressure, Watch, condition, on_battery, pressure

# As macOS prints them.
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=24182883)\t100%; charged; 0:00 remaining present: true
"""
ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22937699)\t95%; discharging; 7:21 remaining present: true
"""
ON_UPS = """Now drawing from 'UPS Power'
 -Back-UPS ES 550 (id=2621440)\t98%; discharging; 0:41 remaining present: true
"""
DESKTOP = "Now drawing from 'AC Power'"
NO_WARNING = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
INTEL = """2024-05-01 09:30:00 +0000 CPU Power notify
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 8
\tCPU_Speed_Limit \t= {}
"""
KEY = "com.apple.system.thermalpressurelevel"


def mac(outputs: Mapping[str, str | None]) -> Pressure:
    return pressure("Darwin", lambda arguments: outputs.get(" ".join(arguments)), lambda _: None)


def linux(files: Mapping[str, str]) -> Pressure:
    return pressure("Linux", lambda _: None, files.get)


@pytest.mark.parametrize(
    ("shown", "battery"),
    [
        (ON_MAINS, False),
        (DESKTOP, False),
        (ON_BATTERY, True),
        (ON_UPS, True),
        (None, None),
        ("No batteries", None),
        ("Now drawing from 'Sunlight'", None),
    ],
)
def test_a_macs_power(shown: str | None, battery: bool | None) -> None:
    asked = []

    def run(arguments: Sequence[str]) -> str | None:
        asked.append(list(arguments))
        return shown

    assert on_battery("Darwin", run) is battery
    assert asked == [["pmset", "-g", "batt"]]


MAINS_ON, MAINS_OFF = {"type": "Mains", "online": "1"}, {"type": "Mains", "online": "0"}
CHARGING, EMPTYING = {"type": "Battery", "status": "Charging"}, {"type": "Battery", "status": "Discharging"}


@pytest.mark.parametrize(
    ("supplies", "battery"),
    [
        ({}, None),
        ({"AC": MAINS_ON}, False),
        ({"AC": MAINS_ON, "BAT0": EMPTYING}, False),  # a weak charger
        ({"AC": MAINS_OFF, "BAT0": EMPTYING}, True),
        ({"BAT0": EMPTYING}, True),
        ({"BAT0": CHARGING}, False),
        ({"BAT0": {"type": "Battery", "status": "Full"}, "BAT1": EMPTYING}, True),
        ({"BAT0": {"type": "Battery", "status": "Unknown"}}, None),
        ({"AC": MAINS_OFF}, None),
        ({"mouse": {**EMPTYING, "scope": "Device"}}, None),
    ],
)
def test_a_linux_machines_power(tmp_path: Path, supplies: dict[str, dict[str, str]], battery: bool | None) -> None:
    for name, files in supplies.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(f"{text}\n")
    assert on_battery("Linux", lambda _: None, supplies=tmp_path) is battery
    assert on_battery("Linux", lambda _: None, supplies=tmp_path / "none") is None


@pytest.mark.parametrize(
    ("shown", "level"),
    [("1", "normal"), ("2", "warn"), ("4", "critical"), ("0", "unknown"), ("", "unknown"), (None, "unknown")],
)
def test_a_macs_memory(shown: str | None, level: str) -> None:
    assert mac({"sysctl -n kern.memorystatus_vm_pressure_level": shown}) == Pressure(level)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("daemon", "therm", "level"),
    [
        (f"{KEY} 0", NO_WARNING, "nominal"),
        (f"{KEY} 1", NO_WARNING, "fair"),
        (f"{KEY} 2", NO_WARNING, "serious"),
        (f"{KEY} 3", NO_WARNING, "critical"),
        (f"{KEY} 4", NO_WARNING, "critical"),
        (f"{KEY} 7", NO_WARNING, "unknown"),
        (None, NO_WARNING, "unknown"),  # what an Apple chip says, hot or not
        (None, None, "unknown"),
        (None, INTEL.format(100), "nominal"),
        (None, INTEL.format(90), "fair"),
        (None, INTEL.format(60), "serious"),
        (None, INTEL.format(24), "critical"),
        (f"{KEY} 0", INTEL.format(60), "serious"),
        (f"{KEY} 2", INTEL.format(100), "serious"),
        (None, "Thermal Warning Level = 0", "nominal"),
        (None, "Thermal Warning Level = 5", "serious"),
        (None, "Thermal Warning Level = 10", "critical"),
    ],
)
def test_a_macs_heat(daemon: str | None, therm: str | None, level: str) -> None:
    outputs = {f"notifyutil -g {KEY}": daemon, "pmset -g therm": therm}
    assert mac(outputs) == Pressure("unknown", level)  # type: ignore[arg-type]


STALLS = "some avg10={} avg60=0.10 avg300=0.02 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
LEFT = "MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:   {} kB"


@pytest.mark.parametrize(
    ("files", "level"),
    [
        ({"/proc/pressure/memory": STALLS.format("0.00")}, "normal"),
        ({"/proc/pressure/memory": STALLS.format("9.99")}, "normal"),
        ({"/proc/pressure/memory": STALLS.format("10.00")}, "warn"),
        ({"/proc/pressure/memory": STALLS.format("63.52")}, "critical"),
        ({"/proc/pressure/memory": STALLS.format("0.00"), "/proc/meminfo": LEFT.format(1)}, "normal"),
        ({"/proc/meminfo": LEFT.format(8_000_000)}, "normal"),
        ({"/proc/meminfo": LEFT.format(1_000_000)}, "warn"),
        ({"/proc/meminfo": LEFT.format(300_000)}, "critical"),
        ({"/proc/meminfo": "MemTotal: 16000000 kB"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_linux_machines_memory(files: dict[str, str], level: str) -> None:
    assert linux(files) == Pressure(level)  # type: ignore[arg-type]


def test_this_machine_can_be_looked_at() -> None:
    now = condition()
    assert now.memory in ("unknown", "normal", "warn", "critical")
    assert now.battery in ("", "no", "yes")


def test_worse_is_believed_at_once_and_better_when_it_has_lasted() -> None:
    watch = Watch()
    assert watch.saw(Condition("normal", "nominal", "no")) == Condition("normal", "nominal", "no")
    assert watch.saw(Condition("critical", "nominal", "yes")) == Condition("critical", "nominal", "yes")
    calm = Condition("normal", "fair", "no")
    for _ in range(BETTER_LOOKS - 1):
        assert watch.saw(calm) == Condition("critical", "fair", "no"), "the cable is believed at once"
    assert watch.saw(calm) == calm


def test_what_cannot_be_seen_once_is_as_it_was_and_later_unknown() -> None:
    watch = Watch()
    watch.saw(Condition("normal", "nominal", "no"))
    for _ in range(BETTER_LOOKS - 1):
        assert watch.saw(Condition()) == Condition("normal", "nominal", "")
    assert watch.saw(Condition()) == Condition()
