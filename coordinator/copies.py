"""States of the run on this machine's disk: periodic copies, copies fetched from others, and the newest checkpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.checkpoint import Checkpoint
from coordinator.crew import Crew
from node.copies import StateCopy
from node.events import Copied
from node.files import make_private_folder
from node.spec import FileRef, Restore
from node.supervisor import WorkerLink

FETCHED = "fetched"
# Under these names a worker finds the state that it is given.
GIVEN = ("given.weights.safetensors", "given.optimizer.safetensors")
KEPT = 2
# A periodic copy on another machine is fetched when it is no larger than this; of larger states there are checkpoints.
MOST_FETCHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Copy:
    """The state after a step.

    Attributes:
        step: its number.
        folder: of the files.
        weights, optimizer: the files.
    """

    step: int
    folder: Path
    weights: FileRef
    optimizer: FileRef

    @property
    def paths(self) -> tuple[Path, Path]:
        """Of the files."""
        return self.folder / self.weights.name, self.folder / self.optimizer.name


@dataclass(frozen=True)
class Kept:
    """A state that a node keeps of a worker which is no more.

    Attributes:
        machine: id of the node.
        holder: what people call it.
        copy: which state it is.
        fetch: puts its files, verified, into a folder.
    """

    machine: str
    holder: str
    copy: StateCopy
    fetch: Callable[[Path], Awaitable[None]]


class Copies:
    """Where the newest state is.

    Args:
        folder: where the workers of this machine put their copies; fetched ones go into a folder in it.
        checkpoint: that the run begins from, or None.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint | None) -> None:
        self.folder = folder
        self._kept: list[Copy] = []
        self._checkpoint: Copy | None = None
        if checkpoint is not None:
            self.saved(checkpoint)

    def saved(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was written."""
        self._checkpoint = Copy(checkpoint.progress.step, checkpoint.folder, checkpoint.weights, checkpoint.optimizer)

    def here(self, copied: Copied) -> Copy:
        """A worker of this machine has made a copy, which is used where it is."""
        return self._keep(Copy(copied.step, self.folder, copied.weights, copied.optimizer))

    async def fetch(self, link: WorkerLink, copied: Copied) -> Copy:
        """Get a copy from the machine of the worker that made it.

        Raises:
            TandemError: it did not come.
            OSError: it cannot be written.
        """
        folder = self.folder / FETCHED
        make_private_folder(folder)
        for ref in (copied.weights, copied.optimizer):
            await link.fetch(ref, folder / ref.name)
        return self._keep(Copy(copied.step, folder, copied.weights, copied.optimizer))

    async def take(self, kept: Kept) -> Copy:
        """Get a state that a node keeps.

        Raises:
            As ``fetch``.
        """
        folder = self.folder / FETCHED
        await kept.fetch(folder)
        weights, optimizer = (FileRef(file.name, file.sha256, file.size) for file in kept.copy.files)
        return self._keep(Copy(kept.copy.step, folder, weights, optimizer))

    def newest(self, most: int) -> Copy | None:
        """The newest state of no later step than this whose files are there."""
        found = [*self._kept, *([self._checkpoint] if self._checkpoint is not None else [])]
        usable = [copy for copy in found if copy.step <= most and all(path.exists() for path in copy.paths)]
        return max(usable, key=lambda copy: copy.step, default=None)

    async def give(self, crew: Crew, index: int, copy: Copy) -> Restore:
        """Put a state's files into a member's folder; the request that takes them.

        Raises:
            MemberFailed: its machine is gone; OSError: a file cannot be read.
        """
        refs = []
        for name, ref, path in zip(GIVEN, (copy.weights, copy.optimizer), copy.paths, strict=True):
            given = FileRef(name, ref.sha256, ref.size)
            await crew.give(index, given, path)
            refs.append(given)
        return Restore(copy.step, refs[0], refs[1])

    def _keep(self, copy: Copy) -> Copy:
        self._kept = [*(other for other in self._kept if other.step != copy.step), copy]
        for old in self._kept[:-KEPT]:
            if old.folder != self.folder:  # a worker of this machine removes its own
                for path in old.paths:
                    path.unlink(missing_ok=True)
        self._kept = self._kept[-KEPT:]
        return copy


def worth_fetching(copied: Copied) -> bool:
    """Whether a periodic copy of another machine is small enough to be moved for the day when that one is lost."""
    return copied.weights.size + copied.optimizer.size <= MOST_FETCHED_BYTES
