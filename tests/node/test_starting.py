"""Ctrl-C in a program's first moments, and standard streams that are closed or full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(sys.executable).parent
PROGRAMS = ("coordinator", "node", "tandem")
INTERRUPTED = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass  # as libraries do that can go on without what they import
raise SystemExit("it went on")
"""


def shell(line: str, home: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run one of our programs by a shell, with a ``TANDEM_HOME`` of its own."""
    environment = {**os.environ, "TANDEM_HOME": str(home), "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_a_program_is_imported(program: str, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(INTERRUPTED)
    done = shell(f"PYTHONPATH={tmp_path} {program} --help", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped\n")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(INTERRUPTED)
    done = shell(f"trap '' INT; PYTHONPATH={tmp_path} coordinator --help", tmp_path)
    assert done.stderr == "it went on\n"


def test_ctrl_c_while_a_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = shell(f"PYTHONPATH={tmp_path} coordinator train --help", tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


@pytest.mark.parametrize("command", ["coordinator runs", "node info", "tandem --help", "coordinator data --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(command: str, unbuffered: str, tmp_path: Path) -> None:
    done = shell(f"PYTHONUNBUFFERED={unbuffered} {command} 1</dev/null", tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: standard output: Bad file descriptor\n")
    if Path("/dev/full").exists():
        done = shell(f"PYTHONUNBUFFERED={unbuffered} {command} >/dev/full", tmp_path)
        assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_exit_code_tells_what_cannot_be_said(tmp_path: Path) -> None:
    assert shell("coordinator no-such-command 2>/dev/full", tmp_path).returncode == 2


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("coordinator runs", 0),
        ("node info --json", 0),
        ("tandem --help", 0),
        ("coordinator train --model none --data none", 2),
        ("coordinator generate --model none --prompt x", 2),
        ("coordinator pair 127.0.0.1:1 --code 1234-5678", 1),
    ],
)
def test_closed_streams_change_nothing_else(command: str, code: int, closed: str, tmp_path: Path) -> None:
    done = shell(f"{command} {closed}", tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom node.stdio import prepare_streams\nprepare_streams()\n"
        "handle = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "print('said'), sys.stdout.flush(), os.system('echo by a child')\n"
        "sys.exit(handle)\n"
    )
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" file >&- 2>&-', program], cwd=tmp_path, check=False)
    assert done.returncode > 2
    assert (tmp_path / "file").read_text() == ""
