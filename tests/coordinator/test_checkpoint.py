"""Checkpoints: whole or not there, found again, and pruned."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator import checkpoint as module
from coordinator.checkpoint import Checkpoint, Checkpoints, Progress
from coordinator.runfolder import RunFolder
from node.events import Copied
from node.files import sha256_of
from node.spec import FileRef
from tests.fixtures.tensors import saying


class Crash(BaseException):
    """The process ends here: nothing that comes after it happens."""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "adapters")
    run.path.mkdir()
    return run


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    (tmp_path / "copies").mkdir()
    return tmp_path / "copies"


def reference(path: Path) -> FileRef:
    return FileRef(path.name, sha256_of(path), path.stat().st_size)


def copy_of(copies: Path, step: int, content: str = "") -> Copied:
    weights, optimizer = copies / f"{step}.weights.safetensors", copies / f"{step}.optimizer.safetensors"
    weights.write_text(saying(f"weights of step {step} {content}"))
    optimizer.write_text(saying(f"moments of step {step} {content}"))
    return Copied(step, requested=True, weights=reference(weights), optimizer=reference(optimizer))


def save(checkpoints: Checkpoints, copies: Path, step: int, *, scheduled: bool = True, content: str = "") -> Checkpoint:
    return checkpoints.save(copy_of(copies, step, content), copies, Progress(step, 2 * step), scheduled=scheduled)


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def no_damage(message: str) -> None:
    raise AssertionError(message)


def test_a_checkpoint_is_found_again(folder: RunFolder, copies: Path) -> None:
    progress = Progress(5, 10, best_loss=1.5, best_step=4, stale_validations=1, validated_step=4, data_digest="d")
    saved = Checkpoints(folder, None).save(copy_of(copies, 5), copies, progress, scheduled=False)
    found = Checkpoints(folder, None).newest_intact(no_damage)
    assert found == saved
    assert found.progress == progress
    assert found.folder == folder.checkpoints / "0000010"
    assert not found.scheduled
    assert (found.folder / "weights.safetensors").read_text() == saying("weights of step 5 ")
    assert (found.folder / "optimizer.safetensors").read_text() == saying("moments of step 5 ")


def test_weights_stand_where_mlx_lm_looks_and_may_be_overwritten_there(folder: RunFolder, copies: Path) -> None:
    checkpoints = Checkpoints(folder, None)
    save(checkpoints, copies, 1)
    saved = save(checkpoints, copies, 2)
    assert (folder.path / "0000002_adapters.safetensors").read_text() == saying("weights of step 1 ")
    assert (folder.path / "0000004_adapters.safetensors").read_text() == saying("weights of step 2 ")
    for name in ("adapters.safetensors", "0000004_adapters.safetensors"):
        (folder.path / name).write_text("another program writes in place")
    assert saved.intact()
    assert not any(copies.iterdir()), "the worker's copies are not needed twice"


def test_a_disk_without_hard_links(folder: RunFolder, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    saved = save(Checkpoints(folder, None), copies, 1)
    assert saved.intact()
    assert not (folder.path / "adapters.safetensors").samefile(saved.folder / "weights.safetensors")
    assert (folder.path / "adapters.safetensors").read_text() == saying("weights of step 1 ")


CALLS: list[tuple[Any, str]] = [
    (module, "link_or_copy"),
    (module, "write_text_atomically"),
    (module, "sync_folder"),
    (shutil, "rmtree"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (os, "link"),
]


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool) -> Callable[[], int]:
    """End the process at the so-many-th call that changes the disk, before or after it; gives the calls so far."""
    count = 0

    def wrap(call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            mine = count
            if mine == number and not after:
                raise Crash
            result = call(*arguments, **options)
            if mine == number and after:
                raise Crash
            return result

        return counted

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return lambda: count


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("same", [False, True], ids=["a new step", "the same step"])
def test_a_crash_anywhere_in_saving_leaves_the_old_or_the_new(same: bool, after: bool, tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        root = tmp_path / str(number)
        (root / "copies").mkdir(parents=True)
        folder, copies = RunFolder(root / "adapters"), root / "copies"
        folder.path.mkdir()
        save(Checkpoints(folder, None), copies, 1)
        save(Checkpoints(folder, None), copies, 2)
        step = 2 if same else 3
        copied = copy_of(copies, step, "again")
        with pytest.MonkeyPatch.context() as patch:
            calls = crash_at(patch, number, after=after)
            try:
                Checkpoints(folder, None).save(copied, copies, Progress(step, 2 * step), scheduled=True)
            except Crash:
                crashed = True
            else:
                crashed = False
            assert crashed == (number <= calls())
        found = Checkpoints(folder, None).newest_intact(no_damage)
        assert found is not None
        assert found.progress.step in ({1, 2} if same else {2, 3})
        public = (folder.path / "adapters.safetensors").read_text()
        assert public in {saying(f"weights of step {s} {c}") for s in (2, 3) for c in ("", "again")}
        if not crashed:
            assert number > 8, "the calls that were to be counted were not"
            assert found.progress.step == step
            assert public.endswith("again")
            return
        # Whatever was left half done, the next try succeeds and leaves no trace of it.
        copied = copy_of(copies, step, "again")
        Checkpoints(folder, None).save(copied, copies, Progress(step, 2 * step), scheduled=True)
        assert [name for name in names(folder) if name.startswith(".")] == []
        assert (folder.path / "adapters.safetensors").read_text() == saying(f"weights of step {step} again")


def test_a_full_disk_leaves_the_older_checkpoint(
    folder: RunFolder, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(Checkpoints(folder, None), copies, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        save(Checkpoints(folder, None), copies, 2)
    found = Checkpoints(folder, None).newest_intact(no_damage)
    assert found is not None
    assert found.progress.step == 1
    assert (folder.path / "adapters.safetensors").read_text() == saying("weights of step 1 ")


# --- damage -----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.unlink()  # the file may have a second name, whose content is another matter
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights changed": lambda path: _flip(path / "weights.safetensors"),
    "weights cut off": lambda path: os.truncate(path / "weights.safetensors", 3),
    "weights gone": lambda path: (path / "weights.safetensors").unlink(),
    "optimizer changed": lambda path: _flip(path / "optimizer.safetensors"),
    "no description": lambda path: (path / "checkpoint.json").unlink(),
    "description is not JSON": lambda path: (path / "checkpoint.json").write_text("{"),
    "description is a list": lambda path: (path / "checkpoint.json").write_text("[]"),
    "description lacks entries": lambda path: (path / "checkpoint.json").write_text('{"version": 1}'),
    "description of another time": lambda path: (path / "checkpoint.json").write_text(
        json.dumps(json.loads((path / "checkpoint.json").read_text()) | {"progress": {"strange": 1}})
    ),
    "nothing in it": lambda path: list(map(os.unlink, path.iterdir())),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(kind: str, folder: RunFolder, copies: Path) -> None:
    checkpoints = Checkpoints(folder, None)
    for step in (1, 2, 3):
        save(checkpoints, copies, step)
    DAMAGE[kind](folder.checkpoints / "0000006")
    told: list[str] = []
    found = checkpoints.newest_intact(told.append)
    assert found is not None
    assert found.progress.step == 2
    assert len(told) == 1
    assert "0000006 is damaged" in told[0]


def test_no_checkpoint_at_all(folder: RunFolder) -> None:
    assert Checkpoints(folder, None).newest_intact(no_damage) is None
    assert Checkpoints(folder, 1).prune(None) == []


# --- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_last", "best", "kept"),
    [
        (None, None, [1, 3, 5]),
        (None, 2, [1, 2, 3, 5]),
        (1, None, [5]),
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 5, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
    ],
)
def test_what_is_kept(
    keep_last: int | None, best: int | None, kept: list[int], folder: RunFolder, copies: Path
) -> None:
    checkpoints = Checkpoints(folder, keep_last)
    for step in range(1, 6):
        save(checkpoints, copies, step, scheduled=step % 2 == 1)
    removed = checkpoints.prune(best)
    assert names(folder) == [f"{2 * step:07d}" for step in kept]
    assert sorted(removed) == [f"{2 * step:07d}" for step in range(1, 6) if step not in kept]
    numbered = sorted(path.name[:7] for path in folder.path.glob("*_adapters.safetensors"))
    assert numbered == names(folder)
    assert checkpoints.prune(best) == []


def test_the_newest_is_kept_whatever_it_is(folder: RunFolder, copies: Path) -> None:
    checkpoints = Checkpoints(folder, None)
    save(checkpoints, copies, 1)
    save(checkpoints, copies, 2, scheduled=False)
    assert checkpoints.prune(None) == []
    save(checkpoints, copies, 3)
    assert checkpoints.prune(None) == ["0000004"]


def test_publishing_another_checkpoint(folder: RunFolder, copies: Path) -> None:
    checkpoints = Checkpoints(folder, None)
    first = save(checkpoints, copies, 1)
    save(checkpoints, copies, 2)
    checkpoints.publish(first.folder)
    assert (folder.path / "adapters.safetensors").read_text() == saying("weights of step 1 ")
    assert (folder.path / "0000004_adapters.safetensors").read_text() == saying("weights of step 2 ")


def test_what_was_cut_off_is_swept_away(folder: RunFolder, copies: Path) -> None:
    checkpoints = Checkpoints(folder, None)
    save(checkpoints, copies, 1)
    for name in (".0000004.partial", ".0000002.old"):
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "weights.safetensors").write_text("half")
    checkpoints.sweep()
    assert [path.name for path in folder.checkpoints.iterdir()] == ["0000002"]
