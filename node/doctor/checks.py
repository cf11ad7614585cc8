"""Verdicts on one machine, from facts alone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

from node.doctor.facts import MachineFacts
from node.doctor.finding import Finding
from node.doctor.network_checks import NETWORK_CHECKS
from node.hardware import MIB, default_gpu_memory
from node.sizes import show_size
from node.store import LEAST_USEFUL_BYTES, RESERVE_BYTES

OLDEST_MACOS = (14, 0)
"""That MLX's packages are made for."""
SHORT_DISK_BYTES = 10 << 30
"""Less does not hold a model of 7B and what training it leaves behind."""
LEFT_FOR_MACOS = 0.9
"""The GPU may take so much of the memory; with more, macOS itself begins to swap."""


def check_machine(facts: MachineFacts) -> tuple[Finding, ...]:
    """All findings on a machine by itself, in the order in which they are mended."""
    found = [finding for check in CHECKS for finding in [check(facts)] if finding is not None]
    return tuple(found)


def python(facts: MachineFacts) -> Finding:
    """Its version, and that it was built for this chip."""
    version, readings = facts.info.facts.python, facts.readings
    seen = f"{version}, {readings.architecture}" if readings.architecture else version
    if readings.translated:
        mend = "install Python for Apple chips (python.org's installer has it), remove .venv, and set up again"
        return Finding("python", "wrong", f"{seen}: built for Intel, translated by Rosetta; MLX needs arm64", mend)
    return _version("python", version, facts.needs.get("python", ""), seen, "install it, and set up again")


def system(facts: MachineFacts) -> Finding:
    """The version of macOS."""
    shown = facts.info.facts.os or "unknown"
    if not facts.readings.is_mac:
        return Finding("system", "unknown" if shown == "unknown" else "ok", f"{shown}: here MLX has no GPU to use")
    digits = (facts.readings.version or "").split(".")
    if not all(part.isdigit() for part in digits):
        return Finding("system", "unknown", f"{shown}: sw_vers does not tell the version of macOS")
    if tuple(map(int, digits)) < OLDEST_MACOS:
        mend = "System Settings › General › Software Update"
        return Finding("system", "wrong", f"{shown}; MLX needs macOS {OLDEST_MACOS[0]} or newer", mend)
    return Finding("system", "ok", shown)


def mlx(facts: MachineFacts) -> Finding:
    """The version of MLX."""
    return _package("mlx", facts.info.facts.mlx, facts)


def mlx_lm(facts: MachineFacts) -> Finding:
    """The version of mlx-lm."""
    return _package("mlx-lm", facts.info.facts.mlx_lm, facts)


def metal(facts: MachineFacts) -> Finding:
    """That MLX works, and on what."""
    found = facts.device
    if found.trouble:
        mend = f"try it by hand: {shlex.quote(sys.executable)} -c 'import mlx.core'; then set up again"
        return Finding("metal", "wrong", f"MLX does not work: {found.trouble}", mend)
    if found.metal:
        return Finding("metal", "ok", "MLX computes on the GPU")
    if facts.readings.is_mac:
        mend = "run it in a session of this Mac itself, not in a virtual machine; MLX needs an Apple chip"
        return Finding("metal", "wrong", "MLX finds no Metal device and would compute on the CPU", mend)
    return Finding("metal", "ok", "MLX works, on the CPU: this is no Mac")


def wired_memory(facts: MachineFacts) -> Finding | None:
    """How much memory the GPU may use at once."""
    if not facts.readings.is_mac:
        return None
    total, chosen = facts.info.facts.total_memory_bytes, facts.readings.wired_limit_mb
    if chosen is None or total is None:
        return Finding("wired-memory", "unknown", "sysctl does not tell iogpu.wired_limit_mb, or the memory")
    default = default_gpu_memory(total)
    reset = "sudo sysctl iogpu.wired_limit_mb=0 (macOS's own choice), and take it out of /etc/sysctl.conf"
    if not chosen:
        limit = facts.device.working_set_bytes or default
        seen = f"iogpu.wired_limit_mb is macOS's choice: about {show_size(limit)} of {show_size(total)}"
        return Finding("wired-memory", "ok", seen)
    seen = f"iogpu.wired_limit_mb is {chosen}: {show_size(chosen * MIB)} of {show_size(total)}"
    if chosen * MIB > LEFT_FOR_MACOS * total:
        return Finding("wired-memory", "warning", f"{seen}; too little is left for macOS, which may freeze", reset)
    if chosen * MIB < default:
        return Finding("wired-memory", "warning", f"{seen}; macOS itself would allow {show_size(default)}", reset)
    return Finding("wired-memory", "ok", seen)


def disk(facts: MachineFacts) -> Finding:
    """Room for models, and that it can be written to."""
    found = facts.disk
    if found.free_bytes is None:
        return Finding("disk", "unknown", f"{found.folder}: {found.trouble}")
    seen = f"{show_size(found.free_bytes)} free in {found.folder}"
    if found.store_bytes:
        seen += f"; kept models take {show_size(found.store_bytes)}"
    mend = "node store prune removes kept models; or free space, or set TANDEM_HOME to a larger disk"
    if found.trouble:
        return Finding("disk", "wrong", f"{seen}; it cannot be written to: {found.trouble}", mend)
    if found.free_bytes < RESERVE_BYTES + LEAST_USEFUL_BYTES:
        return Finding("disk", "wrong", f"{seen}: no model fits, {show_size(RESERVE_BYTES)} are kept free", mend)
    if found.free_bytes < SHORT_DISK_BYTES:
        return Finding("disk", "warning", f"{seen}: enough for small models only", mend)
    return Finding("disk", "ok", seen)


