"""What the shell completes our commands with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from coordinator import addresses
from coordinator.addresses import Remembered
from coordinator.cli import coordinator
from coordinator.running.presence import present
from node.cli import cli as node
from node.home import home
from tests.coordinator.running.made import make_run
from tests.fixtures.pairs import pair


def offered(line: str, group: click.Command = coordinator) -> list[str]:
    """What the last word of a line may become."""
    *words, incomplete = line.split(" ")
    found = ShellComplete(group, {}, "program", "_PROGRAM_COMPLETE").get_completions(words, incomplete)
    return [item.value if item.type == "plain" else f"({item.type})" for item in found]


@pytest.mark.parametrize("command", ["watch", "runs show", "runs compare r9", "runs rm", "dashboard", "doctor --run"])
def test_runs(command: str, tmp_path: Path) -> None:
    assert offered(f"{command} ") == ["(dir)"]
    make_run("20260101-one", tmp_path / "one", [2.0])
    make_run("20260102-two", tmp_path / "two", [2.0])
    assert offered(f"{command} ") == ["20260102-two", "20260101-one", "last"]
    assert offered(f"{command} 20260101") == ["20260101-one"]
    assert offered(f"{command} l") == ["last"]
    assert offered(f"{command} /tmp") == ["(dir)"]


def test_only_runs_at_work_can_be_stopped(tmp_path: Path) -> None:
    make_run("20260101-one", tmp_path / "one", [2.0])
    assert offered("stop ") == ["(dir)"]
    with present("20260102-two", tmp_path / "two", "tiny", signals=True):
        assert offered("stop ") == ["20260102-two", "last"]


@pytest.mark.parametrize("command", ["train --nodes", "doctor --nodes", "nodes --nodes"])
def test_nodes(command: str, tmp_path: Path) -> None:
    pair(home(), tmp_path / "amber")
    pair(home(), tmp_path / "Ben's Mac")
    addresses.remember(
        home(), [Remembered("10.0.0.2:1", "id", "birch", os.environ.get("TANDEM_FLEET", ""), time.time())]
    )
    assert offered(f"{command} ") == ["auto", "local", "amber", "birch"], "what a shell would have to quote is left out"
    assert offered(f"{command} b") == ["birch"]
    assert offered(f"{command} amber,") == ["amber,auto", "amber,local", "amber,birch"]
    assert offered(f"{command} amber,birch,a") == ["amber,birch,auto"]


def test_paired_machines(tmp_path: Path) -> None:
    pair(home(), tmp_path / "amber")
    assert offered("unpair ") == ["amber"]
    assert offered("unpair x") == []
    assert offered("forget a", node) == ["amber"]


def test_a_shell_is_answered(tmp_path: Path) -> None:
    make_run("20260101-one", tmp_path / "one", [2.0])
    environment = {
        **os.environ,
        "_COORDINATOR_COMPLETE": "bash_complete",
        "COMP_WORDS": "coordinator runs show ",
        "COMP_CWORD": "3",
    }
    script = Path(sys.executable).parent / "coordinator"
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["plain,20260101-one", "plain,last"]
