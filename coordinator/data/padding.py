"""How a batch is padded and split: few shapes, and little computed for padding."""

from __future__ import annotations

import bisect
from typing import Protocol

import numpy as np
import numpy.typing as npt

from node.spec import Int32, Rows

Indices = npt.NDArray[np.int64]

# What starting one more micro-batch costs, in input positions; below this saving a split does not pay.
SPLIT_COST_POSITIONS = 64
SPLIT_GAIN = 0.15
# Padded lengths grow in these steps within each doubling: at most an eighth is padding above 64 positions.
STEPS_PER_DOUBLING = 8
FINEST_STEP = 8
LONGEST_RUNG = 1 << 20
# A micro-batch of so many input positions keeps a machine busy: a larger one takes more memory, and no less time.
ENOUGH_POSITIONS = 1024


class TokenRows(Protocol):
    """What ``gather`` needs of a token set."""

    @property
    def max_seq_length(self) -> int:
        """Tokens that rows were cut to."""

    def row(self, index: int) -> tuple[Int32, Int32]:
        """Tokens (n,) and spans (2 * spans,) of one row."""


def _ladder(limit: int) -> list[int]:
    """All padded lengths up to the first that is at least ``limit``: 48 up to 2048."""
    rungs = list(range(FINEST_STEP, STEPS_PER_DOUBLING * FINEST_STEP + 1, FINEST_STEP))
    while rungs[-1] < limit:
        step = rungs[-1] // STEPS_PER_DOUBLING
        rungs += [rungs[-1] + step * i for i in range(1, STEPS_PER_DOUBLING + 1)]
    return rungs


RUNGS = _ladder(LONGEST_RUNG)


def positions_at_once(fine_tune_type: str) -> int | None:
    """Most input positions of a micro-batch where memory is no reason for fewer; None is no limit.

    Parts of a batch need their sum of gradients beside their own: small where adapters are trained, and as large as the
    model where all of it is.
    """
    return None if fine_tune_type == "full" else ENOUGH_POSITIONS


def padded_length(longest_input: int, max_seq_length: int | None = None) -> int:
    """Input positions to pad to: a rung of a fixed ladder, so that a run has few shapes.

    Args:
        longest_input: input positions of the longest row, its tokens minus one.
        max_seq_length: tokens that rows are cut to; nothing is padded further than such a row needs.
    """
    longest_input = max(1, longest_input)
    rungs = RUNGS if longest_input <= RUNGS[-1] else _ladder(longest_input)
    rung = rungs[bisect.bisect_left(rungs, longest_input)]
    if max_seq_length is not None:
        needed = -(-max(1, max_seq_length - 1) // FINEST_STEP) * FINEST_STEP
        rung = min(rung, max(needed, longest_input))
    return rung


def gather(token_set: TokenRows, row_ids: npt.ArrayLike, first_position: int = 0) -> Rows:
    """The rows of a batch with their tokens.

    Args:
        token_set: where the tokens are.
        row_ids: (rows,) which rows.
        first_position: position of the first of them in its step's global batch; the others follow.
    """
    picked = np.asarray(row_ids, np.int64)
    rows = [token_set.row(int(i)) for i in picked]
    lengths = np.array([len(tokens) for tokens, _ in rows], np.int32)
    empty = np.zeros(0, np.int32)
    return Rows(
        ids=np.arange(first_position, first_position + len(rows), dtype=np.int32),
        lengths=lengths,
        tokens=np.concatenate([tokens for tokens, _ in rows]) if rows else empty,
        span_counts=np.array([len(spans) // 2 for _, spans in rows], np.int32),
        spans=np.concatenate([spans for _, spans in rows]) if rows else empty,
        padded_length=padded_length(int(lengths.max()) - 1, token_set.max_seq_length) if rows else FINEST_STEP,
    )


def micro_batches(rows: Rows, token_limit: int | None = None) -> tuple[Rows, ...]:
    """Split a batch by length where its padding is worth it, and where it must be.

    At most two micro-batches, unless the limit forces more. Their sizes are multiples of a quarter of the batch, so
    that shapes stay few.

    Args:
        rows: the batch.
        token_limit: most ``rows * padded_length`` of a micro-batch; a single row may exceed it.
    """
    if len(rows.ids) == 0:
        return ()
    order = np.argsort(rows.lengths, kind="stable")
    groups: list[Indices] = []
    for group in _worthwhile_split(rows, order):
        groups += _limited_split(rows, group, token_limit)
    if len(groups) == 1:
        return (rows,)
    return tuple(rows.take(sorted(group.tolist()), _padded(rows, group)) for group in groups)


def _padded(rows: Rows, group: Indices) -> int:
    return min(rows.padded_length, padded_length(int(rows.lengths[group].max()) - 1))


def _cost(rows: Rows, group: Indices) -> int:
    return len(group) * _padded(rows, group)


def _worthwhile_split(rows: Rows, order: Indices) -> list[Indices]:
    whole = len(order) * rows.padded_length
    quantum = max(1, len(order) // 4)
    best = [order]
    best_cost = min(whole * (1 - SPLIT_GAIN), whole - SPLIT_COST_POSITIONS)
    for cut in range(quantum, len(order), quantum):
        halves = [order[:cut], order[cut:]]
        cost = sum(_cost(rows, half) for half in halves)
        if cost <= best_cost:
            best, best_cost = halves, cost
    return best


def _limited_split(rows: Rows, group: Indices, token_limit: int | None) -> list[Indices]:
    if token_limit is None or _cost(rows, group) <= token_limit:
        return [group]
    count = max(1, token_limit // _padded(rows, group))
    # Pieces of about one size have one or two shapes, and none is a remainder of a single row.
    return np.array_split(group, -(-len(group) // count))
