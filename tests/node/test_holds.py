"""What is held of a run: the newest state, whole or not at all, for a while."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from node import holds as module
from node.copies import RECORD_SUFFIX, StateCopy, write_record
from node.errors import UserError
from node.files import sha256_of
from node.holds import Holds
from node.home import hold_leftovers, holds, new_job_folder
from node.info import StoredFile

RUN = "20260101-120000-abcd"
BEN, CARLA = "be" * 8, "ca" * 8
"""Ids of homes."""


def write_copy(folder: Path, step: int, content: str = "", *, written: float | None = None, size: int = 0) -> StateCopy:
    """A copy as a worker leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind in ("weights", "optimizer"):
        path = folder / f"{step:07d}.{kind}.safetensors"
        path.write_text(f"{kind} of step {step} {content}".ljust(size))
        files.append(StoredFile(path.name, sha256_of(path), path.stat().st_size))
    told = tuple(f"step {number}".encode() for number in range(1, step + 1))
    copy = StateCopy(step, files[0], files[1], time.time() if written is None else written, told)
    write_record(folder / f"{step:07d}{RECORD_SUFFIX}", copy)
    return copy


def content(held: Holds, run: str = RUN, owner: str = "") -> list[str]:
    """What is in the two files that are held."""
    copy = held.find(run, owner)
    assert copy is not None
    paths = [held.path(run, file.name, owner) for file in copy.files]
    assert [sha256_of(path) for path in paths] == [file.sha256 for file in copy.files]
    return [path.read_text().strip() for path in paths]


def test_the_newest_copy_is_held_and_found_again(tmp_path: Path) -> None:
    held = Holds(tmp_path / "held")
    assert held.find(RUN) is None
    assert held.take(RUN, tmp_path / "nothing") is None
    write_copy(tmp_path / "job", 3)
    newest = write_copy(tmp_path / "job", 4)
    (tmp_path / "job" / f"0000009{RECORD_SUFFIX}").write_text('{"step": 9')
    taken = held.take(RUN, tmp_path / "job")
    assert taken == Holds(tmp_path / "held").find(RUN)
    assert taken is not None
    assert (taken.step, taken.steps, taken.written) == (4, newest.steps, newest.written)
    assert content(held) == ["weights of step 4", "optimizer of step 4"]
    held.drop(RUN)
    held.drop(RUN)
    assert held.find(RUN) is None
    assert [path.name for path in (tmp_path / "held").iterdir()] == [".lock"]


def test_only_a_state_as_new_takes_the_place_of_another(tmp_path: Path) -> None:
    held = Holds(tmp_path / "held")
    for step, text in ((5, "first"), (4, "older"), (5, "again"), (7, "newer")):
        write_copy(tmp_path / text, step, text)
    for text, expected in (("first", "first"), ("older", "first"), ("again", "again"), ("newer", "newer")):
        held.take(RUN, tmp_path / text)
        assert content(held)[0].endswith(expected)
        assert len(list((tmp_path / "held" / RUN).iterdir())) == 3, "nothing is left of the state before"
    write_copy(tmp_path / "late", 8)
    taken = held.take(RUN, tmp_path / "late", newer_than=8)
    assert taken is not None
    assert taken.step == 7, "there is a checkpoint of step 8"


def hold_at(folder: Path, ages: dict[str, float], *, size: int = 0, **limits: Any) -> list[str]:
    """Hold a state of each of these runs, so many seconds old; who is left, in order of name."""
    held = Holds(folder / "held", **limits)
    for run, age in ages.items():
        write_copy(folder / run, 1, written=time.time() - age, size=size)
        held.take(run, folder / run)
    return sorted(path.name for path in (folder / "held").iterdir() if path.is_dir())


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    assert hold_at(tmp_path, {"old": 100.0, "new": 10.0}, kept_seconds=50.0) == ["new"]
    held = Holds(tmp_path / "held", kept_seconds=5.0)
    held.expire()
    assert held.find("new") is None
    Holds(tmp_path / "never made").expire()
    assert not (tmp_path / "never made").exists()


def test_of_too_many_the_oldest_go_first(tmp_path: Path) -> None:
    assert hold_at(tmp_path, {"b": 20.0, "a": 30.0, "c": 10.0}, most_holds=2) == ["b", "c"]


def test_of_too_much_the_oldest_go_first_and_the_newest_stays_whatever_its_size(tmp_path: Path) -> None:
    ages = {"a": 30.0, "b": 20.0, "c": 10.0}
    assert hold_at(tmp_path / "two", ages, size=500, most_bytes=2500) == ["b", "c"]
    assert hold_at(tmp_path / "none", ages, size=500, most_bytes=1) == ["c"]
    # The one just taken stays, though its copy may be older than what is held of other runs.
    assert hold_at(tmp_path / "late", {"b": 1.0, "a": 30.0}, size=500, most_bytes=1) == ["a"]


