"""Which rows form which batch, and how a batch is padded: pure functions of lengths, batch size and seed.

Rows are bucketed by their true length, as in Khomenko et al., "Accelerating recurrent neural network training using
sequence bucketing" (arXiv 1708.05604): shuffled, sorted by padded length inside large windows, cut into batches, and
the batches shuffled. Only raw bits of the Philox generator are used, which NumPy keeps stable between its versions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coordinator.data.padding import RUNGS, Indices, gather, micro_batches, padded_length
from node.spec import Int32

__all__ = ["Batches", "EvaluationBatches", "gather", "micro_batches", "padded_length", "sequential_batches"]

WINDOW_ROWS = 1024
WINDOW_BATCHES = 64


@dataclass(frozen=True)
class EvaluationBatches:
    """Batches for a pass without gradients.

    Attributes:
        batches: row ids of each batch.
        rows: rows in all batches together.
    """

    batches: tuple[Indices, ...]
    rows: int


class Batches:
    """The training batches of a data set, endless; every row once in each epoch.

    Args:
        lengths: (n,) tokens of each row.
        batch_size: rows of a batch; the last batch of an epoch may be smaller.
        seed: of the shuffling.
    """

    def __init__(self, lengths: Int32, batch_size: int, seed: int) -> None:
        if len(lengths) == 0 or batch_size < 1:
            raise ValueError("batches need at least one row and a batch size of at least 1")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = -(-len(lengths) // batch_size)
        self._epoch: _Epoch | None = None

    def rows(self, iteration: int) -> Indices:
        """Row ids of the batch of this iteration, counted from 1."""
        if iteration < 1:
            raise ValueError("iterations are counted from 1")
        number, position = divmod(iteration - 1, self.per_epoch)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = _order_epoch(self.lengths, self.batch_size, self.seed, number)
        return self._epoch.batch(position)


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order: row ids, where each batch of them starts, and the order of the batches."""

    number: int
    rows: Indices
    starts: Indices
    order: Indices

    def batch(self, position: int) -> Indices:
        index = self.order[position]
        return self.rows[self.starts[index] : self.starts[index + 1]]


def _order_epoch(lengths: Int32, batch_size: int, seed: int, number: int) -> _Epoch:
    bits = np.random.Philox(np.random.SeedSequence([seed % 2**63, number]))
    count = len(lengths)
    rows = _shuffled(bits, count)
    # By rung, not by length: the padding is the same, and which rows meet in a batch differs more between epochs.
    rungs = np.searchsorted(RUNGS, lengths[rows] - 1)
    windows = np.arange(count) // (batch_size * max(WINDOW_BATCHES, WINDOW_ROWS // batch_size))
    rows = rows[np.lexsort((rungs, windows))]
    batches = -(-count // batch_size)
    sizes = np.full(batches, batch_size)
    order = _shuffled(bits, batches)
    rest = count % batch_size
    if rest:
        # The smaller batch is cut from a random place of the last window, not always from its longest rows, and
        # closes the epoch.
        first = int(np.searchsorted(windows, windows[-1])) // batch_size
        small = int(first + bits.random_raw() % (batches - first))
        sizes[small] = rest
        order = np.concatenate([order[order != small], [small]])
    return _Epoch(number, rows, np.concatenate([[0], np.cumsum(sizes)]), order)


def _shuffled(bits: np.random.Philox, count: int) -> Indices:
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)


def sequential_batches(lengths: Int32, batch_size: int, limit: int = -1) -> EvaluationBatches:
    """Batches for evaluation: always the same, each row at most once, sorted by length.

    Args:
        lengths: (n,) tokens of each row.
        batch_size: rows of a batch; the last may be smaller.
        limit: at most so many batches; their rows are spread evenly over the data set. -1 takes every row.
    """
    total = len(lengths)
    count = total if limit < 0 else min(total, limit * batch_size)
    if count == 0:
        return EvaluationBatches((), 0)
    chosen = np.arange(count, dtype=np.int64) * total // count
    chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
    return EvaluationBatches(tuple(np.split(chosen, np.arange(batch_size, count, batch_size))), count)
