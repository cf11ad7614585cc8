"""What is known of runs, and which one a person means."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from coordinator.config import TrainConfig
from coordinator.running import index
from coordinator.running.background import _record
from coordinator.running.known import known_runs, resolve
from coordinator.running.presence import find, present
from coordinator.running.removal import remove
from coordinator.stream import FAILED, RunFinished
from coordinator.view.runs import as_data, details, table, when
from node.clikit import run_cli
from node.errors import Interrupted, TandemError, TooFewNodes, UserError
from tests.coordinator.running.made import make_run, write


def coordinator(*words: str | Path) -> int:
    from coordinator.cli import coordinator as group

    return run_cli(group, [*map(str, words)], prog_name="coordinator")


def test_a_run_that_is_done(tmp_path: Path) -> None:
    folder = make_run("20260101-aaaa", tmp_path / "adapters", [3.0, 2.0])
    (run,) = known_runs()[0]
    assert (run.run, run.state, run.place, run.missing) == ("20260101-aaaa", "done", folder, "")
    assert (run.figures.steps, run.figures.final_loss, run.total_steps) == (2, 2.0, 2)
    (heading, line) = table([run], 0.0)
    columns = [column.strip() for column in heading.split("  ") if column.strip()]
    assert columns == ["run", "state", "steps", "training loss", "validation", "began", "model", "folder"]
    assert line.split()[:4] == ["20260101-aaaa", "done", "2/2", "2.000"]
    assert line.endswith(str(folder))
    data = as_data(run)
    assert (data["state"], data["files"], data["final_loss"]) == ("done", str(folder), 2.0)


def test_a_run_that_was_killed_is_told_by_its_files(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0, 2.0, 1.0], status="running")
    (run,) = known_runs()[0]
    assert run.state == "broken_off"
    assert (run.figures.steps, run.figures.final_loss, run.figures.final_val_loss) == (3, 1.5, 1.1)
    shown = [line.split(None, 2) for line in details(run, 0.0)]
    assert ["go", "on", f"coordinator train --resume --adapter-path {folder}"] in shown


def test_a_run_at_work_and_one_that_prepares(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0], status="running")
    with present("r1", folder, "tiny", signals=True), present("r2", tmp_path / "new", "other", signals=True):
        index.record("r1", pid=os.getpid())
        first, second = known_runs()[0]
        assert (first.run, first.state, second.run, second.state) == ("r1", "running", "r2", "preparing")
        assert (second.folder, second.model, second.missing) == (tmp_path / "new", "other", "nothing was written yet")
        assert resolve("last").run == "r2"
        with pytest.raises(UserError, match=r"run r1 is at work \(process \d+\); first coordinator stop r1"):
            remove(first, files=True)
    assert [run.state for run in known_runs()[0]] == ["broken_off"]


def test_the_last_run_is_the_one_that_was_begun_or_resumed_last(tmp_path: Path) -> None:
    for run, began in (("b", 1.0e9), ("a", 1.2e9), ("c", 1.4e9)):
        make_run(run, tmp_path / run, [3.0])
        index.record(run, began=began)
    assert [run.run for run in known_runs()[0]] == ["b", "a", "c"]
    index.record("b", resumed=1.3e9)
    assert [run.run for run in known_runs()[0]] == ["a", "b", "c"]
    shown = [line.split(None, 1) for line in details(resolve("b"), 0.0)]
    assert ["resumed", when(1.3e9, 0.0)] in shown
    index.record("b", resumed=1.5e9)
    assert resolve("last").run == "b"
    assert not [line for line in details(resolve("c"), 0.0) if "resumed" in line]
    for run in "bc":
        index.record(run, began=1e9, resumed=None)
    with present("b", tmp_path / "b", "tiny", signals=True):
        assert resolve("last").run == "b", "it is about to be resumed"
    assert resolve("last").run == "a"


def test_files_that_were_moved_or_deleted_are_looked_for_and_said_so(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0])
    make_run("r2", folder, [2.0])
    older, newer = known_runs()[0]
    assert (older.place, newer.place) == (folder / "previous" / "r1", folder)
    shutil.rmtree(folder / "previous")
    older, newer = known_runs()[0]
    assert (older.place, older.missing) == (None, f"{folder} no longer holds its files")
    folder.rename(tmp_path / "elsewhere")
    older, newer = known_runs()[0]
    assert newer.missing == f"{folder} was deleted or moved"
    assert table([newer], 0.0)[1].endswith(f"{folder} ({newer.missing})")
    moved = resolve(str(tmp_path / "elsewhere"))
    assert (moved.run, moved.state, moved.indexed) == ("r2", "done", False)


@pytest.mark.parametrize(("name", "trouble"), [("x" * 300, "File name too long"), ("ring", "Too many levels")])
def test_a_folder_that_cannot_be_looked_at_is_told_of_its_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, trouble: str
) -> None:
    # As one that may not be entered, which for root there is not.
    (tmp_path / "ring").symlink_to("ring")
    folder = tmp_path / name / "adapters"
    index.record("r1", folder=str(folder), model="tiny", data="data", status="done")
    make_run("r2", tmp_path / "good", [3.0])
    closed, good = sorted(known_runs()[0], key=lambda run: run.run)
    assert (closed.place, closed.unreadable, good.place, good.unreadable) == (None, True, tmp_path / "good", False)
    assert closed.missing.startswith(f"{folder} cannot be read: {trouble}")
    assert coordinator("runs", "show", "r1") == 0
    assert coordinator("runs", "show", "r2") == 0
    assert coordinator("runs") == 0
    assert [closed.missing in line for line in capsys.readouterr().out.splitlines()[-3:]] == [False, False, True]
    assert coordinator("status") == 0
    assert coordinator("watch", "r2") == 0
    assert coordinator("watch", "r1") == 2
    assert coordinator("stop", "r1") == 2
    assert "is not at work: done" in capsys.readouterr().err
    (tmp_path / "ring").unlink()
    with present("r1", folder, "tiny", signals=False):
        (tmp_path / "ring").symlink_to("ring")
        assert [run.run for run in known_runs()[0] if run.holder is not None] == ["r1"]
        assert coordinator("status") == 0
        assert coordinator("stop", "r1") == 2
    assert "belongs to a program of yours" in capsys.readouterr().err
    assert coordinator("runs", "rm", "r1", "--files") == 2
    assert f"run r1: {closed.missing}; see that you may read it, or leave --files out" in capsys.readouterr().err
    assert coordinator("runs", "rm", "r1") == 0
    assert [run.run for run in known_runs()[0]] == ["r2"]


def test_which_run_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run yet"):
        resolve("last")
    first = make_run("20260101-aaaa", tmp_path / "one", [3.0])
    make_run("20260102-bbbb", tmp_path / "two", [3.0])
    make_run("20260103-cccc", first, [3.0])
    assert resolve("last").run == "20260103-cccc"
    assert resolve("20260102-bbbb").run == "20260102-bbbb"
    assert resolve("20260102").run == "20260102-bbbb"
    assert resolve("two").run == "20260102-bbbb"
    assert resolve("one").run == "20260103-cccc", "whose files are there"
    assert resolve("one/previous/20260101-aaaa").run == "20260101-aaaa"
    with pytest.raises(UserError, match="may be 20260101-aaaa, 20260102-bbbb, 20260103-cccc; write more of the id"):
        resolve("202601")
    (tmp_path / "ring").symlink_to("ring")
    for nothing in ("three", "", "../one/../nowhere", "ring", "~nobody-of-this-name/adapters", "x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no such run, and no folder of one; coordinator runs lists them"):
            resolve(nothing)
    shutil.rmtree(tmp_path / "two")
    assert resolve("two").run == "20260102-bbbb", "by the folder that it had"


def test_rm_forgets_and_leaves_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0])
    assert coordinator("runs", "rm", "r1") == 0
    assert capsys.readouterr().out == f"forgot r1; its files stay in {folder}\n"
    assert known_runs() == ([], ())
    assert (folder / "adapters.safetensors").exists()


def test_rm_with_files_takes_what_is_the_runs_and_nothing_else(tmp_path: Path) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0])
    make_run("r2", folder, [2.0])
    (folder / "notes.txt").write_text("mine")
    (folder / "0000010_adapters.safetensors").write_text("weights")
    (folder / "checkpoints" / "0000010").mkdir(parents=True)
    assert coordinator("runs", "rm", "r2", "--files", "--yes") == 0
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "previous"}
    assert coordinator("runs", "rm", folder / "previous" / "r1", "--files", "--yes") == 0
    assert {path.name for path in folder.iterdir()} == {"notes.txt"}
    make_run("r3", tmp_path / "alone", [2.0])
    assert coordinator("runs", "rm", "r3", "--files", "--yes") == 0
    assert not (tmp_path / "alone").exists()


def test_rm_asks_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0])
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _="": "n")
    assert coordinator("runs", "rm", "r1", "--files") == 130
    assert (folder / "adapters.safetensors").exists()
    assert [run.run for run in known_runs()[0]] == ["r1"]


def test_rm_leaves_a_run_alone_that_began_to_work_while_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0])
    with contextlib.ExitStack() as stack:

        def answer(_: str = "") -> str:
            stack.enter_context(present("r1", folder, "tiny", signals=True))
            return "y"

        monkeypatch.setattr("click.termui.visible_prompt_func", answer)
        assert coordinator("runs", "rm", "r1", "--files") == 2
        assert "run r1 is at work (process" in capsys.readouterr().err
        assert (folder / "adapters.safetensors").exists()
        holder = find("r1")
        assert holder is not None
        index.entry_path("r1").write_text("{")
        assert coordinator("runs", "rm", "r1") == 2, "nor is it forgotten by an entry that is damaged"
        assert find("r1") == holder
    assert coordinator("runs", "rm", "r1") == 0


def test_rm_deletes_nothing_of_a_run_that_took_the_folder_while_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("r1", tmp_path / "adapters", [3.0])

    def answer(_: str = "") -> str:
        make_run("r2", folder, [2.0])
        return "y"

    monkeypatch.setattr("click.termui.visible_prompt_func", answer)
    assert coordinator("runs", "rm", "r1", "--files") == 2
    assert f"the files of run r1 have left {folder}" in capsys.readouterr().err
    assert [run.place for run in known_runs()[0]] == [folder / "previous" / "r1", folder]


def test_a_damaged_entry_is_said_and_can_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("r1", tmp_path / "adapters", [3.0])
    index.entry_path("r2").write_text("{")
    assert coordinator("runs") == 0
    said = capsys.readouterr()
    assert "r1" in said.out
    assert said.err == (f"{index.entry_path('r2')} cannot be read and is left out; coordinator runs rm r2 removes it\n")
    assert coordinator("runs", "show", "r2") == 2
    assert coordinator("runs", "rm", "r2") == 0
    assert known_runs()[1] == ()


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (TandemError("no room"), "failed"),
        (UserError("no room"), "failed"),
        (TooFewNodes("no room"), "failed"),
        (Interrupted("no room"), "stopped"),
    ],
)
def test_watch_ends_as_the_run_did_also_where_that_wrote_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: TandemError, state: str
) -> None:
    _record(TrainConfig(model="tiny", adapter_path=str(tmp_path / "adapters")), "r1", str(error), error)
    assert coordinator("watch", "r1") == error.exit_code
    assert f"run r1 ({state}): no room\n" in capsys.readouterr().err
    make_run("r2", tmp_path / "adapters", [3.0], status="failed")
    write(tmp_path / "adapters", [RunFinished("failed", ((FAILED, "no room"),), (), error.exit_code)])
    assert coordinator("watch", "r2") == error.exit_code, "and as one that failed later"


def test_the_commands_refuse_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("r1", tmp_path / "adapters", [3.0])
    shutil.rmtree(tmp_path / "adapters")
    for words, line in (
        (("watch", "r1"), f"error: run r1 (done): {tmp_path / 'adapters'} was deleted or moved"),
        (("stop", "r1"), "error: run r1 is not at work: done; coordinator status shows what is"),
        (("stop", "r2"), "error: r2: no such run, and no folder of one; coordinator runs lists them"),
        (("runs", "compare", "r1"), "error: give two runs or more to compare; coordinator runs lists them"),
        (("runs", "--json", "show", "r1"), "error: --json stands behind the command: coordinator runs show --json"),
    ):
        assert coordinator(*words) == 2
        assert capsys.readouterr().err == f"{line}\n"
