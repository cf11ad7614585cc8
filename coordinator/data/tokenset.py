"""Tokenised rows in flat files, memory-mapped: a million rows need no memory of a million rows.

A folder holds ``tokens.bin`` and ``lengths.bin`` (int32), ``spans.bin`` (int32, start and end), ``span_counts.bin``
(int32), ``lines.bin`` (int64, where each row came from), ``offsets.bin`` and ``span_offsets.bin`` (int64), and
``header.json`` with counts and totals, which is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from node.files import sync_folder
from node.spec import Int32

Int64 = npt.NDArray[np.int64]

FORMAT_VERSION = 1
HEADER = "header.json"
STREAMS = ("tokens", "lengths", "spans", "span_counts", "lines")
# What the rows are, as opposed to where they came from: these are what the digest stands for.
CONTENT = ("tokens", "lengths", "spans", "span_counts")


class DamagedTokenSet(Exception):
    """A folder that does not hold what its header says."""


@dataclass(frozen=True)
class TokenisedChunk:
    """Some rows in order, flat.

    Attributes:
        tokens: (sum of lengths,) token ids.
        lengths: (rows,) tokens of each row.
        spans: (2 * sum of span_counts,) start and end of each span, relative to its row.
        span_counts: (rows,) spans of each row.
        lines: (rows,) line of each row in its file.
        cut: rows that were cut to the longest allowed length.
        dropped: rows with nothing to train on, which are not among these.
    """

    tokens: Int32
    lengths: Int32
    spans: Int32
    span_counts: Int32
    lines: Int64
    cut: int
    dropped: int


@dataclass(frozen=True)
class Header:
    """Counts of a token set; the names are those of ``TokenSet``."""

    version: int
    rows: int
    tokens: int
    spans: int
    truncated: int
    dropped: int
    longest: int
    target_tokens: int
    largest_token: int
    max_seq_length: int
    digest: str


class TokenSetWriter:
    """Writes chunks of rows to a folder, in order.

    Args:
        folder: an existing, empty folder.
        max_seq_length: tokens that rows were cut to.
    """

    def __init__(self, folder: Path, max_seq_length: int) -> None:
        self.folder = folder
        self.max_seq_length = max_seq_length
        self._files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in STREAMS}
        self._digests = {name: hashlib.sha256() for name in CONTENT}
        self._rows = self._tokens = self._spans = self._targets = self._cut = self._dropped = 0
        self._longest = 0
        self._largest = -1

    def add(self, chunk: TokenisedChunk) -> None:
        """Append rows."""
        for name in STREAMS:
            content = getattr(chunk, name).tobytes()
            self._files[name].write(content)
            if name in self._digests:
                self._digests[name].update(content)
        self._rows += len(chunk.lengths)
        self._tokens += len(chunk.tokens)
        self._spans += len(chunk.spans) // 2
        self._targets += int(chunk.spans[1::2].sum(dtype=np.int64) - chunk.spans[0::2].sum(dtype=np.int64))
        self._cut += chunk.cut
        self._dropped += chunk.dropped
        self._longest = max(self._longest, int(chunk.lengths.max(initial=0)))
        self._largest = max(self._largest, int(chunk.tokens.max(initial=-1)))

    def close(self) -> None:
        """Close the files; without ``finish`` the folder holds no token set.

        Raises:
            OSError: what was written last found no room; all are closed all the same.
        """
        with contextlib.ExitStack() as closing:
            for file in self._files.values():
                closing.callback(file.close)

    def finish(self) -> None:
        """Write what is computed from all rows, sync everything, and the header last."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        self._write_offsets("lengths", "offsets")
        self._write_offsets("span_counts", "span_offsets")
        digest = hashlib.sha256("".join(self._digests[name].hexdigest() for name in CONTENT).encode()).hexdigest()
        header = Header(
            version=FORMAT_VERSION,
            rows=self._rows,
            tokens=self._tokens,
            spans=self._spans,
            truncated=self._cut,
            dropped=self._dropped,
            longest=self._longest,
            target_tokens=self._targets,
            largest_token=self._largest,
            max_seq_length=self.max_seq_length,
            digest=digest,
        )
        with (self.folder / HEADER).open("w", encoding="utf-8") as text:
            json.dump(asdict(header), text, indent=2)
            text.flush()
            os.fsync(text.fileno())
        sync_folder(self.folder)

    def _write_offsets(self, counts: str, name: str) -> None:
        sizes = _mapped(self.folder / f"{counts}.bin", np.int32)
        with (self.folder / f"{name}.bin").open("wb") as file:
            file.write(np.zeros(1, np.int64).tobytes())
            np.cumsum(sizes, dtype=np.int64).tofile(file)
            file.flush()
            os.fsync(file.fileno())


