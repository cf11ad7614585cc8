from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

from node.hardware import GIB, Facts, describe, facts, read_text, run_text

# As macOS prints them (a Mac Studio, 64 GB; M1 Air, 16 GB).
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                             1310720.
Pages active:                            400123.
Pages inactive:                         1966080.
Pages speculative:                        65536.
Pages throttled:                              0.
Pages wired down:                        210345.
Pages purgeable:                          12345.
"Translation faults":                 987654321.
Pages copy-on-write:                   12345678.
File-backed pages:                       600000.
Pages stored in compressor:                   0.
"""
STUDIO = {
    "sysctl -n hw.memsize": "68719476736",
    "sysctl -n hw.ncpu": "12",
    "sysctl -n machdep.cpu.brand_string": "Apple M2 Max",
    "sysctl -n iogpu.wired_limit_mb": "0",
    "sw_vers -productVersion": "26.2",
    "scutil --get ComputerName": "Studio",
    "vm_stat": VM_STAT,
}


def mac(command: str = "", output: str | None = None) -> Facts:
    outputs: dict[str, str | None] = {**STUDIO, command: output}

    def run(arguments: Sequence[str]) -> str | None:
        return outputs.get(" ".join(arguments))

    return facts("Darwin", run=run, read=lambda path: None)


def test_a_mac_reads_as_its_owner_knows_it() -> None:
    found = mac()
    assert (found.name, found.chip, found.os, found.cores) == ("Studio", "Apple M2 Max", "macOS 26.2", 12)
    assert found.total_memory_bytes == 64 * GIB
    assert found.free_memory_bytes == 51 * GIB  # free + speculative + inactive pages
    assert found.gpu_memory_bytes == 48 * GIB
    assert describe(found) == f"Studio · M2 Max · 64 GB (51 free) · macOS 26.2 · mlx {found.mlx}"


@pytest.mark.parametrize(
    ("memory", "limit", "usable"),
    [
        (16 * GIB, "0", 16 * GIB * 2 // 3),
        (16 * GIB, "14336", 14 * GIB),
        (36 * GIB, None, 27 * GIB),
        (128 * GIB, "0", 96 * GIB),
    ],
)
def test_the_gpu_may_use_a_share_of_memory(memory: int, limit: str | None, usable: int) -> None:
    outputs: dict[str, str | None] = {
        **STUDIO,
        "sysctl -n hw.memsize": str(memory),
        "sysctl -n iogpu.wired_limit_mb": limit,
    }
    found = facts("Darwin", run=lambda arguments: outputs.get(" ".join(arguments)), read=lambda path: None)
    assert found.gpu_memory_bytes == usable == found.usable_memory_bytes


def test_an_intel_mac_has_no_gpu_limit() -> None:
    found = mac("sysctl -n machdep.cpu.brand_string", "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz")
    assert found.gpu_memory_bytes is None
    assert found.usable_memory_bytes == found.total_memory_bytes


def test_unknown_is_said_and_never_zero() -> None:
    found = facts("Darwin", run=lambda arguments: None, read=lambda path: None)
    assert (found.chip, found.total_memory_bytes, found.free_memory_bytes, found.cores) == (None, None, None, None)
    shown = describe(found)
    assert "chip unknown · memory unknown (unknown free) · macOS ·" in shown
    assert mac("sysctl -n hw.memsize", "garbage").total_memory_bytes is None
    assert mac("sysctl -n hw.memsize", "0").total_memory_bytes is None
    assert mac("vm_stat", "Mach Virtual Memory Statistics:").free_memory_bytes is None


LINUX = {
    "/proc/meminfo": "MemTotal:       24576000 kB\nMemFree:  1 kB\nMemAvailable:   20480000 kB\n",
    "/proc/self/cgroup": "0::/a/b",
    "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\n',
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: AMD EPYC\n",
}


def linux(**files: str) -> Facts:
    return facts("Linux", run=lambda arguments: None, read={**LINUX, **files}.get)


def test_linux() -> None:
    found = linux()
    assert (found.chip, found.os) == ("AMD EPYC", "Debian 12")
    assert found.total_memory_bytes == 24576000 * 1024
    assert found.free_memory_bytes == 20480000 * 1024
    assert found.gpu_memory_bytes is None


def test_a_container_counts_with_its_own_limit() -> None:
    inner = {
        "/sys/fs/cgroup/a/b/memory.max": "max",
        "/sys/fs/cgroup/a/memory.max": str(8 * GIB),
        "/sys/fs/cgroup/a/memory.current": str(6 * GIB),
        "/sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 5",
    }
    found = linux(**inner)
    assert found.total_memory_bytes == 8 * GIB
    assert found.free_memory_bytes == 3 * GIB


def test_a_container_of_the_older_kind() -> None:
    files = {
        "/proc/self/cgroup": "4:cpu:/x\n3:memory:/docker/1\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        "/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "9223372036854771712",
    }
    found = linux(**files)
    assert found.total_memory_bytes == 4 * GIB
    assert found.free_memory_bytes == 3 * GIB


def test_this_machine() -> None:
    found = facts()
    assert found.total_memory_bytes is not None
    assert found.free_memory_bytes is not None
    assert 0 < found.free_memory_bytes <= found.total_memory_bytes
    assert found.mlx is not None
    assert found.mlx_lm is not None


def test_questions_without_an_answer() -> None:
    assert run_text(["no-such-command-anywhere"]) is None
    assert run_text([sys.executable, "-c", "raise SystemExit(3)"]) is None
    assert run_text([sys.executable, "-c", ""]) is None
    assert run_text([sys.executable, "-c", "print(' yes ')"]) == "yes"
    assert read_text("/no/such/file") is None


def test_node_info() -> None:
    command = [sys.executable, "-c", "import sys; from node.cli import main; sys.exit(main())"]
    shown = subprocess.run([*command, "info", "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown)["total_memory_bytes"] == facts().total_memory_bytes
    line = subprocess.run([*command, "info"], capture_output=True, text=True, check=True).stdout
    assert line.count(" · ") == 4
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.startswith(
        "node "
    )
    assert subprocess.run([*command, "inof"], capture_output=True, text=True, check=False).returncode == 2
