"""Disks that become full while a run is under way, and have room again: nothing stops, and it is told once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Inputs, Outcome, arguments, end, faulty, make_inputs
from tests.fixtures.disks import Disk, own_disk
from tests.fixtures.pairs import pair
from tests.fixtures.runs import Run, assert_same_losses, losses, notes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ITERS = 240
# Far from the checkpoints on either side: a busy machine sees a step some steps late.
FULL_FROM, FULL_TO = 13, 83
SAVE = ("--save-every", "40")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), ITERS)


def _through(
    run: Run, adapter: Path, disks: Sequence[Disk], full_until: Callable[[dict[str, Any]], bool] | None = None
) -> Outcome:
    """Let a run end, whose disks are full from a step on up to an event (or step)."""
    run.until_step(FULL_FROM)
    for disk in disks:
        disk.fill()
    if full_until is None:
        run.until_step(FULL_TO)
    else:
        run.until(full_until)
    for disk in disks:
        disk.free()
    return end(run, adapter)


def _told(outcome: Outcome, kind: str) -> list[dict[str, Any]]:
    """What was shown live; it stands in events.jsonl, too."""
    shown = [event for event in outcome.events if event.get("kind") == kind]
    assert [event["message"] for event in notes(outcome.folder, kind)] == [event["message"] for event in shown]
    return shown


def _saved(outcome: Outcome) -> list[int]:
    return [event["details"]["step"] for event in _told(outcome, "checkpoint")]


@pytest.mark.parametrize("full", [("anna",), ("anna", "ben")], ids=["of one node", "of all nodes"])
def test_the_disks_of_nodes_are_full(inputs: Inputs, tmp_path: Path, full: tuple[str, ...]) -> None:
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(own_disk(tmp_path / f"home-{name}")) for name in full]
        nodes = stack.enter_context(faulty(tmp_path, {"anna": [], "ben": []}))
        adapter = tmp_path / "adapters"
        outcome = _through(Run(*arguments(inputs, adapter, list(nodes.values()), *SAVE, iters=ITERS)), adapter, disks)
    outcome.check(inputs)
    assert not outcome.repairs, "nobody was lost"
    failed, again = _told(outcome, "copy_failed"), _told(outcome, "copied_again")
    assert sorted(event["details"]["node"] for event in failed) == sorted(full), "each told once"
    assert sorted(event["details"]["node"] for event in again) == sorted(full)
    assert all("Is the disk full?" in event["message"] for event in failed), failed
    assert {120, 160, 200, ITERS} <= set(_saved(outcome))
    if len(full) == 1:
        assert {40, 80} & set(_saved(outcome)), "the other one saved meanwhile"


def test_the_disk_of_the_coordinator_is_full(inputs: Inputs, tmp_path: Path) -> None:
    with own_disk(tmp_path / "disk") as disk, faulty(tmp_path, {"anna": [], "ben": []}) as nodes:
        adapter = disk.folder / "adapters"
        home = {"TANDEM_HOME": str(disk.folder / "home")}
        for node in nodes.values():
            pair(node.home, disk.folder / "home")
        run = Run(*arguments(inputs, adapter, list(nodes.values()), *SAVE, iters=ITERS), environment=home)
        # Training goes on while a checkpoint is written: its step says nothing of when that is tried.
        second = "checkpoint of step 80 not written"
        outcome = _through(run, adapter, [disk], lambda event: event.get("message", "").startswith(second))
        outcome.check(inputs)
        assert not outcome.repairs, "nobody was lost"
        cannot, can = _told(outcome, "disk")
        assert "No space left on device; training goes on" in cannot["message"]
        assert can["message"].endswith("can be written again; nothing is missing")
        assert len(_told(outcome, "copy_failed")) == len(_told(outcome, "copied_again")) == 1
        assert [event["message"].partition(":")[0] for event in _told(outcome, "checkpoint_failed")] == [
            "checkpoint of step 40 not written",
            second,
        ]
        assert _saved(outcome) == [120, 160, 200, ITERS]


def test_one_whose_disk_is_full_holds_nothing_and_the_other_does(inputs: Inputs, tmp_path: Path) -> None:
    """The coordinator is killed: the state of the last step is held by who could write it."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(own_disk(tmp_path / "home-anna"))
        nodes = stack.enter_context(faulty(tmp_path, {"anna": [], "ben": []}))
        adapter = tmp_path / "adapters"
        run = Run(*arguments(inputs, adapter, list(nodes.values()), iters=ITERS))
        run.until_step(FULL_FROM)
        disk.fill()
        run.until_step(FULL_TO)
        run.kill()
        addresses = ",".join(node.address for node in nodes.values())
        again = Run("train", "--resume", "--adapter-path", adapter, "--nodes", addresses, "--no-local", "--force-all")
        again.until(lambda event: event.get("kind") == "taken_up")
        disk.free()
        code, errors = again.wait()
    assert code == 0, errors
    (taken,) = notes(adapter, "taken_up")
    assert taken["holder"] == "ben"
    assert taken["step"] >= FULL_TO
    assert not notes(adapter, "replay"), "nothing was computed again"
    assert_same_losses(losses(adapter), inputs.losses, 1e-4)
