"""``coordinator nodes`` against real ``node serve`` processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.fixtures.nodes import ServingNode, loopback, serving

ENTRY = "import sys; from coordinator.cli import main; sys.exit(main())"


def nodes(home: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-P", "-c", ENTRY, "nodes", *arguments],
        env={**os.environ, **environment, "TANDEM_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def listed(home: Path, environment: Mapping[str, str], *arguments: str) -> dict[str, str]:
    """States by label."""
    done = nodes(home, environment, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {node["label"]: node["state"] for node in json.loads(done.stdout)["nodes"]}


def lists(wanted: dict[str, str], home: Path, environment: Mapping[str, str], *arguments: str) -> None:
    """Nodes have a second and a half to answer; on a busy machine they may need more than one call."""
    for _ in range(5):
        found = listed(home, environment, *arguments)
        if found == wanted:
            return
    assert found == wanted


def test_lists_who_serves_until_they_leave(tmp_path: Path) -> None:
    environment = loopback()
    home = tmp_path / "home"
    with serving(tmp_path, "Studio", "Mini", environment=environment, friends=[home]) as (studio, mini):
        began = time.monotonic()
        done = nodes(home, environment)
        print(f"nodes took {time.monotonic() - began:.2f} s")
        assert done.returncode == 0, done.stderr
        assert "looked" in done.stdout
        lists({"Mini": "free", "Studio": "free"}, home, environment)
        mini.stop()
        lists({"Studio": "free"}, home, environment)
        # Killed, it cannot withdraw.
        studio.kill()
        assert set(listed(home, environment)) <= {"Studio"}
    done = nodes(home, environment)
    assert done.returncode == 0
    assert "No node found, looked" in done.stdout
    assert "run `node serve` on the other Mac" in done.stdout


@pytest.mark.slow
def test_two_of_one_name_and_the_own_one(tmp_path: Path) -> None:
    environment = loopback()
    own = tmp_path / "own"
    with (
        ServingNode("Studio", tmp_path / "a", environment=environment, friends=[own]),
        ServingNode("Studio", tmp_path / "b", environment=environment, friends=[own]),
        ServingNode("Here", own, environment=environment),
    ):
        lists({"Here": "free", "Studio": "free", "Studio (2)": "free"}, own, environment)
        done = nodes(own, environment, "--nodes", "Studio")
        assert (done.returncode, "2 nodes have this name" in done.stderr) == (2, True), done
        lists({"Here": "free"}, own, environment, "--nodes", "local")
        assert "Here (here)" in nodes(own, environment, "--nodes", "local").stdout


def test_without_multicast_addresses_by_hand_do_the_same(tmp_path: Path) -> None:
    environment = {**loopback(), "TANDEM_BONJOUR": "off"}
    home = tmp_path / "home"
    with serving(tmp_path, "Studio", environment=environment, friends=[home]) as (studio,):
        lists({}, home, environment)
        lists({"Studio": "free"}, home, environment, "--nodes", studio.address)
        lists({"Studio": "free"}, home, environment)
        lists({"Studio": "free"}, home, environment, "--nodes", "studio")
    assert "Bonjour is switched off" in nodes(home, environment).stdout
