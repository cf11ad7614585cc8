"""One file cut into train, valid and test: the same rows for the same seed, and equal rows always on one side."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from coordinator.data.formats import first_kind, parse_row, raw_lines
from coordinator.data.identity import as_hashes, row_hash
from coordinator.data.rows import BadRow
from coordinator.data.source import SPLITS, DataFile, Split
from node.errors import RowError, UserError
from node.files import replacing


@dataclass(frozen=True)
class SplitResult:
    """What was written.

    Attributes:
        rows: of each split that was asked for.
        duplicates: rows that stood earlier in the file; they are kept, beside their equals.
    """

    rows: dict[Split, int]
    duplicates: int


def split_file(file: DataFile, out: Path, valid: float, test: float, seed: int) -> SplitResult:
    """Cut a file into ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``. Reads it twice and holds 8 bytes per row.

    Args:
        file: rows of any format.
        out: folder, made when missing.
        valid: part of the different rows; 0 for none.
        test: likewise.
        seed: of the choice.

    Raises:
        UserError: the parts leave nothing to train on, or a file is already there.
        RowError: a bad row; nothing is written then.
    """
    if valid < 0 or test < 0 or valid + test >= 1:
        raise UserError(f"--valid {valid} and --test {test} must be at least 0 and below 1 together")
    parts: dict[Split, float] = {"train": 1 - valid - test, "valid": valid, "test": test}
    wanted: list[Split] = [split for split in SPLITS if parts[split] > 0]
    for split in SPLITS:
        if (out / f"{split}.jsonl").exists():
            raise UserError(f"{out / f'{split}.jsonl'} exists already; choose another --out, or remove it")
    collected = array("Q", (identity for identity, _ in _rows(file, seed)))
    different = np.unique(as_hashes(collected))
    if len(different) < len(wanted):
        raise UserError(f"{file.name} has {len(different)} different rows, too few for {', '.join(wanted)}")
    # Hashes are keyed with the seed, so their order is the shuffle.
    counts: dict[Split, int] = {
        split: max(1, round(parts[split] * len(different))) for split in wanted if split != "train"
    }
    counts["train"] = len(different) - sum(counts.values())
    if counts["train"] < 1:
        raise UserError(f"{file.name} has {len(different)} different rows: nothing would be left to train on")
    order: list[Split] = [split for split in ("valid", "test", "train") if split in wanted]
    bounds = np.cumsum([counts[split] for split in order])
    rows = dict.fromkeys(wanted, 0)
    with ExitStack() as stack:
        files: dict[Split, BinaryIO] = {
            split: stack.enter_context(stack.enter_context(replacing(out / f"{split}.jsonl")).open("wb"))
            for split in wanted
        }
        for identity, line in _rows(file, seed):
            rank = np.searchsorted(different, np.uint64(identity))
            split = order[int(np.searchsorted(bounds, rank, side="right"))]
            files[split].write(line.strip() + b"\n")
            rows[split] += 1
    return SplitResult(rows, len(collected) - len(different))


def _rows(file: DataFile, seed: int) -> Iterator[tuple[int, bytes]]:
    kind = first_kind(file)
    for number, line in raw_lines(file.path, file.name):
        try:
            yield row_hash(parse_row(line, kind, file.features), seed), line
        except BadRow as error:
            raise RowError(file.name, number, str(error)) from error