class TokenSet:
    """Tokenised rows on disk.

    Args:
        folder: that ``TokenSetWriter`` wrote.

    Attributes:
        lengths: (rows,) tokens of each row, memory-mapped.
        lines: (rows,) line of each row in its file, memory-mapped.
        truncated: rows that were cut to ``max_seq_length``.
        dropped: rows left out because nothing of them would be trained on.
        longest: tokens of the longest row.
        target_tokens: tokens that a whole epoch is trained on.
        largest_token: largest token id.
        max_seq_length: tokens that rows were cut to.
        digest: SHA-256 of tokens and spans: the data's identity in checkpoints.

    Raises:
        DamagedTokenSet: files are missing or of other sizes than the header says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        header = _read_header(folder)
        self.header = header
        self.truncated = header.truncated
        self.dropped = header.dropped
        self.longest = header.longest
        self.target_tokens = header.target_tokens
        self.largest_token = header.largest_token
        self.digest = header.digest
        self._length = header.rows
        self._max_seq_length = header.max_seq_length
        self._check_sizes()
        self.lengths: Int32 = _mapped(folder / "lengths.bin", np.int32)
        self.lines: Int64 = _mapped(folder / "lines.bin", np.int64)
        self._tokens: Int32 = _mapped(folder / "tokens.bin", np.int32)
        self._spans: Int32 = _mapped(folder / "spans.bin", np.int32)
        self._offsets: Int64 = _mapped(folder / "offsets.bin", np.int64)
        self._span_offsets: Int64 = _mapped(folder / "span_offsets.bin", np.int64)

    @property
    def max_seq_length(self) -> int:
        """Tokens that rows were cut to."""
        return self._max_seq_length

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> tuple[Int32, Int32]:
        """Tokens (n,) and spans (2 * spans,) of one row; views of the mapped files, not to be written to."""
        start, end = self._offsets[index], self._offsets[index + 1]
        span_start, span_end = self._span_offsets[index], self._span_offsets[index + 1]
        return self._tokens[start:end], self._spans[2 * span_start : 2 * span_end]

    def _check_sizes(self) -> None:
        header = self.header
        expected = {
            "tokens": 4 * header.tokens,
            "lengths": 4 * header.rows,
            "spans": 8 * header.spans,
            "span_counts": 4 * header.rows,
            "lines": 8 * header.rows,
            "offsets": 8 * (header.rows + 1),
            "span_offsets": 8 * (header.rows + 1),
        }
        for name, size in expected.items():
            file = self.folder / f"{name}.bin"
            if not file.exists() or file.stat().st_size != size:
                raise DamagedTokenSet(f"{file} does not have {size} bytes")


def _read_header(folder: Path) -> Header:
    try:
        content: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        header = Header(**content)
    except (OSError, ValueError, TypeError) as error:
        raise DamagedTokenSet(f"{folder / HEADER} cannot be read") from error
    if header.version != FORMAT_VERSION:
        raise DamagedTokenSet(f"{folder / HEADER} is of another version")
    return header


def _mapped(path: Path, dtype: Any) -> Any:
    """A file as an array; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)
