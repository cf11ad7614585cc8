"""The units under a real systemd, in namespaces of its own: they start a node, and what they forbid lets it train."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.installs import UNIT, Machine
from tests.fixtures.models import tiny_model
from tests.fixtures.runs import write_chat_data

SYSTEMD = Path("/usr/lib/systemd/systemd")
END_SECONDS = 120.0
TARGETS = ("sysinit", "basic", "shutdown", "network-online")
BOOT = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run || exit 1
umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 1
exec env -i container=test PATH=$PATH SYSTEMD_UNIT_PATH=$1 SYSTEMD_GENERATOR_PATH=$2 \\
    SYSTEMD_ENVIRONMENT_GENERATOR_PATH=$2 "$0" --system --unit=test.target --show-status=no
"""
STORY = """
until grep -q 'serving as' "$SAID"; do sleep 0.1; done
grep -E '^(Seccomp|NoNewPrivs):' /proc/$(systemctl show -p MainPID --value $UNIT)/status
"$BIN/coordinator" train --model model --data data --adapter-path adapters --iters 2 --batch-size 4 --num-layers -1 \\
    --nodes 127.0.0.1:24999 --quiet
echo trained $?
systemctl stop $UNIT
systemctl show -p Result -p ExecMainStatus $UNIT
echo ended >ended
"""


def cgroups() -> Path | None:
    """Where new ones can be made."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    found = [Path(words[1]) for words in mounts if words[2] == "cgroup2" and os.access(words[1], os.W_OK)]
    return found[0] if found else None


def can_boot() -> bool:
    """Whether a systemd can be started beside this system's own."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return root and SYSTEMD.exists() and shutil.which("unshare") is not None and cgroups() is not None


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A control group for all that systemd starts; it goes with what is below it."""
    parent = cgroups()
    assert parent is not None
    made = parent / f"tandem-test-{os.getpid()}"
    made.mkdir()
    yield made
    until = time.monotonic() + END_SECONDS
    while (made / "cgroup.events").read_text().startswith("populated 1") and time.monotonic() < until:
        time.sleep(0.05)
    for folder, _, _ in os.walk(made, topdown=False):
        Path(folder).rmdir()


@pytest.mark.slow
@pytest.mark.skipif(not can_boot(), reason="needs root, unshare, systemd and a cgroup2 file system")
@pytest.mark.parametrize("start", ["login", "boot"])
def test_the_unit_starts_a_node_that_trains(tmp_path: Path, group: Path, start: str) -> None:
    machine = Machine(tmp_path, "Linux")
    machine.install(f"--at-{start}", "--", "--port", "24999", "--host", "127.0.0.1")
    units, work, said = tmp_path / "units", tmp_path / "work", tmp_path / "said"
    (units / f"{UNIT}.d").mkdir(parents=True)
    (tmp_path / "generators").mkdir()
    tiny_model(work / "model", "llama")
    write_chat_data(work / "data")
    shutil.copy(machine.service(start), units / UNIT)
    # What is installed here may lie in /tmp, which a unit with PrivateTmp does not see.
    dropped = f"[Service]\nPrivateTmp=no\nStandardOutput=file:{said}\nStandardError=file:{said}\n"
    (units / f"{UNIT}.d" / "test.conf").write_text(dropped)
    for name in TARGETS:
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (units / "test.target").write_text(f"[Unit]\nDefaultDependencies=no\nWants={UNIT} story.service\n")
    (work / "story").write_text(STORY)
    variables = {
        "SAID": said, "UNIT": UNIT, "BIN": machine.bin, "HOME": work, "TANDEM_HOME": machine.tandem_home,
        "TANDEM_BONJOUR": "off", "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"],
    }  # fmt: skip
    told = "".join(f'Environment="{name}={value}"\n' for name, value in variables.items())
    (units / "story.service").write_text(
        f"[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\n{told}WorkingDirectory={work}\n"
        f"StandardOutput=file:{work}/told\nStandardError=file:{work}/told\nExecStart=/bin/sh -c '. ./story'\n"
    )
    spaces = "unshare --pid --fork --mount --cgroup --net --uts --ipc --mount-proc --kill-child"
    enter = f'echo $$ >"{group}/cgroup.procs"; exec {spaces} sh -c "$@"'
    booted = subprocess.Popen(
        ["sh", "-c", enter, "sh", BOOT, str(SYSTEMD), str(units), str(tmp_path / "generators")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + END_SECONDS
        while not (work / "ended").exists() and booted.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        booted.kill()
        booted.wait()
    report = (work / "told").read_text() if (work / "told").exists() else "systemd did not start the story"
    for expected in ("Seccomp:\t2", "NoNewPrivs:\t1", "trained 0", "Result=success", "ExecMainStatus=0"):
        assert expected in report, f"{report}\n{said.read_text() if said.exists() else ''}"
