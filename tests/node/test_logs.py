"""The log of a node that a service starts."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from node import logs
from node.logs import logged_to


def test_a_process_and_its_children_write_to_the_log_and_then_no_more(tmp_path: Path) -> None:
    log = tmp_path / "made" / "node.log"
    for text in ("one", "two"):
        with logged_to(log):
            os.write(1, f"{text}\n".encode())
            subprocess.run(["sh", "-c", f"echo {text} of a child >&2"], check=True)
    os.write(1, b"elsewhere\n")
    assert log.read_text() == "one\none of a child\ntwo\ntwo of a child\n"
    assert log.stat().st_mode & 0o077 == 0, "pairing codes stand in it"


def test_the_log_is_kept_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_LOG_BYTES", 1000)
    monkeypatch.setattr(logs, "KEPT_LOG_BYTES", 100)
    log = tmp_path / "node.log"
    with logged_to(log, look_seconds=0.01):
        os.write(1, b"x" * 2000)
        until = time.monotonic() + 60
        while log.stat().st_size > 1000 and time.monotonic() < until:
            time.sleep(0.01)
        os.write(1, b"the end\n")
    assert log.stat().st_size < 1000
    assert log.read_text().endswith("the end\n")
