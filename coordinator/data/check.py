"""What a data set is like: lengths, bad rows, duplicates, leaks between splits, and one row as it is trained."""

from __future__ import annotations

import heapq
import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from coordinator.data.formats import Kind, kind_of_row, load_object, parse_row, raw_lines
from coordinator.data.identity import Hashes, as_hashes, repeated, row_hash
from coordinator.data.report import Bin, FileReport, Leak, Piece, Report
from coordinator.data.rows import BadRow, Format, Message, Row
from coordinator.data.source import DataFile, DataSource, Split
from node.errors import RowError

if TYPE_CHECKING:
    from coordinator.data.tokenise import RowTokeniser, TokenisedRow

LONGEST = 5
EXAMPLES = 5
PROGRESS_ROWS = 1000
FORMAT_ORDER: tuple[Format, ...] = ("text", "completions", "chat", "tools")

Lengths = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]


@dataclass
class _Scan:
    """What is collected while a file is read: some bytes for each row, not the rows."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    longest: list[tuple[int, int]] = field(default_factory=list)
    format: Format = "text"
    targets: int = 0
    truncated: int = 0
    dropped: int = 0
    sample: tuple[Piece, ...] = ()
    problems: list[str] = field(default_factory=list)

    def add(self, line: int, row: Row, tokenised: TokenisedRow | None, tokeniser: RowTokeniser | None) -> None:
        length = _words(row) if tokenised is None else tokenised.whole_length
        self.lengths.append(length)
        self.lines.append(line)
        self.hashes.append(row_hash(row))
        self.format = max(self.format, row.format, key=FORMAT_ORDER.index)
        # The smallest of the heap goes first; of equally long rows the later one.
        entry = (length, -line)
        (heapq.heappush if len(self.longest) < LONGEST else heapq.heappushpop)(self.longest, entry)
        if tokenised is not None and tokeniser is not None:
            self.targets += int((tokenised.spans[1::2] - tokenised.spans[0::2]).sum())
            self.truncated += tokenised.cut
            self.dropped += len(tokenised.spans) == 0
            if not self.sample and len(tokenised.spans):
                self.sample = rendered(tokenised, tokeniser)
        elif not self.sample:
            self.sample = (Piece(_plain(row), trained=False),)


def check(source: DataSource, tokeniser: RowTokeniser | None, progress: Progress) -> Report:
    """Read every row of a data set.

    Args:
        source: the data set.
        tokeniser: of the model, or None to count words instead of tokens.
        progress: called with a task, rows read, and 0 for the unknown total.
    """
    reports = []
    problems: list[str] = []
    hashes: dict[Split, list[tuple[Hashes, array[int]]]] = {}
    for split, files in source.splits.items():
        for file in files:
            scan = _scan(file, split, tokeniser, progress)
            problems += scan.problems
            if len(scan.lengths):
                reports.append(_report(file, split, scan, tokeniser is not None))
                hashes.setdefault(split, []).append((as_hashes(scan.hashes), scan.lines))
    return Report(tuple(reports), _leaks(hashes), tuple(problems))


def _scan(file: DataFile, split: Split, tokeniser: RowTokeniser | None, progress: Progress) -> _Scan:
    scan = _Scan()
    try:
        kind = _kind_of_good_row(file)
        if tokeniser is not None:
            tokeniser.require(chat=kind != "text")
        for number, line in raw_lines(file.path, file.name):
            try:
                row = parse_row(line, kind, file.features)
                scan.add(number, row, None if tokeniser is None else tokeniser.row(row), tokeniser)
            except BadRow as error:
                scan.problems.append(str(RowError(file.name, number, str(error))))
            if number % PROGRESS_ROWS == 0:
                progress(f"reading {split}", number, 0)
    except _Unusable as error:
        scan.problems += error.problems
    return scan


class _Unusable(Exception):
    """A file without a single good row."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__()
        self.problems = problems