def power(facts: MachineFacts) -> Finding:
    """Mains or battery."""
    mend = "plug it in, or start it with `node serve --allow-battery`"
    if facts.readings.on_battery is None:
        return Finding("power", "unknown", "whether it runs on a battery is not told")
    if facts.readings.on_battery:
        return Finding("power", "warning", "on battery: it takes no jobs unless its owner allows it", mend)
    if facts.readings.sleep.low_power:
        seen = "on mains, in low power mode: it computes slowly"
        return Finding("power", "warning", seen, "sudo pmset -a lowpowermode 0")
    return Finding("power", "ok", "on mains")


def sleep(facts: MachineFacts) -> Finding:
    """Whether it falls asleep between jobs."""
    minutes = facts.readings.sleep.minutes
    if minutes is None:
        return Finding("sleep", "unknown", "when it falls asleep is not told")
    if not minutes:
        return Finding("sleep", "ok", "it does not fall asleep by itself")
    seen = f"it falls asleep after {minutes} min without a job, and is not found then"
    return Finding("sleep", "warning", seen, "sudo pmset -c sleep 0, or System Settings › Energy")


def thunderbolt(facts: MachineFacts) -> Finding | None:
    """Cables to other Macs, and that they carry the network."""
    if not facts.readings.is_mac:
        return None
    ports, bridge = facts.readings.thunderbolt, facts.readings.bridge
    if ports is None:
        return Finding("thunderbolt", "unknown", "system_profiler tells nothing of Thunderbolt ports")
    if not ports.ports:
        return Finding("thunderbolt", "ok", "this Mac has no Thunderbolt port")
    carries = [item for item in facts.info.interfaces if item.kind == "thunderbolt"]
    seen = f"{ports.ports} ports, {ports.speed or 'speed unknown'}"
    if not ports.macs:
        return Finding("thunderbolt", "ok", f"{seen}; no cable to another Mac")
    seen += f"; cable to {', '.join(ports.macs)}"
    if carries:
        return Finding("thunderbolt", "ok", f"{seen}; network on {', '.join(item.name for item in carries)}")
    state = "no Thunderbolt bridge" if bridge is not None and not bridge.exists else "no address on it"
    mend = "System Settings › Network › Thunderbolt Bridge: add it, make it active, Configure IPv4: Using DHCP"
    return Finding("thunderbolt", "wrong", f"{seen}, which carries no network: {state}", mend)


def rdma(facts: MachineFacts) -> Finding | None:
    """RDMA over Thunderbolt 5."""
    readings = facts.readings
    if not readings.is_mac:
        return None
    ports = readings.thunderbolt
    if ports is None or (ports.ports and not ports.gigabits):
        return Finding("rdma", "unknown", "whether it has Thunderbolt 5 is not told")
    if ports.gigabits < 80:
        return Finding("rdma", "ok", "none, and none is possible: that takes Thunderbolt 5")
    switch = (readings.rdma_switch or "").strip().casefold()
    if switch == "disabled":
        mend = "shut down, start into recovery (hold the power button), Utilities › Terminal: rdma_ctl enable"
        return Finding("rdma", "warning", "Thunderbolt 5, RDMA switched off: sums go over TCP instead", mend)
    if switch != "enabled":
        return Finding("rdma", "unknown", f"rdma_ctl status says {switch!r}; it comes with macOS 26.2")
    active = [name for name, state in readings.rdma.items() if state == "PORT_ACTIVE"]
    if active:
        return Finding("rdma", "ok", f"on, ready on {', '.join(active)}")
    if ports.macs:
        mend = "plug the cable out and in, then look at `ibv_devinfo`: PORT_ACTIVE is wanted on both Macs"
        return Finding("rdma", "warning", f"on, but no port is ready although {ports.macs[0]} is connected", mend)
    return Finding("rdma", "ok", "on; no cable to another Mac")


def pairing(facts: MachineFacts) -> Finding:
    """Whom it is paired with."""
    if facts.peers is None:
        mend = f"see that you may read {facts.disk.folder}/peers and all that lies in it"
        return Finding("pairing", "unknown", "who is paired cannot be read", mend)
    if not facts.peers:
        mend = "`node pair` on the Mac that helps shows a code; `coordinator pair` on the one that trains takes it"
        return Finding("pairing", "warning", "paired with nobody: only programs of this machine are served", mend)
    return Finding("pairing", "ok", f"paired with {', '.join(facts.peers)}")


def _package(name: str, version: str | None, facts: MachineFacts) -> Finding:
    wanted = facts.needs.get(name, "")
    mend = f"pip install {shlex.quote(name + wanted)}"
    if version is None:
        return Finding(name, "wrong", "not installed", mend)
    return _version(name, version, wanted, version, mend)


def _version(check: str, version: str, wanted: str, seen: str, mend: str) -> Finding:
    """A version against what is asked for."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        fits = bool(wanted) and SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return Finding(check, "unknown", f"{seen}: no version that can be compared")
    if not wanted:
        return Finding(check, "unknown", f"{seen}; which version is needed is not told")
    return Finding(check, "ok", seen) if fits else Finding(check, "wrong", f"{seen}; {wanted} is needed", mend)


Check = Callable[[MachineFacts], Finding | None]
CHECKS: tuple[Check, ...] = (
    *(python, system, mlx, mlx_lm, metal, wired_memory, disk),
    *NETWORK_CHECKS,
    *(thunderbolt, rdma, power, sleep, pairing),
)
