"""Where rows come from: files for each split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from coordinator.data.rows import Features
from node.errors import UserError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

STANDARD = Features()


@dataclass(frozen=True)
class DataFile:
    """A file of rows, one JSON object per line.

    Attributes:
        path: of the file.
        features: which keys hold what.
        label: what messages call it; its path when "".
    """

    path: Path
    features: Features = STANDARD
    label: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.label or str(self.path)


@dataclass(frozen=True)
class DataSource:
    """A data set.

    Attributes:
        name: what messages call it: a folder or a repository.
        splits: the files of each split that exists.
    """

    name: str
    splits: dict[Split, tuple[DataFile, ...]] = field(default_factory=dict)

    def files(self, split: Split) -> tuple[DataFile, ...]:
        """The files of a split.

        Raises:
            UserError: the data set has no such split.
        """
        if split not in self.splits:
            raise UserError(f"{self.name} has no {split} set; add {split}.jsonl, one JSON object per line")
        return self.splits[split]


def local_source(folder: Path, features: Features = STANDARD) -> DataSource:
    """The data set in a folder: ``train.jsonl``, ``valid.jsonl``, ``test.jsonl``, as far as they exist.

    Raises:
        UserError: the folder does not exist or holds none of them.
    """
    if not folder.exists():
        raise UserError(f"no data folder {folder}; make one with train.jsonl, or give its path with --data")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; --data takes the folder that holds train.jsonl")
    splits: dict[Split, tuple[DataFile, ...]] = {
        split: (DataFile(folder / f"{split}.jsonl", features),)
        for split in SPLITS
        if (folder / f"{split}.jsonl").exists()
    }
    if not splits:
        raise UserError(
            f"{folder} holds no train.jsonl, valid.jsonl or test.jsonl; `coordinator data split` makes them"
        )
    return DataSource(str(folder), splits)