def _kind_of_good_row(file: DataFile) -> Kind:
    """What a file's rows are, by the first that can be recognised: bad rows before it are reported, not believed."""
    problems = []
    for number, line in raw_lines(file.path, file.name):
        try:
            return kind_of_row(load_object(line), file.features)
        except BadRow as error:
            problems.append(str(RowError(file.name, number, str(error))))
    raise _Unusable(problems or [f"{file.name} is empty; it needs at least one row"])


def rendered(tokenised: TokenisedRow, tokeniser: RowTokeniser) -> tuple[Piece, ...]:
    """A row's text in pieces that are trained on and pieces that are not."""
    spans = tokenised.spans.tolist()
    edges = [0, *spans, len(tokenised.tokens)]
    pieces = []
    for index, (start, end) in enumerate(pairwise(edges)):
        if end > start:
            pieces.append(Piece(tokeniser.tokenizer.decode(tokenised.tokens[start:end].tolist()), index % 2 == 1))
    return tuple(pieces)


def _plain(row: Row) -> str:
    """A row as it reads without a template."""
    return row.text or "\n".join(f"{message['role']}: {_content(message)}" for message in row.messages)


def _content(message: Message) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*([str(message["content"])] if message.get("content") else []), *calls])


def _words(row: Row) -> int:
    return len(_plain(row).split())


def _report(file: DataFile, split: Split, scan: _Scan, tokens: bool) -> FileReport:
    lengths = np.frombuffer(scan.lengths, np.int64)
    lines = scan.lines
    duplicates = repeated(as_hashes(scan.hashes))
    return FileReport(
        file=file.name,
        split=split,
        format=scan.format,
        rows=len(lengths),
        unit="tokens" if tokens else "words",
        total=int(lengths.sum()),
        median=int(np.median(lengths)),
        target_tokens=scan.targets if tokens else None,
        histogram=_histogram(lengths),
        longest=tuple((-line, length) for length, line in sorted(scan.longest, reverse=True)),
        truncated=scan.truncated,
        dropped=scan.dropped,
        duplicates=len(duplicates),
        duplicate_lines=tuple((lines[later], lines[first]) for later, first in duplicates[:EXAMPLES]),
        sample=scan.sample,
    )


def _histogram(lengths: Lengths) -> tuple[Bin, ...]:
    """Rows by length in doublings: up to 16, 17 to 32, 33 to 64, and so on."""
    edges = [0, 16]
    while edges[-1] < lengths.max():
        edges.append(2 * edges[-1])
    counts = [int(((lengths > low) & (lengths <= high)).sum()) for low, high in pairwise(edges)]
    counts[0] += int((lengths == 0).sum())
    bins = [Bin(low + 1, high, rows) for (low, high), rows in zip(pairwise(edges), counts, strict=True)]
    while len(bins) > 1 and bins[0].rows == 0:
        bins.pop(0)
    return tuple(bins)


def _leaks(hashes: dict[Split, list[tuple[Hashes, array[int]]]]) -> tuple[Leak, ...]:
    leaks = []
    splits = list(hashes)
    for index, other in enumerate(splits):
        theirs = np.concatenate([part for part, _ in hashes[other]])
        their_lines = np.concatenate([np.frombuffer(lines, np.int64) for _, lines in hashes[other]])
        known, first = np.unique(theirs, return_index=True)
        for split in splits[index + 1 :]:
            ours = np.concatenate([part for part, _ in hashes[split]])
            our_lines = np.concatenate([np.frombuffer(lines, np.int64) for _, lines in hashes[split]])
            at = np.minimum(np.searchsorted(known, ours), len(known) - 1)
            leaked = np.flatnonzero(known[at] == ours)
            if len(leaked):
                examples = [(int(our_lines[i]), int(their_lines[first[at[i]]])) for i in leaked[:EXAMPLES]]
                leaks.append(Leak(split, other, len(leaked), tuple(examples)))
    return tuple(leaks)
