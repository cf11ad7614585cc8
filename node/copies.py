"""Copies of a run's trainable state on disk: two files of arrays, and a record that says what they are.

The record is written last, so a copy that has one is whole. It also holds what the steps before it gave, for the day
when nobody is left who has heard it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from node.files import write_text_atomically
from node.info import StoredFile

RECORD_SUFFIX = ".copy.json"
STEPS_TOLD = 64
"""Steps whose figures a record holds: more than a coordinator can have sent ahead and not heard of."""


@dataclass(frozen=True)
class StateCopy:
    """A trainable state on disk.

    Attributes:
        step: the step it follows.
        weights, optimizer: its two files.
        written: when, in seconds since 1970.
        steps: ``StepDone`` events as the worker sent them, of the last steps up to this one; perhaps not all of them.
    """

    step: int
    weights: StoredFile
    optimizer: StoredFile
    written: float
    steps: tuple[bytes, ...] = ()

    @property
    def files(self) -> tuple[StoredFile, StoredFile]:
        """Both files."""
        return self.weights, self.optimizer

    @property
    def size(self) -> int:
        """Bytes of both."""
        return self.weights.size + self.optimizer.size

    def whole(self, folder: Path) -> bool:
        """Whether both files are in this folder in full length; their content is not looked at."""
        try:
            return all((folder / file.name).stat().st_size == file.size for file in self.files)
        except OSError:
            return False


def write_record(path: Path, copy: StateCopy) -> None:
    """Say what lies beside this file.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    content = {
        "step": copy.step,
        "weights": _described(copy.weights),
        "optimizer": _described(copy.optimizer),
        "written": copy.written,
        "steps": [base64.b64encode(step).decode() for step in copy.steps],
    }
    write_text_atomically(path, json.dumps(content) + "\n")


def read_record(path: Path) -> StateCopy | None:
    """What a record says; None when it cannot be read."""
    try:
        content = json.loads(path.read_text())
        return StateCopy(
            int(content["step"]),
            StoredFile(**content["weights"]),
            StoredFile(**content["optimizer"]),
            float(content["written"]),
            tuple(base64.b64decode(step, validate=True) for step in content["steps"]),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def newest_copy(folder: Path) -> StateCopy | None:
    """The newest copy that is here in full, or None."""
    found = [copy for path in folder.glob(f"*{RECORD_SUFFIX}") if (copy := read_record(path)) is not None]
    return max((copy for copy in found if copy.whole(folder)), key=lambda copy: copy.step, default=None)


def _described(file: StoredFile) -> dict[str, object]:
    return {"name": file.name, "sha256": file.sha256, "size": file.size}
