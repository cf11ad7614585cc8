"""The rows of each step and of each evaluation, ready to send."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from coordinator.data.batches import Batches, gather, micro_batches, sequential_batches
from coordinator.data.padding import Indices
from coordinator.data.tokenset import TokenSet
from coordinator.division import divide, group_rows, padded_lengths
from coordinator.pace import Pace, Speed
from coordinator.program import Program
from node.spec import Int32, Rows, Share


def halved(limit: int, longest: int) -> int | None:
    """Half of a machine's micro-batches, when its memory did not suffice.

    Args:
        limit: input positions of its largest micro-batch so far.
        longest: tokens of the longest row of the data.

    Returns:
        The new limit, or None where it would not help: micro-batches are single rows.
    """
    half = limit // 2
    return half if half >= max(1, longest // 2) else None


def micro_batched(
    lengths: Int32,
    max_seq_length: int | None,
    speeds: Sequence[Speed],
    limits: Sequence[int | None],
    *,
    most_rows: int,
    at_once: int | None = None,
    affinity: Mapping[int, int] | None = None,
) -> list[list[Indices]]:
    """The rows of a step, divided, and each member's cut into micro-batches.

    Args:
        lengths: (rows,) tokens of each row.
        max_seq_length: tokens that rows were cut to.
        speeds: of each member.
        limits: most input positions of a micro-batch of each member, or None.
        most_rows: of a micro-batch.
        at_once: most input positions of a micro-batch of anybody, or None.
        affinity: see ``divide``.

    Returns:
        For each member its micro-batches: indices in ``lengths``, ascending.
    """
    padded = padded_lengths(lengths, max_seq_length)
    found = []
    for rows, limit in zip(divide(lengths, max_seq_length, speeds, limits, affinity), limits, strict=True):
        longest_first = rows[np.argsort(-padded[rows], kind="stable")]
        sizes = group_rows(padded[longest_first].tolist(), _least(limit, at_once), most_rows)
        ends = np.cumsum(sizes, dtype=np.int64)
        found.append([np.sort(part) for part in np.split(longest_first, ends[:-1])] if sizes else [])
    return found


def positions_of(padded: Indices, micro_batches: Sequence[Indices]) -> list[int]:
    """Input positions of micro-batches, given by indices in the padded lengths of the rows."""
    return [len(part) * int(padded[part].max()) for part in micro_batches]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


class StepSource:
    """The global batch of each step: a pure function of the data, the seed and the step.

    Args:
        tokens: the training data.
        batches: which rows form which batch.
        program: which batches form which step.
        at_once: most input positions of a micro-batch in any case, or None.

    Attributes:
        token_limit: the same where memory is short, or None.
    """

    def __init__(self, tokens: TokenSet, batches: Batches, program: Program, at_once: int | None = None) -> None:
        self._tokens = tokens
        self._batches = batches
        self._program = program
        self._at_once = at_once
        self.token_limit: int | None = None
        self._largest = 0

    def share(self, step: int) -> Share:
        """All rows of a step, in micro-batches. Rows are numbered through the whole step."""
        parts: list[Rows] = []
        position = 0
        for iteration in self._program.iters(step):
            rows = gather(self._tokens, self._batches.rows(iteration), position)
            position += len(rows.ids)
            parts += micro_batches(rows, _least(self.token_limit, self._at_once))
        self._largest = max(self._largest, *(len(part.ids) * part.padded_length for part in parts))
        return Share(step, tuple(parts))

    def lengths(self, step: int) -> Int32:
        """(rows,) tokens of each row of a step, in the order in which they are numbered."""
        return self._tokens.lengths[self.row_ids(step)]

    def shares(
        self,
        step: int,
        paces: Sequence[Pace],
        limits: Sequence[int | None] | None = None,
        affinity: Mapping[int, int] | None = None,
    ) -> list[Share]:
        """The rows of a step, divided: each row is in one share, numbered as in ``share``.

        Args:
            step: from 1.
            paces: of each member.
            limits: most input positions of a micro-batch of each member, or None. With accumulation no micro-batch has
                more rows than a batch.
            affinity: the member that a row would rather go to, by the row's id in the data.

        Returns:
            A share for each member, which may be empty.
        """
        row_ids = self.row_ids(step)
        lengths = self._tokens.lengths[row_ids]
        limits = limits if limits is not None else [None] * len(paces)
        wishes = {i: affinity[int(row)] for i, row in enumerate(row_ids) if int(row) in affinity} if affinity else None
        divided = micro_batched(
            lengths,
            self._tokens.max_seq_length,
            [pace.now for pace in paces],
            limits,
            most_rows=self._batches.batch_size,
            at_once=self._at_once,
            affinity=wishes,
        )
        return [Share(step, tuple(self._numbered(row_ids, part) for part in parts)) for parts in divided]

    def row_ids(self, step: int) -> Indices:
        """(rows,) ids in the data of the rows of a step, in the order in which they are numbered."""
        return np.concatenate([self._batches.rows(iteration) for iteration in self._program.iters(step)])

    def _numbered(self, row_ids: Indices, positions: Indices) -> Rows:
        return dataclasses.replace(gather(self._tokens, row_ids[positions]), ids=positions.astype(np.int32))

    def shrink(self) -> bool:
        """Halve the micro-batches.

        Returns:
            Whether that can help: False once they are single rows.
        """
        limit = (self.token_limit or self._largest) // 2
        if limit < self._tokens.longest // 2:
            return False
        self.token_limit = limit
        return True


class Evaluation:
    """The rows of one pass over a data set without gradients.

    Args:
        tokens: the data.
        batch_size: rows of a chunk.
        limit: at most so many chunks; -1 all.
    """

    def __init__(self, tokens: TokenSet, batch_size: int, limit: int) -> None:
        self._tokens = tokens
        self._plan = sequential_batches(tokens.lengths, batch_size, limit)
        self._chunks = list(self._plan.batches)

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def rows(self) -> int:
        """Rows in all chunks together."""
        return self._plan.rows

    def chunk(self, index: int) -> Rows:
        """The rows of one chunk."""
        return gather(self._tokens, self._chunks[index])

    def limit_tokens(self, token_limit: int | None) -> None:
        """Cut chunks so that none has more input positions than this; single rows stay whole."""
        if token_limit is None:
            return
        self._chunks = []
        for batch in self._plan.batches:
            # Rows of a batch are sorted by length: the last is the longest.
            rows = max(1, token_limit // max(1, int(self._tokens.lengths[batch[-1]])))
            self._chunks += [batch[start : start + rows] for start in range(0, len(batch), rows)]
