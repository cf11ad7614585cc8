"""What macOS and Linux tell of themselves, by commands and files. What they do not tell is None."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.hardware import Read, Run, read_text, run_text
from node.power import on_battery

FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
_LISTENS = "0A"  # of a TCP socket in Linux's /proc/net/tcp


@dataclass(frozen=True)
class Firewall:
    """macOS's application firewall; None is unknown.

    Attributes:
        on: whether it is switched on.
        blocks_all: whether it lets nothing in that nobody asked for.
        blocks_us: whether it blocks this Python. False is not told: it calls everything permitted that it does not
            know, and drops it all the same.
    """

    on: bool | None
    blocks_all: bool | None
    blocks_us: bool | None


@dataclass(frozen=True)
class Sleep:
    """When a machine falls asleep; None is unknown.

    Attributes:
        minutes: of idleness until it does, 0 never.
        low_power: whether it saves power by working more slowly.
    """

    minutes: int | None
    low_power: bool | None = None


@dataclass(frozen=True)
class Thunderbolt:
    """The Thunderbolt ports of a Mac.

    Attributes:
        ports: their number.
        speed: of the fastest, as macOS writes it, or "".
        macs: machines at the other end of a cable.
        devices: other things there.
    """

    ports: int
    speed: str
    macs: tuple[str, ...]
    devices: tuple[str, ...]

    @property
    def gigabits(self) -> int:
        """Of the fastest port; 0 unknown."""
        return max((int(number) for number in re.findall(r"(\d+) Gb/s", self.speed)), default=0)


@dataclass(frozen=True)
class Bridge:
    """The Thunderbolt bridge, which gives a cable between Macs an address; None is unknown.

    Attributes:
        exists: whether there is one.
        active: whether a cable is plugged in.
        members: interfaces in it.
    """

    exists: bool
    active: bool | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Readings:
    """One system. None, and an empty text, are unknown.

    Attributes:
        system: ``Darwin``, ``Linux`` or another.
        version: of macOS.
        architecture: that this Python was built for.
        translated: whether Rosetta translates this Python.
        total_memory_bytes: of the machine.
        wired_limit_mb: what the owner has set for the GPU; 0 is macOS's own choice.
        firewall, sleep, thunderbolt, bridge: see there.
        on_battery: whether it runs on its battery.
        rdma_switch: what ``rdma_ctl status`` says.
        rdma: state of each RDMA device, by name.
        gateway: address of the router.
        speeds: of network interfaces, in words, by name.
    """

    system: str
    version: str | None = None
    architecture: str = ""
    translated: bool | None = None
    wired_limit_mb: int | None = None
    firewall: Firewall = Firewall(None, None, None)
    sleep: Sleep = Sleep(None)
    on_battery: bool | None = None
    thunderbolt: Thunderbolt | None = None
    bridge: Bridge | None = None
    rdma_switch: str | None = None
    rdma: Mapping[str, str] = field(default_factory=dict)
    gateway: str = ""
    speeds: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_mac(self) -> bool:
        """Whether this is macOS."""
        return self.system == "Darwin"


def look(
    names: Iterable[str],
    system: str | None = None,
    run: Run = run_text,
    read: Read = read_text,
    python: str | None = None,
) -> Readings:
    """Read it all. Takes seconds on a Mac.

    Args:
        names: of the interfaces whose speed is wanted.
        system: ``Darwin`` or ``Linux``; None takes this machine's.
        run: how commands are asked.
        read: how files are asked.
        python: the program that the firewall sees; None takes our own.
    """
    system = system or platform.system()
    if system != "Darwin":
        return Readings(
            system,
            architecture=platform.machine(),
            sleep=linux_sleep(run),
            on_battery=on_battery(system, run, read),
            gateway=linux_gateway(read("/proc/net/route") or ""),
            speeds=linux_speeds(names, read),
        )
    return Readings(
        system,
        version=run(["sw_vers", "-productVersion"]),
        architecture=platform.machine(),
        translated={"1": True, "0": False}.get(run(["sysctl", "-n", "sysctl.proc_translated"]) or ""),
        wired_limit_mb=_whole(run(["sysctl", "-n", "iogpu.wired_limit_mb"])),
        firewall=mac_firewall(run, python or os.path.realpath(sys.executable)),
        sleep=mac_sleep(run(["pmset", "-g"]) or ""),
        on_battery=on_battery(system, run, read),
        thunderbolt=mac_thunderbolt(run(["system_profiler", "SPThunderboltDataType", "-json"]) or ""),
        bridge=mac_bridge(run(["ifconfig", "-a"]) or ""),
        rdma_switch=run(["rdma_ctl", "status"]),
        rdma=mac_rdma(run(["ibv_devinfo"]) or ""),
        gateway=mac_gateway(run(["route", "-n", "get", "default"]) or ""),
        speeds={name: speed for name in names if (speed := mac_speed(run(["ifconfig", name]) or ""))},
    )


# --- macOS ----------------------------------------------------------------------------------------------------------


def mac_firewall(run: Run, python: str) -> Firewall:
    """What the application firewall does, as ``socketfilterfw`` prints it."""
    state = re.search(r"\(State = (\d)\)", run([FIREWALL, "--getglobalstate"]) or "")
    shown = (run([FIREWALL, "--getblockall"]) or "").casefold()
    on = None if state is None else state[1] != "0"
    if state is not None and state[1] == "2":
        blocks_all: bool | None = True
    elif "disabled" in shown:
        blocks_all = False
    else:
        blocks_all = True if "enabled" in shown or "is set to block all" in shown else None
    told = (run([FIREWALL, "--getappblocked", python]) or "").casefold()
    return Firewall(on, blocks_all, True if re.search(r"\b(is|are) blocked", told) else None)


def mac_sleep(shown: str) -> Sleep:
    """When it sleeps, from ``pmset -g``. What keeps it awake for the moment does not count."""
    found = dict(re.findall(r"^ *(\w+)[ \t]+(\d+)\b", shown, re.MULTILINE))
    minutes = int(found["sleep"]) if "sleep" in found else None
    if found.get("SleepDisabled") == "1":
        minutes = 0
    return Sleep(minutes, {"1": True, "0": False}.get(found.get("lowpowermode", "")))


def mac_thunderbolt(shown: str) -> Thunderbolt | None:
    """The ports, from ``system_profiler SPThunderboltDataType -json``."""
    try:
        buses = json.loads(shown)["SPThunderboltDataType"]
        ports = [value for bus in buses for key, value in bus.items() if re.fullmatch(r"receptacle_\d+_tag", key)]
        speeds = [str(port.get("current_speed_key", "")) for port in ports]
        macs: list[str] = []
        devices: list[str] = []
        for bus in buses:
            _sort_items(bus.get("_items", []), macs, devices)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    fastest = max(speeds, key=lambda text: _whole((re.findall(r"\d+", text) or [""])[-1]) or 0, default="")
    return Thunderbolt(len(ports), fastest, tuple(macs), tuple(devices))


def _sort_items(items: Iterable[Mapping[str, Any]], macs: list[str], devices: list[str]) -> None:
    """Only the bus of another machine has a domain of its own; what hangs on a device is behind it."""
    for item in items:
        name = str(item.get("_name", "a device"))
        (macs if "domain_uuid_key" in item else devices).append(name)
        _sort_items(item.get("_items", []), macs, devices)


def mac_bridge(shown: str) -> Bridge | None:
    """The Thunderbolt bridge, from ``ifconfig -a``; None when that says nothing at all."""
    if not shown:
        return None
    block = re.search(r"^bridge0:.*\n((?:\s+.*\n?)*)", shown, re.MULTILINE)
    if block is None:
        return Bridge(exists=False)
    status = re.search(r"^\s+status: (\w+)", block[1], re.MULTILINE)
    members = tuple(re.findall(r"^\s+member: (\S+)", block[1], re.MULTILINE))
    return Bridge(exists=True, active=None if status is None else status[1] == "active", members=members)


def mac_rdma(shown: str) -> dict[str, str]:
    """Device to the state of its port, from ``ibv_devinfo``."""
    parts = re.split(r"^hca_id:", shown, flags=re.MULTILINE)[1:]
    states = {part.split()[0]: re.search(r"\bstate:\s*(\S+)", part) for part in parts if part.split()}
    return {name: state[1] if state else "" for name, state in states.items()}


def mac_gateway(shown: str) -> str:
    """The router, from ``route -n get default``; "" for none, or one without an IPv4 address."""
    found = re.search(r"^\s*gateway: (\d+\.\d+\.\d+\.\d+)\s*$", shown, re.MULTILINE)
    return found[1] if found else ""


def mac_speed(shown: str) -> str:
    """What an interface has agreed on with its other end, from ``ifconfig en0``: ``10Gbase-T``, or ""."""
    found = re.search(r"^\s+media: .*\(([^ <)]+)", shown, re.MULTILINE)
    return found[1] if found and found[1] != "none" else ""


def mac_listener(shown: str) -> str:
    """Who listens, from ``lsof -Fpc``: ``Python (process 812)``, or ""."""
    found = re.search(r"^p(\d+)\n(?:.*\n)*?c(.+)$", shown, re.MULTILINE)
    return f"{found[2]} (process {found[1]})" if found else ""


# --- Linux ----------------------------------------------------------------------------------------------------------


def linux_sleep(run: Run) -> Sleep:
    """Only a masked target says for certain that it never sleeps."""
    state = run(["systemctl", "show", "-p", "LoadState", "sleep.target"])
    return Sleep(0 if state == "LoadState=masked" else None)


def linux_gateway(shown: str) -> str:
    """The router, from ``/proc/net/route``, or ""."""
    for line in shown.splitlines()[1:]:
        words = line.split()
        if len(words) > 3 and words[1] == "00000000" and int(words[3], 16) & 2:  # RTF_GATEWAY
            return ".".join(str(byte) for byte in reversed(bytes.fromhex(words[2])))
    return ""


def linux_speeds(names: Iterable[str], read: Read) -> dict[str, str]:
    """Mbit/s of each interface that says so."""
    speeds = {name: _whole(read(f"/sys/class/net/{name}/speed")) for name in names}
    return {name: f"{speed} Mbit/s" for name, speed in speeds.items() if speed}


def linux_listener(port: int, read: Read, proc: Path = Path("/proc")) -> str:
    """Who listens, from the tables of ``/proc``: ``python3 (process 812)``, or "" for who is not ours to see."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in (read(f"{proc}/net/{name}") or "").splitlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == _LISTENS and int(row[1].rpartition(":")[2], 16) == port}
    sockets = {f"socket:[{inode}]" for inode in inodes}
    for process in proc.glob("[0-9]*") if sockets else ():
        with contextlib.suppress(OSError):  # ended, or somebody else's
            if any(_link(path) in sockets for path in (process / "fd").iterdir()):
                return f"{read(f'{process}/comm') or 'a program'} (process {process.name})"
    return ""


def _link(path: Path) -> str:
    """Where a link leads; "" when it has gone meanwhile."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def listener(port: int, system: str | None = None, run: Run = run_text, read: Read = read_text) -> str:
    """Who listens on a TCP port of this machine, or "" when that cannot be seen."""
    if (system or platform.system()) == "Darwin":
        return mac_listener(run(["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]) or "")
    return linux_listener(port, read)


def _whole(text: str | None) -> int | None:
    """A whole number, or None."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else None
