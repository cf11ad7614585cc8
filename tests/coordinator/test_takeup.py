"""Where a resumed run goes on from: what belongs to a state is derived from what the run has written."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coordinator import checkpoint as checkpoint_module
from coordinator.books import Books
from coordinator.checkpoint import Checkpoint, Checkpoints, Progress
from coordinator.config import TrainConfig
from coordinator.program import Action, Program
from coordinator.runfolder import RunFolder, read_json_lines
from coordinator.running import index
from coordinator.running.known import resolve
from coordinator.stream import Broadcast, Noted
from coordinator.takeup import Entry, History, TakenUp, take_up, told_by
from node import wire
from node.copies import RECORD_SUFFIX, StateCopy, write_record
from node.errors import TandemError
from node.events import Copied, Heartbeat, StepDone
from node.files import sha256_of
from node.home import holds
from node.info import StoredFile
from node.spec import FileRef
from tests.fixtures.tensors import saying

RUN = "20260101-120000-abcd"
PROGRAM = Program(
    total_iters=39, accumulation=2, save_every=10, steps_per_eval=8, steps_per_report=10, validates=True
)  # 20 steps; validations after 4, 8, 12, 16, 20, checkpoints after 5, 10, 15, 20


def done(step: int, loss: float = 2.0, grad_norm: float = 1.0) -> StepDone:
    return StepDone(step, 10 * loss, 10, 1e-3, grad_norm, 0.5, 0.4, 0.1, 1000, 64)


def step_entry(step: int, **values: Any) -> Entry:
    return {"step": step, "iter": PROGRAM.last_iter(step), "loss": 2.0, "tokens": 10, "seconds": 0.5, **values}


def validation(step: int, loss: float) -> Entry:
    return {"step": step, "val_loss": loss, "val_tokens": 5, "seconds": 2.0}


def history(
    entries: Sequence[Entry], before: Progress | None = None, then: Program = PROGRAM, now: Program = PROGRAM
) -> History:
    return History(before or Progress(0, 0, data_digest="d"), entries, then, now)


def steps(first: int, last: int, **values: Any) -> list[Entry]:
    return [step_entry(number, **values) for number in range(first, last + 1)]


def told(*numbers: int, **values: Any) -> dict[int, StepDone]:
    return {number: done(number, **values) for number in numbers}


def test_what_the_coordinator_would_remember() -> None:
    entries = [
        validation(0, 1.0), *steps(1, 4), validation(4, 3.0), *steps(5, 8), validation(8, 2.5), *steps(9, 12),
        validation(12, 2.6), *steps(13, 14),
    ]  # fmt: skip
    found = history(entries).progress(13)
    # The loss before any update is no result, however good.
    assert found == Progress(
        13, 26, best_loss=2.5, best_step=8, stale_validations=1, validated_step=12, data_digest="d",
        seconds=13 * 0.5 + 4 * 2.0,
    )  # fmt: skip
    assert list(PROGRAM.actions(13, found.validated_step))[:3] == [
        Action("train", 14), Action("train", 15), Action("checkpoint", 15)
    ]  # fmt: skip


def test_what_a_checkpoint_remembers_is_not_entered_twice() -> None:
    entries = [*steps(1, 8), validation(4, 3.0), validation(8, math.nan), *steps(9, 10)]
    before = Progress(5, 10, best_loss=3.0, best_step=4, validated_step=4, data_digest="d", seconds=100.0)
    assert history(entries, before).progress(10) == dataclasses.replace(
        before, step=10, iteration=20, stale_validations=1, validated_step=8, seconds=100.0 + 5 * 0.5 + 2.0
    )


def test_a_validation_that_was_due_is_done_when_the_run_goes_on() -> None:
    found = history([*steps(1, 8), validation(4, 3.0)]).progress(8)
    assert found.validated_step == 4
    assert next(PROGRAM.actions(8, found.validated_step)) == Action("validate", 8)


def test_steps_that_nobody_recorded_are_put_down_from_what_the_worker_said() -> None:
    found = history([validation(0, 3.0), *steps(1, 17, nodes=2), validation(16, 2.0)])
    entries = found.recovered(20, told(*range(15, 21)))
    assert [entry["step"] for entry in entries] == [18, 19, 20]
    # Of several ranks the others' part is not known.
    assert entries[2] == {
        "step": 20, "iter": 39, "loss": 2.0, "tokens": 10, "learning_rate": 1e-3, "grad_norm": 1.0, "seconds": 0.5
    }  # fmt: skip
    assert found.progress(20, entries).seconds == 2.0 + 20 * 0.5 + 2.0
    (alone,) = history([*steps(1, 17, nodes=1)]).recovered(18, told(18))
    assert alone == {
        **entries[0], "compute_seconds": 0.4, "wait_seconds": 0.1, "nodes": 1, "peak_memory_bytes": 1000,
        "padded_tokens": 64,
    }  # fmt: skip
    part = {"rows": 8, "positions": 60, "compute_seconds": 0.3, "wait_seconds": 0.0, "peak_memory_bytes": 900}
    (left,) = history([*steps(1, 17, nodes=1, per_node={"ada": part})]).recovered(18, told(18))
    assert left == {
        **alone,
        "per_node": {
            "ada": {
                "rows": 8, "positions": 64, "compute_seconds": 0.4, "wait_seconds": 0.1, "peak_memory_bytes": 1000
            }
        },
    }  # fmt: skip
    assert found.recovered(17, {}) == []


def test_a_checkpoint_that_was_due_meanwhile_is_that_of_the_state() -> None:
    before = Progress(5, 10)
    assert not history([], before).scheduled(9)
    assert history([], before).scheduled(10)
    assert history([], before).scheduled(12)


FOUR = [validation(0, 3.0), *steps(1, 4), validation(4, 2.0)]


@pytest.mark.parametrize(
    ("found", "step", "said", "reason"),
    [
        (history(FOUR), 4, {}, ""),
        (history(FOUR), 3, {}, ""),
        (history(FOUR), 7, told(5, 6, 7), ""),
        (history(FOUR), 7, told(6, 7), "step 5 is recorded nowhere"),
        (history(FOUR, Progress(2, 4)), 4, {}, ""),
        (history(FOUR[5:], Progress(4, 8, validated_step=4)), 6, told(5, 6), ""),
        (history([], Progress(4, 8, validated_step=4)), 6, told(5, 6), ""),
        (history([], Progress(3, 6)), 6, told(5, 6), "step 4 is recorded nowhere"),
        (history(FOUR), 6, told(5, 6, loss=math.nan), "not finite at step 5"),
        (history(FOUR), 6, told(5, 6, grad_norm=math.inf), "not finite at step 5"),
        (history(FOUR[:-1]), 4, {}, ""),
        (history(FOUR[:-1]), 5, told(5), "the validation of step 4 is recorded nowhere"),
        (history(FOUR), 9, told(5, 6, 7, 8, 9), "the validation of step 8 is recorded nowhere"),
        (history(FOUR), 8, told(5, 6, 7, 8), ""),
        (history(FOUR, then=dataclasses.replace(PROGRAM, validates=False)), 9, told(5, 6, 7, 8, 9), ""),
        (history(FOUR, now=dataclasses.replace(PROGRAM, steps_per_eval=2)), 6, told(5, 6), ""),
        (history(FOUR, now=dataclasses.replace(PROGRAM, total_iters=10)), 6, told(5, 6), "--iters 10"),
        (history(steps(1, 20), now=dataclasses.replace(PROGRAM, total_iters=44)), 20, {}, "--iters 44"),
        (history(steps(1, 19), now=dataclasses.replace(PROGRAM, total_iters=44)), 20, told(20), "--iters 44"),
        (history(steps(1, 19), now=dataclasses.replace(PROGRAM, total_iters=44)), 19, {}, ""),
    ],
)  # fmt: skip
def test_what_speaks_against_a_state(found: History, step: int, said: dict[int, StepDone], reason: str) -> None:
    objection = found.objection(step, said)
    assert reason in objection
    assert bool(objection) == bool(reason)


def test_what_a_copy_tells() -> None:
    file = StoredFile("x", "", 0)
    events = [wire.encode_event(done(number), 3) for number in (2, 3, 4)]
    assert told_by(StateCopy(3, file, file, 0.0, tuple(events))) == told(2, 3)
    for wrong in (b"\xff", wire.encode_event(Heartbeat("x", 1, 0), 0)):
        with pytest.raises(wire.WireError):
            told_by(StateCopy(3, file, file, 0.0, (wrong,)))


# --- finding it ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """A run of which something is held here."""

    path: Path
    told: list[Noted] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.path / "adapters")
        self.folder.path.mkdir(parents=True)
        self.checkpoints = Checkpoints(self.folder, None)
        self.saved: Checkpoint | None = None

    def files(self, step: int) -> list[StoredFile]:
        (self.path / "copies").mkdir(exist_ok=True)
        files = []
        for kind in ("weights", "optimizer"):
            path = self.path / "copies" / f"{step:07d}.{kind}.safetensors"
            path.write_text(saying(f"{kind} {step}"))
            files.append(StoredFile(path.name, sha256_of(path), path.stat().st_size))
        return files

    def save(self, step: int) -> None:
        refs = [FileRef(file.name, file.sha256, file.size) for file in self.files(step)]
        progress = Progress(step, PROGRAM.last_iter(step), validated_step=4, data_digest="d")
        self.saved = self.checkpoints.save(
            Copied(step, requested=True, weights=refs[0], optimizer=refs[1]),
            self.path / "copies",
            progress,
            scheduled=True,
        )

    def hold(self, step: int, first: int) -> None:
        weights, optimizer = self.files(step)
        events = tuple(wire.encode_event(done(number), 0) for number in range(first, step + 1))
        copy = StateCopy(step, weights, optimizer, 2e9, events)
        write_record(self.path / "copies" / f"{step:07d}{RECORD_SUFFIX}", copy)
        holds().take(RUN, self.path / "copies")

    def handle(self, event: object) -> None:
        assert isinstance(event, Noted)
        self.told.append(event)

    def close(self) -> None:
        pass

    def take_up(self, entries: Sequence[Entry]) -> TakenUp | None:
        found = history(entries, self.saved.progress if self.saved else None)
        work = self.path / "work"
        return asyncio.run(take_up(RUN, found, self.saved, self.checkpoints, (), work, self))


@pytest.fixture
def found(tmp_path: Path) -> Found:
    return Found(tmp_path)


def test_where_nothing_is_held_the_checkpoint_it_is(found: Found) -> None:
    assert found.take_up(FOUR) is None
    found.save(4)
    found.hold(4, 1)
    assert found.take_up(FOUR) == TakenUp(found.saved)  # type: ignore[arg-type]
    assert not found.told


@pytest.mark.parametrize("saved", [True, False])
def test_a_held_state_becomes_a_checkpoint(found: Found, saved: bool) -> None:
    if saved:
        found.save(4)
    found.hold(6, 4)
    taken = found.take_up(FOUR)
    assert taken is not None
    assert [entry["step"] for entry in taken.entries] == [5, 6]
    assert taken.message.startswith("went on from step 6, which this machine held; ")
    assert taken.message.endswith("the checkpoint was of step 4" if saved else "there was no checkpoint yet")
    assert taken.details == {
        "step": 6, "holder": "this machine", "checkpoint_step": 4 if saved else None, "recovered_steps": 2
    }  # fmt: skip
    taken.store(found.checkpoints)
    newest = found.checkpoints.newest_intact(pytest.fail)
    assert newest == taken.checkpoint
    assert newest.progress.step == 6
    assert newest.scheduled, "the one that was due after step 5"
    assert (newest.folder / newest.weights.name).read_text() == saying("weights 6")
    assert holds().find(RUN) is not None, "until the run is over"
    TakenUp(newest).store(found.checkpoints)  # is there already


def test_the_books_hold_every_step_once(found: Found) -> None:
    found.hold(6, 4)
    found.folder.metrics.write_text("".join(f"{line}\n" for line in map(json.dumps, [*FOUR, step_entry(5)])) + '{"st')
    taken = found.take_up(read_json_lines(found.folder.metrics))
    assert taken is not None
    config = TrainConfig(model="m", iters=39)
    books = Books(config, found.folder, RUN, Broadcast([found]))
    index.record(RUN, folder=str(found.folder.path), began=1e9)
    assert books.take_up(taken.checkpoint.progress.step, taken.entries) == 0
    assert resolve("last").began == 1e9
    assert (resolve("last").since or 0.0) > 1e9, "it is told when the run was resumed"
    written = read_json_lines(found.folder.metrics)
    assert books.history == written
    assert [(entry["step"], "val_loss" in entry) for entry in written] == [
        (0, True), (1, False), (2, False), (3, False), (4, False), (4, True), (5, False), (6, False)
    ]  # fmt: skip


def test_a_held_state_that_is_damaged_is_told_of_and_not_used(found: Found) -> None:
    found.save(4)
    found.hold(6, 4)
    copy = holds().find(RUN)
    assert copy is not None
    path = holds().path(RUN, copy.optimizer.name)
    path.write_bytes(bytes(copy.optimizer.size))
    assert found.take_up(FOUR) == TakenUp(found.saved)  # type: ignore[arg-type]
    (note,) = found.told
    assert note.message == f"this machine holds step 6, which is of no use: {copy.optimizer.name} is damaged"


def test_a_held_state_that_does_not_follow_is_told_of_and_not_used(found: Found) -> None:
    found.hold(9, 7)
    assert found.take_up(FOUR) is None
    (note,) = found.told
    assert "which is of no use: step 5 is recorded nowhere" in note.message


def test_a_full_disk_is_named(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found.hold(6, 4)
    taken = found.take_up(FOUR)
    assert taken is not None
    monkeypatch.setattr(checkpoint_module, "link_or_copy", full)
    with pytest.raises(TandemError, match=r"step 6 cannot be written to .*: No space left on device; make room"):
        taken.store(found.checkpoints)
    assert holds().find(RUN) is not None
