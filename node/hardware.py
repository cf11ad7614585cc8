"""What this machine is: chip, memory, system and versions. What cannot be found out is None, never a made-up number."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GIB = 1 << 30
MIB = 1 << 20
COMMAND_SECONDS = 5.0

Run = Callable[[Sequence[str]], str | None]
Read = Callable[[str], str | None]


@dataclass(frozen=True)
class Facts:
    """One machine, as people and planners need to know it. None means unknown.

    Attributes:
        name: what its owner calls it.
        chip: processor, for example ``Apple M2 Max``.
        total_memory_bytes: of the machine, or of the container it runs in where that has less.
        free_memory_bytes: what a new process could get without pushing others out.
        gpu_memory_bytes: what macOS lets the GPU use at once; None where no such limit exists.
        cores: processors this process may use.
        os: for example ``macOS 26.2``.
        python, mlx, mlx_lm: versions; None when not installed.
    """

    name: str | None
    chip: str | None
    total_memory_bytes: int | None
    free_memory_bytes: int | None
    gpu_memory_bytes: int | None
    cores: int | None
    os: str | None
    python: str
    mlx: str | None
    mlx_lm: str | None

    @property
    def usable_memory_bytes(self) -> int | None:
        """The most that training can use when nothing else runs: the GPU's limit where there is one, else all."""
        return self.gpu_memory_bytes or self.total_memory_bytes


def run_text(arguments: Sequence[str]) -> str | None:
    """What a command prints, stripped; None when it is missing, fails, hangs or says nothing."""
    try:
        done = subprocess.run(
            list(arguments), capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def read_text(path: str) -> str | None:
    """What a file holds, stripped; None when it cannot be read or is empty."""
    try:
        return Path(path).read_text(errors="replace").strip() or None
    except OSError:
        return None


def facts(system: str | None = None, run: Run = run_text, read: Read = read_text) -> Facts:
    """Look at this machine.

    Args:
        system: ``Darwin`` or ``Linux``; None takes this machine's.
        run: how commands are asked.
        read: how files are asked.
    """
    system = system or platform.system()
    if system == "Darwin":
        total, free = _number(run(["sysctl", "-n", "hw.memsize"])), _mac_free_memory(run)
        version = run(["sw_vers", "-productVersion"])
        named = run(["scutil", "--get", "ComputerName"]), run(["sysctl", "-n", "machdep.cpu.brand_string"])
        gpu = _mac_gpu_memory(total, named[1], run)
        operating_system: str | None = f"macOS {version}" if version else "macOS"
        cores = _number(run(["sysctl", "-n", "hw.ncpu"]))
    else:
        total, free = _linux_memory(read)
        named, gpu = (platform.node() or None, _linux_chip(read, run)), None
        cores, operating_system = _usable_cores(), _linux_name(read) or system or None
    return Facts(
        name=named[0] or platform.node().removesuffix(".local") or None,
        chip=named[1],
        total_memory_bytes=total,
        free_memory_bytes=free,
        gpu_memory_bytes=gpu,
        cores=cores,
        os=operating_system,
        python=platform.python_version(),
        mlx=installed_version("mlx"),
        mlx_lm=installed_version("mlx-lm"),
    )


def describe(found: Facts) -> str:
    """One line: ``Studio · M2 Max · 64 GB (51 free) · macOS 26.2 · mlx 0.32.4``."""
    chip = (found.chip or "chip unknown").removeprefix("Apple ")
    total = "memory unknown" if found.total_memory_bytes is None else f"{found.total_memory_bytes / GIB:.0f} GB"
    free = "unknown" if found.free_memory_bytes is None else f"{found.free_memory_bytes / GIB:.0f}"
    mlx = found.mlx or "unknown"
    parts = [found.name or "name unknown", chip, f"{total} ({free} free)", found.os or "system unknown", f"mlx {mlx}"]
    return " · ".join(parts)


def default_gpu_memory(total_memory_bytes: int) -> int:
    """What macOS lets the GPU of an Apple chip use at once, unless its owner has said otherwise.

    As Metal reports it up to the M4; newer systems allow somewhat more, so this errs on the safe side.
    """
    return total_memory_bytes * 2 // 3 if total_memory_bytes < 36 * GIB else total_memory_bytes * 3 // 4


def installed_version(distribution: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _number(text: str | None) -> int | None:
    """A positive whole number; anything else is unknown."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and int(text) > 0 else None


def _mac_free_memory(run: Run) -> int | None:
    """Free, speculative and inactive pages: what macOS hands out before it compresses or swaps."""
    shown = run(["vm_stat"]) or ""
    page = re.search(r"page size of (\d+) bytes", shown)
    counts = dict(re.findall(r"^Pages (\w+):\s+(\d+)\.", shown, re.MULTILINE))
    if page is None or "free" not in counts:
        return None
    return int(page[1]) * sum(int(counts.get(kind, 0)) for kind in ("free", "speculative", "inactive"))


def _mac_gpu_memory(total: int | None, chip: str | None, run: Run) -> int | None:
    """The GPU's working set: what the owner has set, else the share of memory that macOS allows by default."""
    if total is None or chip is None or not chip.startswith("Apple"):
        return None
    chosen = _number(run(["sysctl", "-n", "iogpu.wired_limit_mb"]))  # 0, or absent: the default
    if chosen is not None:
        return min(chosen * MIB, total)
    return default_gpu_memory(total)


def _linux_memory(read: Read) -> tuple[int | None, int | None]:
    """Total and available bytes, of the machine or of the tightest control group around this process."""
    counts = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo") or "", re.MULTILINE))
    total = int(counts["MemTotal"]) * 1024 if "MemTotal" in counts else None
    free = int(counts["MemAvailable"]) * 1024 if "MemAvailable" in counts else None
    for folder, limit_name, used_name in _control_groups(read):
        limit = _number(read(f"{folder}/{limit_name}"))  # "max" where there is none
        if limit is None or (total is not None and limit >= total):
            continue
        total = limit
        used = _number(read(f"{folder}/{used_name}"))
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", read(f"{folder}/memory.stat") or "", re.MULTILINE)
        if used is not None:
            room = max(limit - used + (int(cached[1]) if cached else 0), 0)
            free = room if free is None else min(free, room)
    return total, free


def _control_groups(read: Read) -> list[tuple[str, str, str]]:
    """Folders of this process's memory control groups, inner to outer, with the names of their limit and usage."""
    found = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = Path(path.lstrip("/"))
        found += [(str(root / part), *names) for part in dict.fromkeys((inner, *inner.parents))]
    return found


def _linux_chip(read: Read, run: Run) -> str | None:
    """The processor's own name; ARM kernels leave it out of cpuinfo, lscpu knows it."""
    for shown in (read("/proc/cpuinfo"), run(["lscpu"])):
        match = re.search(r"^model name\s*:\s*(\S.*)$", shown or "", re.MULTILINE | re.IGNORECASE)
        if match and match[1] != "-":
            return match[1].strip()
    return platform.machine() or None


def _linux_name(read: Read) -> str | None:
    """Name and version of the distribution, for example ``Debian 12``."""
    shown = read("/etc/os-release") or ""
    fields = dict(re.findall(r"^(\w+)=\"?([^\"\n]*)\"?$", shown, re.MULTILINE))
    name = fields.get("NAME", "").removesuffix(" GNU/Linux").removesuffix(" Linux")
    return f"{name} {fields.get('VERSION_ID', '')}".strip() or None


def _usable_cores() -> int | None:
    """Processors that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count()
