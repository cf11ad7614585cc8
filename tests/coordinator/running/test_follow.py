"""A run that another process does, told from its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator import stream
from coordinator.runfolder import RunFolder
from coordinator.running.follow import SHOWN_STEPS, Followed, follow
from coordinator.running.known import resolve
from coordinator.running.presence import present
from coordinator.stream import (
    FleetFormed,
    FleetMember,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    Sampled,
    StepFinished,
    Validated,
)
from tests.coordinator.running.made import COMMANDS, SUMMARY, make_run, started, step, validation, write


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def handle(self, event: RunEvent) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    def steps(self) -> list[int]:
        return [event.metrics["step"] for event in self.events if isinstance(event, StepFinished)]


def never(_: float) -> None:
    pytest.fail("there was something to tell")


def test_what_was_written_is_told_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    events: list[RunEvent] = [
        FleetFormed((FleetMember("a", "M2", 1 << 30, 6), FleetMember("b", None, None, 2)), 8, ("2 machines", "a 6/8")),
        Noted("warning", "careful", "warning", {"step": 3}),
        Sampled(2, "Why?", "Because\n"),
        stream.Tested(1.5, 7),
        RunFinished("done", SUMMARY, COMMANDS),
    ]
    write(folder, [started("r1", 4), *events])
    told = Told()
    Followed("r1", folder, told).look(alive=False)
    beginning, *rest = told.events
    assert isinstance(beginning, RunStarted)
    assert (beginning.run, beginning.name, beginning.total_steps, beginning.first_step) == ("r1", "adapters", 4, 1)
    assert beginning.facts == (("model", "tiny"), ("data", "30 rows"))
    assert rest == events


def test_a_run_that_ended_is_shown_whole(tmp_path: Path) -> None:
    make_run("r1", tmp_path / "adapters", [3.0, 2.0, 1.0])
    told = Told()
    finished = follow(resolve("r1"), told, never)
    assert finished == told.events[-1] == RunFinished("done", SUMMARY, COMMANDS)
    assert isinstance(told.events[0], RunStarted)
    assert [entry["step"] for entry in told.events[0].history] == [0, 1, 2, 3, 3]
    assert told.steps() == []


def test_a_run_at_work_is_followed_to_its_end(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0] * 40, status="running")
    told, rounds = Told(), 0

    def wait(_: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            assert told.steps() == list(range(22, 41)), "the last ones before, for speed and shares"
            write(folder, [step(41, 2.0), Noted("checkpoint", "saved"), validation(41, 1.0)])
        elif rounds == 2:
            write(folder, [validation(42, 5.0), RunFinished("interrupted", (("stopped", "at 42"),), ())])

    with present("r1", folder, "tiny", signals=True):
        finished = follow(resolve("r1"), told, wait)
    assert rounds == 2
    assert finished == RunFinished("interrupted", (("stopped", "at 42"),), ())
    assert told.events[-5:] == [
        StepFinished(step(41, 2.0).metrics, report=False),
        Validated(validation(41, 1.0).metrics, best=True),
        Noted("checkpoint", "saved"),
        Validated(validation(42, 5.0).metrics, best=False),
        finished,
    ]
    assert len(told.steps()) < SHOWN_STEPS + 1
    reports = [e.metrics["step"] for e in told.events if isinstance(e, StepFinished) and e.report]
    assert reports == list(range(22, 41, 2)), "every second, as the options say"


def test_steps_that_are_computed_again_are_told_once(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0] * 5, status="running")
    told = Told()
    followed = Followed("r1", folder, told)
    followed.look(alive=True)
    RunFolder(folder).truncate_metrics(3)
    write(folder, [started("r1", 8, first=4), step(4, 3.0)])
    followed.look(alive=True)
    write(folder, [step(5, 3.0), step(6, 1.0), step(99, 1.0)])
    followed.look(alive=True)
    followed.close()
    assert told.steps() == [1, 2, 3, 4, 5, 6, 99]
    assert [e.total_steps for e in told.events if isinstance(e, RunStarted)] == [5, 8], "somebody went on with it"


def test_a_run_that_is_about_to_be_resumed_has_not_ended(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0, 2.0])
    told, rounds = Told(), 0

    def wait(_: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            assert [event.kind for event in told.events if isinstance(event, Noted)] == ["preparing"]
            assert len(told.events) == 1
            write(folder, [started("r1", 4, first=3)])
        elif rounds == 2:
            write(folder, [step(3, 1.0), RunFinished("done", (), ())])

    with present("r1", folder, "tiny", signals=True):
        assert follow(resolve("r1"), told, wait) == RunFinished("done", (), ())
    assert told.steps() == [1, 2, 3]


def test_a_run_that_has_written_nothing_yet(tmp_path: Path) -> None:
    folder, told, rounds = tmp_path / "adapters", Told(), 0
    make_run("older", folder, [9.0])

    def wait(_: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 2:
            make_run("r1", folder, [3.0], status="running")
        elif rounds == 3:
            write(folder, [RunFinished("done", (), ())])

    with present("r1", folder, "tiny", signals=True):
        assert follow(resolve("r1"), told, wait) == RunFinished("done", (), ())
    assert rounds == 3
    assert [event.run for event in told.events if isinstance(event, RunStarted)] == ["r1"]
    assert told.steps() == [1], "nothing of the older run"


def test_a_run_that_was_killed_has_no_last_word(tmp_path: Path) -> None:
    make_run("r1", tmp_path / "adapters", [3.0, 2.0], status="running")
    told = Told()
    assert follow(resolve("r1"), told, never) is None
    assert isinstance(told.events[0], RunStarted)


@pytest.mark.parametrize(
    "entry",
    [{}, {"facts": 3, "total_steps": "x", "first_step": None}, {"facts": [["a"], "b", ["c", 1]], "total_iters": -3}],
)
def test_files_of_an_older_version_or_damaged_ones(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    lines = [
        {"kind": "started", **entry},
        {"kind": "fleet", "members": [3, {}], "lines": None},
        {"kind": "sample"},
        {"kind": "test"},
        {},
        {"kind": "finished"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.jsonl").write_text('{"step": "x"}\n{"loss": 1}\n{"step": 1, "loss": null}\n')
    told = Told()
    followed = Followed("r1", folder, told)
    followed.look(alive=False)
    followed.close()
    assert isinstance(told.events[0], RunStarted)
    assert followed.finished is not None


@pytest.mark.parametrize("options", [(), ("--plain",), ("--json",), ("--quiet",)])
def test_watching_ends_when_nobody_reads_any_more(options: tuple[str, ...], tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [2.0, 1.5], status="running")
    script = [sys.executable, "-P", "-c", "import sys; from coordinator.cli import main; sys.exit(main())"]
    with present("r1", folder, "tiny", signals=True):
        watching = subprocess.Popen(
            [*script, "watch", "r1", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert watching.stdout is not None
            assert watching.stderr is not None
            if "--quiet" not in options:  # then it has nothing to say
                assert watching.stdout.readline()
            watching.stdout.close()
            assert watching.wait(30) == 141
            assert watching.stderr.read() == ""
        finally:
            watching.kill()
            watching.communicate()
