"""What the owner of a machine allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.info import Battery
from node.owner import IDLE_LOAD, IDLE_SECONDS, MEMORY_LIMIT, Owner, idle_seconds


def test_a_pause_outlives_the_program(tmp_path: Path) -> None:
    Owner(tmp_path).pause(paused=True)
    assert Owner(tmp_path).paused
    Owner(tmp_path).pause(paused=False)
    Owner(tmp_path).pause(paused=False)
    assert not Owner(tmp_path).paused


@pytest.mark.parametrize(
    ("idle", "load", "words"),
    [
        (IDLE_SECONDS, 9.0, ""),
        (IDLE_SECONDS - 1, 0.0, "nobody has used it"),
        (None, IDLE_LOAD / 2, ""),
        (None, IDLE_LOAD, "nothing else to do"),
    ],
)
def test_only_when_idle(tmp_path: Path, idle: float | None, load: float, words: str) -> None:
    said = Owner(tmp_path, only_when_idle=True, idle=lambda: idle, load=lambda: load).waits_for
    assert words in said
    assert bool(said) == bool(words)
    assert Owner(tmp_path, idle=lambda: idle, load=lambda: load).waits_for == ""


@pytest.mark.parametrize(("allowed", "battery", "waits"), [
    (False, "yes", True), (False, "no", False), (False, "", False), (True, "yes", False),
])  # fmt: skip
def test_on_battery_only_where_that_is_allowed(tmp_path: Path, allowed: bool, battery: Battery, waits: bool) -> None:
    said = Owner(tmp_path, allow_battery=allowed).waits_for_mains(battery)
    assert said == ("runs on battery power (node serve --allow-battery takes jobs all the same)" if waits else "")


def test_a_limit_on_memory_reaches_the_worker(tmp_path: Path) -> None:
    assert Owner(tmp_path, max_memory_bytes=5).environment() == {MEMORY_LIMIT: "5"}
    assert Owner(tmp_path).environment() == {}


def test_how_long_a_mac_was_left_alone() -> None:
    shown = '    | |   "HIDIdleTime" = 421000000000\n    | |   "HIDPointerAcceleration" = 45056'
    assert idle_seconds(lambda _: shown) == 421.0
    assert idle_seconds(lambda _: None) is None
