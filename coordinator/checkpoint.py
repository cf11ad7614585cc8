"""Checkpoints: the adapter in ``mlx_lm``'s own form, and beside it what exact resume needs.

A checkpoint is a folder ``checkpoints/0000100`` that appears in one step. It holds the optimizer's state, the weights
and ``checkpoint.json`` with their checksums.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.runfolder import RunFolder
from node.errors import TandemError, UserError
from node.events import Copied
from node.files import link_or_copy, replacing, sha256_of, sync_file, sync_folder, write_text_atomically
from node.spec import FileRef
from node.tensors import check_numbers

VERSION = 1
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
DESCRIPTION = "checkpoint.json"


@dataclass(frozen=True)
class Progress:
    """What the coordinator itself must remember.

    Attributes:
        step, iteration: done so far.
        best_loss, best_step: of the validations; None before the first.
        stale_validations: validations since the best.
        validated_step: the last step that was validated, -1 for none.
        data_digest: of the training data; resuming with other data is refused.
        seconds: spent training, over all sittings.
    """

    step: int
    iteration: int
    best_loss: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    validated_step: int = -1
    data_digest: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, as its description says."""

    folder: Path
    progress: Progress
    weights: FileRef
    optimizer: FileRef
    scheduled: bool = True

    def intact(self) -> bool:
        """Whether both files are what their checksums say."""
        return all(
            (self.folder / ref.name).is_file()
            and (self.folder / ref.name).stat().st_size == ref.size
            and sha256_of(self.folder / ref.name) == ref.sha256
            for ref in (self.weights, self.optimizer)
        )

    def flaw(self) -> str:
        """What in its files cannot be trained on, though they are as they were written; "" where nothing is."""
        try:
            for ref in (self.weights, self.optimizer):
                check_numbers(self.folder / ref.name)
        except UserError as error:
            return str(error)
        return ""


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file; the target is replaced in one step."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's.
        keep_last: keep so many, and the best; None keeps all that were scheduled.
    """

    def __init__(self, folder: RunFolder, keep_last: int | None) -> None:
        self._folder = folder
        self._keep_last = keep_last

    def place(self, progress: Progress) -> Path:
        """Where the checkpoint of this progress is, or would be."""
        return self._folder.checkpoints / f"{progress.iteration:07d}"

    def save(self, copied: Copied, copies: Path, progress: Progress, *, scheduled: bool) -> Checkpoint:
        """Adopt a worker's copy.

        Args:
            copied: what the worker wrote.
            copies: the folder it wrote to.
            progress: the coordinator's part.
            scheduled: False for checkpoints that exist only because they are the best, or because of Ctrl-C.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        target = self.place(progress)
        name = target.name
        partial = self._folder.checkpoints / f".{name}.partial"
        replaced = self._folder.checkpoints / f".{name}.old"
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = dataclasses.replace(copied.weights, name=WEIGHTS)
        optimizer = dataclasses.replace(copied.optimizer, name=OPTIMIZER)
        description = {
            "version": VERSION,
            "progress": dataclasses.asdict(progress),
            "weights": dataclasses.asdict(weights),
            "optimizer": dataclasses.asdict(optimizer),
            "scheduled": scheduled,
        }
        try:
            link_or_copy(copies / copied.weights.name, partial / WEIGHTS)
            link_or_copy(copies / copied.optimizer.name, partial / OPTIMIZER)
            write_text_atomically(partial / DESCRIPTION, json.dumps(description, indent=1) + "\n")
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # half of it only takes room on a disk that has none
            raise
        sync_folder(partial)
        # A power loss must not leave a checkpoint whose steps are missing in the metrics.
        sync_file(self._folder.metrics)
        if target.exists():
            target.rename(replaced)
            partial.rename(target)
            shutil.rmtree(replaced)
        else:
            partial.rename(target)
        sync_folder(self._folder.checkpoints)
        # Copies, not further names of our file: other programs write to theirs in place.
        copy_whole(target / WEIGHTS, self._folder.path / f"{name}_adapters.safetensors")
        self.publish(target)
        for ref in (copied.weights, copied.optimizer):
            (copies / ref.name).unlink(missing_ok=True)
        return Checkpoint(target, progress, weights, optimizer, scheduled)

    def publish(self, checkpoint: Path) -> None:
        """Make a checkpoint's weights the run's ``adapters.safetensors``."""
        copy_whole(checkpoint / WEIGHTS, self._folder.path / "adapters.safetensors")

    def newest_first(self) -> Iterator[Checkpoint]:
        """All checkpoints with a readable description."""
        for path in sorted(self._folder.checkpoints.glob("[0-9]*"), reverse=True):
            checkpoint = _read(path)
            if checkpoint is not None:
                yield checkpoint

    def newest_intact(self, note_damage: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose files match their checksums; each damaged one is reported."""
        for path in sorted(self._folder.checkpoints.glob("[0-9]*"), reverse=True):
            checkpoint = _read(path)
            if checkpoint is None or not checkpoint.intact():
                damage = "its files do not match their checksums"
            elif not (damage := checkpoint.flaw()):
                return checkpoint
            note_damage(f"checkpoint {path.name} is damaged: {damage}; trying the one before")
        return None

    def sweep(self) -> None:
        """Remove what saving and pruning left half done when they were cut off."""
        for leftover in self._folder.checkpoints.glob(".*"):
            shutil.rmtree(leftover)

    def prune(self, best_step: int | None) -> list[str]:
        """Remove checkpoints that need not be kept.

        Returns:
            The names of those removed.
        """
        removed = []
        for age, checkpoint in enumerate(self.newest_first()):
            best = best_step is not None and checkpoint.progress.step == best_step
            kept = checkpoint.scheduled if self._keep_last is None else age < self._keep_last
            if kept or best or age == 0:
                continue
            name = checkpoint.folder.name
            aside = checkpoint.folder.with_name(f".{name}.old")
            checkpoint.folder.rename(aside)
            shutil.rmtree(aside)
            (self._folder.path / f"{name}_adapters.safetensors").unlink(missing_ok=True)
            removed.append(name)
        return removed


def _read(path: Path) -> Checkpoint | None:
    try:
        content = json.loads((path / DESCRIPTION).read_text())
        return Checkpoint(
            path,
            Progress(**content["progress"]),
            FileRef(**content["weights"]),
            FileRef(**content["optimizer"]),
            bool(content["scheduled"]),
        )
    except (TandemError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
