"""Who is at work on a run: a lock, not a number."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.running import control, presence
from coordinator.running.index import lock_path
from node.errors import UserError

WORK = """
import signal, sys, threading
from pathlib import Path
from coordinator.running.presence import present
ended = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: ended.set())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if "deaf" in sys.argv else lambda *_: ended.set())
with present("r1", Path("adapters"), "tiny", signals="thread" not in sys.argv):
    print("present", flush=True)
    ended.wait()
"""


@contextmanager
def at_work(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is at work on run r1 until it is told to end."""
    with subprocess.Popen([sys.executable, "-P", "-c", WORK, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "present\n"
        try:
            yield process
        finally:
            process.kill()


def test_who_is_at_work_is_seen_until_it_ends(tmp_path: Path) -> None:
    assert presence.find("r1") is None
    with presence.present("r1", tmp_path, "tiny", signals=True):
        found = presence.find("r1")
        assert found is not None
        assert (found.pid, found.folder, found.model, found.here) == (os.getpid(), str(tmp_path), "tiny", True)
        assert presence.find_all() == [found]
        with pytest.raises(
            UserError, match=f"run r1 is at work already .process {os.getpid()}.; to see it: coordinator"
        ):
            with presence.present("r1", tmp_path, "tiny", signals=True):
                pytest.fail("two at once")
        assert presence.find("r1") == found, "the second took nothing away"
    assert presence.find("r1") is None
    assert list(lock_path("r1").parent.iterdir()) == []


def test_a_killed_process_is_not_at_work_and_its_number_is_nobody() -> None:
    with at_work() as process:
        found = presence.find("r1")
        assert found is not None
        assert found.pid == process.pid
        process.kill()
        assert presence.wait_for_end("r1", 20)
    assert lock_path("r1").exists(), "it had no time to clean up"
    # The number is another's by now: ours.
    content = json.loads(lock_path("r1").read_text())
    lock_path("r1").write_text(json.dumps({**content, "pid": os.getpid()}))
    assert presence.find("r1") is None
    for stop in (control.ask_to_stop, control.stop_now):
        with pytest.raises(UserError, match="run r1 is not at work"):
            stop("r1")
    with presence.present("r2", Path("f"), "tiny", signals=True):
        assert not lock_path("r1").exists(), "what a killed one left is swept"


def test_asking_twice_to_stop_is_asking_once() -> None:
    with at_work() as process:
        assert not presence.wait_for_end("r1", 0.01)
        assert control.ask_to_stop("r1").pid == process.pid
        control.wait_until_saved("r1")
        assert process.wait(20) == 0


def test_one_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LEAVING_SECONDS", 1.0)
    with at_work("deaf") as process:
        control.stop_now("r1")
        assert process.wait(20) == -signal.SIGKILL


def test_a_program_that_takes_no_signals_is_left_alone() -> None:
    with at_work("thread") as process:
        with pytest.raises(UserError, match=f"belongs to a program of yours .process {process.pid}.; stop it there"):
            control.ask_to_stop("r1")
        assert process.poll() is None


def test_a_process_of_another_machine_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = platform.node()
    monkeypatch.setattr("platform.node", lambda: "Studio")
    with presence.present("r1", tmp_path, "tiny", signals=True):
        monkeypatch.setattr("platform.node", lambda: ours)
        with pytest.raises(UserError, match="is at work on Studio; stop it there"):
            control.ask_to_stop("r1")
