from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from node import log_file
from node.errors import TandemError, UserError
from node.log_file import RUN, folder, logged

log = logging.getLogger("node.some_module")


def lines(name: str = "node.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder() / name).read_text().splitlines()]


def test_what_is_done_is_written_as_objects_without_secrets(tandem_home: Path) -> None:
    with logged("node", ["serve", "--join", "abc"]):
        assert not folder().exists(), "nothing is made before there is something to write"
        log.info("to %s, with hf_abcdefgh12345678", "anna")
        log.debug("not at this level")
        logging.getLogger(RUN).warning("%s", "slow", extra={"details": {"kind": "slow_network"}})
    head, first, second = lines()
    assert head["message"].endswith("began: node serve --join[removed]")
    assert (first["level"], first["logger"], first["process"]) == ("info", "node.some_module", os.getpid())
    assert first["message"] == "to anna, with [removed]"
    assert first["time"].endswith("Z")
    assert (second["level"], second["kind"]) == ("warning", "slow_network")
    assert folder().stat().st_mode & 0o077 == 0
    log.info("after it")
    assert len(lines()) == 3


@pytest.mark.parametrize("level", ["debug", "warning", "off"])
def test_the_level_is_chosen(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log_file.LEVEL, level)
    with logged("node", []):
        log.debug("a")
        log.warning("b")
    found = [entry["message"] for entry in lines()[1:]] if folder().exists() else []
    assert found == {"debug": ["a", "b"], "warning": ["b"], "off": []}[level]


def test_no_such_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log_file.LEVEL, "loud")
    with pytest.raises(UserError, match="TANDEM_LOG=loud: give one of debug, info"), logged("node", []):
        pass


def test_why_it_failed_is_written_with_where(tandem_home: Path) -> None:
    with pytest.raises(TandemError), logged("node", []):
        raise TandemError("the disk is full")
    assert lines()[-1]["message"] == "failed: the disk is full"
    assert "test_log_file.py" in lines()[-1]["traceback"]
    with pytest.raises(UserError), logged("node", []):
        raise UserError("a mistake is said where it was made")
    assert len(lines()) == 2


@pytest.mark.parametrize("home", ["/proc/self/nowhere", "/dev/full"])
def test_where_it_cannot_be_written_nothing_is_said(
    home: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_HOME", home)
    with logged("node", []):
        log.info("nobody hears")
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_is_full_is_no_matter(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import logging, resource, signal; from node.log_file import logged\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with logged('node', []):\n"
        "    for number in range(9): logging.getLogger('node.x').info('nobody hears %d', number)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder() / "node.jsonl").stat().st_size == 100


def test_a_full_file_is_put_aside_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MOST_BYTES", 300)
    with logged("node", []):
        for number in range(40):
            log.info("record %d", number)
    names = sorted(path.name for path in folder().glob("*.jsonl"))
    assert names == ["node.1.jsonl", "node.2.jsonl", "node.3.jsonl", "node.jsonl"]
    assert lines()[-1]["message"] == "record 39"
    kept = [entry["message"] for name in ("node.3.jsonl", "node.2.jsonl", "node.1.jsonl") for entry in lines(name)]
    numbers = [int(message.split()[1]) for message in [*kept, *(entry["message"] for entry in lines())]]
    assert numbers == list(range(numbers[0], 40))


def _write(most: int, word: str) -> None:
    log_file.MOST_BYTES = most
    with logged("node", []):
        for number in range(200):
            log.info("%s %d", word, number)


def test_programs_that_write_at_the_same_time_lose_nothing() -> None:
    spawn = multiprocessing.get_context("spawn")
    # So much that one of the files is put aside, and no more.
    writers = [spawn.Process(target=_write, args=(40_000, word)) for word in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = [entry["message"] for path in folder().glob("*.jsonl") for entry in lines(path.name)]
    assert {message for message in found if "began" not in message} == {f"{w} {n}" for w in "ab" for n in range(200)}


def test_warnings_are_shown_as_without_a_log(tandem_home: Path) -> None:
    code = (
        "import logging, sys; from node.log_file import logged\n"
        "with logged('node', []):\n"
        "    logging.getLogger('node.x').warning('look here')\n"
        "    logging.getLogger('node.x').info('but not here')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "look here\n")