def test_what_is_held_of_a_run_is_its_owners_alone(tmp_path: Path) -> None:
    held = Holds(tmp_path / "held")
    for step, owner in ((5, BEN), (7, CARLA)):
        write_copy(tmp_path / str(step), step, owner)
        held.take(RUN, tmp_path / str(step), owner=owner)
    assert held.find(RUN) is None, "what has no owner is our own"
    write_copy(tmp_path / "9", 9, "own")
    held.take(RUN, tmp_path / "9")
    held.expire()
    for owner, text in (("", "9 own"), (BEN, f"5 {BEN}"), (CARLA, f"7 {CARLA}")):
        assert content(Holds(tmp_path / "held"), owner=owner)[0] == f"weights of step {text}"
    newest = held.find(RUN)
    assert newest is not None
    with pytest.raises(UserError, match="nothing of that name is held"):
        held.path(RUN, newest.weights.name, BEN)
    held.drop(RUN, CARLA)
    held.drop(RUN)
    assert held.find(RUN) is held.find(RUN, CARLA) is None
    assert content(held, owner=BEN)[0] == f"weights of step 5 {BEN}"
    for owner in ("..", "../x", "ben", BEN.upper(), f"{BEN}\n", f"/{BEN}"):
        with pytest.raises(UserError, match="no id of a home"):
            held.find(RUN, owner)
        with pytest.raises(UserError, match="no id of a home"):
            held.drop(RUN, owner)


@pytest.mark.parametrize(
    "run", ["", ".", "..", "../other", "a/b", ".lock", "a" * 65, "a b", "a\0", "ä", f"a.{'b' * 16}"]
)
def test_a_runs_id_leads_nowhere_else(tmp_path: Path, run: str) -> None:
    held = Holds(tmp_path / "held")
    write_copy(tmp_path / "job", 1)
    for call in (held.find, held.drop, lambda run: held.take(run, tmp_path / "job"), lambda run: held.path(run, "x")):
        with pytest.raises(UserError, match="no id of a run"):
            call(run)
    assert not (tmp_path / "held").exists()


def test_only_the_two_files_are_given(tmp_path: Path) -> None:
    held = Holds(tmp_path / "held")
    write_copy(tmp_path / "job", 1)
    held.take(RUN, tmp_path / "job")
    (tmp_path / "held" / "secret").write_text("")
    for name in ("state.json", "../secret", "", "."):
        with pytest.raises(UserError, match="nothing of that name is held"):
            held.path(RUN, name)


class Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]) -> Callable[[], int]:
    """Raise at the so-many-th call that changes the disk; gives the calls so far."""
    count = 0

    def wrap(call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise error(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*arguments, **options)

        return counted

    for where, name in (
        (module, "link_or_copy"), (module, "sync_folder"), (module, "write_record"), (Path, "unlink"), (os, "link"),
        (Path, "replace"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, wrap(getattr(where, name)))
    return lambda: count


@pytest.mark.parametrize("error", [Crash, OSError])
def test_wherever_it_is_cut_off_one_of_the_two_states_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    number = outcomes = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        held = Holds(folder / "held")
        write_copy(folder / "first", 5, "first")
        write_copy(folder / "second", 5, "second")
        held.take(RUN, folder / "first")
        with monkeypatch.context() as patch:
            calls = crash_at(patch, number, error)
            with contextlib.suppress(error):
                held.take(RUN, folder / "second")
            if calls() < number:
                break
        found = {text.rsplit(" ", 1)[1] for text in content(held)}
        assert found in ({"first"}, {"second"})
        outcomes |= 1 if found == {"first"} else 2
        assert content(Holds(folder / "held")) == content(held)
        held.take(RUN, folder / "second")
        assert content(held)[0].endswith("second")
        assert len(list((folder / "held" / RUN).iterdir())) == 3
    assert number > 8
    assert outcomes == 3


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_behind_is_held(tandem_home: Path) -> None:
    jobs = tandem_home / "jobs"
    dead, alive = jobs / f"{RUN}-pid{dead_pid()}-ab12", jobs / f"20260101-130000-abcd-pid{os.getpid()}-cd34"
    write_copy(dead, 3)
    write_copy(dead, 4)
    (dead / "worker.log").write_text("last words")
    write_copy(alive, 9)
    write_copy(jobs / f"{RUN}.{BEN}-pid{dead_pid()}-ab12", 6)
    write_copy(jobs / f"task-pid{dead_pid()}-ab12", 1)
    new_job_folder("another")
    assert content(holds())[0] == "weights of step 4"
    assert content(holds(), owner=BEN)[0] == "weights of step 6"
    assert [path.name for path in dead.iterdir()] == ["worker.log"]
    assert len(list(alive.iterdir())) == 3
    assert holds().find("20260101-130000-abcd") is None
    # Where it is known that nobody works for that run, whatever lives under that number now.
    hold_leftovers("20260101-130000-abcd")
    assert content(holds(), "20260101-130000-abcd")[0] == "weights of step 9"


def test_a_full_disk_leaves_what_a_killed_process_left_behind(
    tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tandem_home / "jobs" / f"{RUN}-pid{dead_pid()}-ab12"
    write_copy(folder, 4)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_record", full)
        new_job_folder("another")
        assert holds().find(RUN) is None
        assert len(list(folder.iterdir())) == 3
        os.utime(folder, (0, 0))  # but not for ever
        new_job_folder("another")
        assert not folder.exists()
