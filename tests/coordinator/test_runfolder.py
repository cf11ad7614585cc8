"""A run's folder: locked, archived, cut back to a step."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from coordinator import stream
from coordinator.runfolder import Recorder, RunFolder, read_json_lines
from coordinator.stream import (
    Advanced,
    Broadcast,
    FleetFormed,
    FleetLink,
    FleetMember,
    Noted,
    RunFinished,
    RunStarted,
    Sampled,
    StepFinished,
    Validated,
)
from node.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "adapters")


def test_two_runs_cannot_have_one_folder(folder: RunFolder) -> None:
    other = RunFolder(folder.path)
    folder.check_free()
    assert not folder.path.exists(), "looking writes nothing"
    folder.lock()
    for attempt in (other.lock, other.check_free):
        with pytest.raises(UserError, match="another run is writing here; choose another folder"):
            attempt()
    folder.unlock()
    assert list(folder.path.iterdir()) == [], "the lock leaves nothing behind"
    other.check_free()
    other.lock()
    other.unlock()


def test_a_process_that_was_killed_leaves_no_lock(folder: RunFolder) -> None:
    code = (
        "import os, sys; from pathlib import Path; from coordinator.runfolder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1])); folder.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another run"):
            folder.check_free()
        process.kill()
    folder.check_free()
    folder.lock()
    folder.unlock()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a folder you may write to"):
        RunFolder(tmp_path / "file" / "adapters").lock()


def test_the_run_that_a_folder_holds(folder: RunFolder) -> None:
    assert folder.run_id() is None
    folder.path.mkdir()
    folder.begin("r1", "seed: 1\n")
    assert folder.run_id() == "r1"
    assert folder.config.read_text() == "seed: 1\n"
    for broken in ("{", "[]", "{}"):
        (folder.path / "run.json").write_text(broken)
        assert folder.run_id() is None


def fill(folder: RunFolder, mark: str) -> None:
    (folder.checkpoints / "0000002").mkdir(parents=True)
    for name in ("adapters.safetensors", "0000002_adapters.safetensors", "adapter_config.json", "metrics.jsonl"):
        (folder.path / name).write_text(mark)


def test_an_older_run_is_moved_and_what_is_not_ours_stays(folder: RunFolder) -> None:
    assert folder.archive() is None
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    (folder.path / "my_adapters.safetensors").write_text("mine")
    assert folder.archive() is None
    fill(folder, "one")
    folder.begin("r1", "")
    target = folder.archive()
    assert target == folder.path / "previous" / "r1"
    assert (target / "0000002_adapters.safetensors").read_text() == "one"
    assert (target / "checkpoints" / "0000002").is_dir()
    assert {path.name for path in folder.path.iterdir()} == {"notes.txt", "my_adapters.safetensors", "previous"}


def test_nothing_archived_is_ever_overwritten(folder: RunFolder) -> None:
    for mark in ("one", "two", "three"):
        fill(folder, mark)
        folder.begin("r1", "")
        folder.archive()
    kept = {path.name: (path / "metrics.jsonl").read_text() for path in (folder.path / "previous").iterdir()}
    assert kept == {"r1": "one", "r1-2": "two", "r1-3": "three"}


def test_files_of_mlx_lm_are_archived_too(folder: RunFolder) -> None:
    fill(folder, "mlx_lm's")
    target = folder.archive()
    assert target is not None
    assert target.name.startswith("before-")


def test_metrics_are_cut_back_to_a_step(folder: RunFolder) -> None:
    folder.path.mkdir()
    entries = [{"step": 0, "val_loss": 3.0}, *({"step": step, "loss": 1.0} for step in range(1, 6))]
    entries.insert(4, {"step": 3, "val_loss": 2.0})
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    folder.metrics.write_text(text + '{"step": 6, "lo')
    kept = folder.truncate_metrics(3)
    assert kept == [entry for entry in entries if entry["step"] <= 3]
    assert read_json_lines(folder.metrics) == kept
    assert folder.truncate_metrics(0) == [entries[0]]


def test_no_metrics_yet(folder: RunFolder) -> None:
    folder.path.mkdir()
    assert folder.truncate_metrics(5) == []


def test_what_the_recorder_writes(folder: RunFolder) -> None:
    folder.path.mkdir()
    recorder = Recorder(folder, pytest.fail)
    recorder.handle(RunStarted("r1", "adapters", {}, 4, 2, 2, ()))
    recorder.handle(StepFinished({"step": 2, "loss": 1.0}, report=True))
    recorder.handle(Validated({"step": 2, "val_loss": 1.0}, best=True))
    recorder.handle(Sampled(2, "Why?", "Bécause\n"))
    recorder.handle(Advanced("validating", 1, 2))
    recorder.handle(Noted("warning", "careful", "warning", {"step": 2}))
    recorder.handle(stream.Tested(1.5, 7))
    recorder.handle(RunFinished("done", (), ()))
    assert read_json_lines(folder.metrics) == [{"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.0}]
    events = read_json_lines(folder.events)
    assert [event["kind"] for event in events] == ["resumed", "sample", "warning", "test", "finished"]
    assert events[1]["text"] == "Bécause\n"
    assert events[2]["level"] == "warning"
    assert events[2]["step"] == 2
    assert all(event["time"] > 0 for event in events)


def test_the_fleet_and_its_links_are_written_by_a_recorder_that_comes_later(folder: RunFolder) -> None:
    link = FleetLink("Studio", "Air", 2.1e10, 4e-4, "Studio ↔ Air: en3 21 Gbit/s 0.4 ms")
    members = (FleetMember("Studio", "Apple M2 Max", 64 << 30, 6), FleetMember("Air", None, None, 2))
    broadcast = Broadcast()
    broadcast.handle(FleetFormed(members, 8, ("2 machines", "and more"), (link,)))
    folder.path.mkdir(parents=True, exist_ok=True)
    broadcast.add(Recorder(folder, pytest.fail))
    (entry,) = read_json_lines(folder.events)
    assert (entry["kind"], entry["message"], entry["level"]) == ("fleet", "2 machines", "info")
    assert entry["links"] == [dataclasses.asdict(link)]
    assert [(member["name"], member["rows"]) for member in entry["members"]] == [("Studio", 6), ("Air", 2)]


def test_readers_hear_one_thing_at_a_time() -> None:
    """The data is read in one thread while machines come together in another."""
    inside, go_on = threading.Event(), threading.Event()
    heard: list[str] = []

    class Slow:
        def handle(self, event: Any) -> None:
            heard.append(f"{event.message} begins")
            if event.message == "first":
                inside.set()
                assert go_on.wait(30)
            heard.append(f"{event.message} ends")

        def close(self) -> None:
            pass

    broadcast = Broadcast([Slow()])
    first, second = (
        threading.Thread(target=broadcast.handle, args=(Noted("n", text),), daemon=True) for text in ("first", "second")
    )
    first.start()
    assert inside.wait(30)
    second.start()
    second.join(0.2)  # as long as it takes to be wrong
    go_on.set()
    for thread in (first, second):
        thread.join(30)
    assert heard == ["first begins", "first ends", "second begins", "second ends"]


def test_a_disk_that_cannot_be_written_is_told_once(folder: RunFolder) -> None:
    complaints: list[str] = []
    recorder = Recorder(folder, complaints.append)
    for step in (1, 2, 3):
        recorder.handle(StepFinished({"step": step}, report=False))
    assert len(complaints) == 1
    assert "metrics.jsonl" in complaints[0]
    folder.path.mkdir()
    recorder.handle(StepFinished({"step": 4}, report=False))
    assert [entry["step"] for entry in read_json_lines(folder.metrics)] == [1, 2, 3, 4], "nothing is missing"
    assert len(complaints) == 2
    assert complaints[1] == f"{folder.path} can be written again; nothing is missing"
