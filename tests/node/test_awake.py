"""Sleep is held off by a helper that never outlives what it is for."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from node import awake
from node.awake import Awake
from tests.fixtures.awake import FakeCaffeinate
from tests.fixtures.runs import wait_for_end


@pytest.fixture
def fake(tmp_path: Path) -> FakeCaffeinate:
    return FakeCaffeinate(tmp_path)


def test_it_runs_while_it_is_wanted_and_watches_this_process(fake: FakeCaffeinate) -> None:
    with Awake(fake.program) as held:
        held.start()  # a second time starts no second one
        (call,) = fake.calls(1)
        assert call.arguments == ("-i", "-m", "-w", str(call.parent))
        assert call.runs
        assert held.trouble == ""
    assert not call.runs
    held.stop()
    with held:
        assert len(fake.calls(2)) == 2, "it can be held again"


def test_it_does_not_outlive_a_process_that_is_killed(fake: FakeCaffeinate) -> None:
    code = (
        f"import time; from node.awake import Awake; Awake({fake.program!r}).start(); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        (call,) = fake.calls(1)
        assert call.arguments[-1] == str(process.pid)
        process.send_signal(signal.SIGKILL)
    wait_for_end(call.pid)


@pytest.mark.parametrize("program", ["missing", "no program"])
def test_where_it_cannot_be_started_that_is_said_and_nothing_fails(tmp_path: Path, program: str) -> None:
    (tmp_path / "no program").write_text("")
    with Awake(str(tmp_path / program)) as held:
        assert str(tmp_path / program) in held.trouble
        assert held.trouble.startswith("this machine may fall asleep")


def test_macs_are_kept_awake_and_other_machines_left_alone(
    fake: FakeCaffeinate, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert awake.PROGRAMS == {"Darwin": "/usr/bin/caffeinate"}
    monkeypatch.setattr(awake.platform, "system", lambda: "Linux")
    with Awake() as held:
        assert held._process is None
        assert held.trouble == ""
    monkeypatch.setattr(awake.platform, "system", lambda: "Darwin")
    monkeypatch.setitem(awake.PROGRAMS, "Darwin", fake.program)
    with Awake():
        fake.calls(1)
