"""What a check of a data set says."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.data.rows import Format
from coordinator.data.source import Split


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered row, and whether it is trained on."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Bin:
    """Rows of ``first`` to ``last`` tokens or words."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class FileReport:
    """One file.

    Attributes:
        file, split: which one.
        format: of its rows; chat with some tools is ``tools``.
        rows: usable ones.
        unit: what lengths count: ``tokens``, or ``words`` where no model was given.
        total, median: of the lengths, before rows are cut.
        target_tokens: what an epoch is trained on; None without a model.
        histogram: rows by length, in doublings.
        longest: (line, length) of the longest rows.
        truncated, dropped: rows that are cut, and rows of which nothing would be trained on.
        duplicates: rows that stood earlier in the file.
        duplicate_lines: (line, first line) of some of them.
        sample: the first row as the model is trained on it.
    """

    file: str
    split: Split
    format: Format
    rows: int
    unit: str
    total: int
    median: int
    target_tokens: int | None
    histogram: tuple[Bin, ...]
    longest: tuple[tuple[int, int], ...]
    truncated: int
    dropped: int
    duplicates: int
    duplicate_lines: tuple[tuple[int, int], ...]
    sample: tuple[Piece, ...]


@dataclass(frozen=True)
class Leak:
    """Rows of ``split`` that stand in ``other`` too.

    Attributes:
        lines: (line in split, line in other) of some of them.
    """

    split: Split
    other: Split
    rows: int
    lines: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Report:
    """A data set.

    Attributes:
        files: what is in each.
        leaks: rows that stand in two splits.
        problems: one line for each bad row and each file that cannot be used.
    """

    files: tuple[FileReport, ...]
    leaks: tuple[Leak, ...]
    problems: tuple[str, ...]
