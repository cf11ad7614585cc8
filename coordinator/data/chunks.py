"""Lines of a file tokenised chunk by chunk, in this process or in several, always in the file's order."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from coordinator.data.formats import Kind, parse_row, raw_lines
from coordinator.data.rows import BadRow, Features
from coordinator.data.source import DataFile
from coordinator.data.tokenise import RowTokeniser, TokenisedRow, TokeniseOptions
from coordinator.data.tokenizer import load_tokenizer
from coordinator.data.tokenset import TokenisedChunk
from node.errors import RowError, TandemError

CHUNK_ROWS = 500
CHUNK_BYTES = 1 << 20
# A worker process needs two to three seconds to start; below this much text it does not pay.
PARALLEL_BYTES = 8 << 20


@dataclass(frozen=True)
class LineChunk:
    """Consecutive lines of one file, with what is needed to read them."""

    lines: list[tuple[int, bytes]]
    kind: Kind
    features: Features


@dataclass(frozen=True)
class BadLine:
    """The first line of a chunk that could not be used."""

    line: int
    reason: str


def line_chunks(file: DataFile, kind: Kind) -> Iterator[LineChunk]:
    """The lines of a file, some at a time."""
    lines: list[tuple[int, bytes]] = []
    size = 0
    for number, line in raw_lines(file.path, file.name):
        lines.append((number, line))
        size += len(line)
        if len(lines) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield LineChunk(lines, kind, file.features)
            lines, size = [], 0
    if lines:
        yield LineChunk(lines, kind, file.features)


def tokenise_chunk(tokeniser: RowTokeniser, chunk: LineChunk) -> TokenisedChunk | BadLine:
    """Tokenise the rows of a chunk, up to the first bad one."""
    rows: list[TokenisedRow] = []
    kept_lines = []
    cut = 0
    for number, line in chunk.lines:
        try:
            row = tokeniser.row(parse_row(line, chunk.kind, chunk.features))
        except BadRow as error:
            return BadLine(number, str(error))
        cut += row.cut
        if len(row.spans):
            rows.append(row)
            kept_lines.append(number)
    empty = [np.zeros(0, np.int32)]
    return TokenisedChunk(
        tokens=np.concatenate([row.tokens for row in rows] or empty),
        lengths=np.array([len(row.tokens) for row in rows], np.int32),
        spans=np.concatenate([row.spans for row in rows] or empty),
        span_counts=np.array([len(row.spans) // 2 for row in rows], np.int32),
        lines=np.array(kept_lines, np.int64),
        cut=cut,
        dropped=len(chunk.lines) - len(rows),
    )


def tokenised_chunks(
    file: DataFile, kind: Kind, tokeniser: RowTokeniser, tokenizer_path: Path, workers: int
) -> Iterator[TokenisedChunk]:
    """The chunks of a file in order.

    Args:
        file: to read.
        kind: of its rows.
        tokeniser: for this process.
        tokenizer_path: for worker processes, which load their own.
        workers: processes to use where it pays; 1 for none.

    Raises:
        RowError: the first bad row of the file.
    """
    chunks = line_chunks(file, kind)
    if workers > 1 and file.path.stat().st_size >= PARALLEL_BYTES:
        results = _in_parallel(chunks, tokeniser, tokenizer_path, workers)
    else:
        results = (tokenise_chunk(tokeniser, chunk) for chunk in chunks)
    for result in results:
        if isinstance(result, BadLine):
            raise RowError(file.name, result.line, result.reason)
        yield result


def _in_parallel(
    chunks: Iterator[LineChunk], tokeniser: RowTokeniser, tokenizer_path: Path, workers: int
) -> Iterator[TokenisedChunk | BadLine]:
    arguments = (tokenizer_path, tokeniser.options, tokeniser.name)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, arguments)
    waiting: deque[tuple[LineChunk, Future[TokenisedChunk | BadLine]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk)))
            # Bounded, so that a reader faster than the workers does not fill the memory.
            if len(waiting) > 2 * workers:
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()
    except BrokenProcessPool as error:
        raise TandemError(
            "the tokenising processes ended unexpectedly; a script that calls coordinator.train needs "
            '`if __name__ == "__main__":` around it'
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_worker: RowTokeniser | None = None


def _start_worker(tokenizer_path: Path, options: TokeniseOptions, name: str) -> None:
    global _worker  # noqa: PLW0603  (a process of a pool has no other place for what it keeps)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = RowTokeniser(load_tokenizer(tokenizer_path, options.trust_remote_code), options, name)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(chunk: LineChunk) -> TokenisedChunk | BadLine:
    assert _worker is not None
    return tokenise_chunk(_worker, chunk)
