"""The app's main program, which runs on Linux as well: it asks for the network, then is as if it were the command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.installs import ROOT, is_there

pytestmark = pytest.mark.skipif(not is_there("cc"), reason="needs a C compiler")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("launcher") / "mlx-tandem"
    strict = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2"]
    subprocess.run(["cc", *strict, "-o", made, ROOT / "deploy" / "launchd" / "launcher.c"], check=True)
    return made


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_it_ends_as_the_command_does(launcher: Path, script: str, code: int) -> None:
    assert subprocess.run([launcher, "0", "sh", "-c", script], check=False).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_passes_signals_on(launcher: Path, number: signal.Signals) -> None:
    script = f"trap 'echo heard; exit 5' {number.name.removeprefix('SIG')}; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen([launcher, "0", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == "heard\n"
    assert process.returncode == 5


def test_the_command_is_a_child_with_signals_as_they_come(launcher: Path) -> None:
    seen = subprocess.run(
        [launcher, "0", "sh", "-c", "echo $PPID; grep SigBlk /proc/self/status || echo 0"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert int(seen[0]) not in (os.getpid(), 1)
    assert int(seen[-1], 16) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [((), 2, "usage"), (("0",), 2, "usage"), (("soon", "true"), 2, "usage"), (("0", "/no/such"), 1, "/no/such")],
)
def test_mistakes(launcher: Path, arguments: tuple[str, ...], code: int, word: str) -> None:
    done = subprocess.run([launcher, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert word in done.stderr


def in_a_namespace() -> bool:
    """Whether a namespace can be made, in which there is no network."""
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and subprocess.run([unshare, "-n", "true"], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not in_a_namespace(), reason="needs root and unshare")
def test_without_the_network_it_says_so_and_starts_all_the_same(launcher: Path) -> None:
    done = subprocess.run(
        ["unshare", "-n", launcher, "1", "echo", "started"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "started\n"
    assert "Privacy & Security > Local Network" in done.stderr


@pytest.mark.skipif(not in_a_namespace() or not is_there("ip"), reason="needs root, unshare and ip")
def test_it_asks_bonjour_and_waits_until_it_may(launcher: Path) -> None:
    script = (
        "ip link set lo up\n"
        f"'{launcher}' 600 echo started 2>&1 | while read -r line; do echo \"$line\"; "
        "case $line in *cannot*) ip route add 224.0.0.0/4 dev lo ;; esac; done"
    )
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    first, *rest = done.stdout.splitlines()
    assert "cannot be reached" in first
    assert rest == ["the local network can be reached now", "started"]
