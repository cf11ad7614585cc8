"""The rows of each step and of each evaluation, ready to send."""

from __future__ import annotations

from coordinator.data.batches import Batches, gather, micro_batches, sequential_batches
from coordinator.data.tokenset import TokenSet
from coordinator.program import Program
from node.spec import Rows, Share


class StepSource:
    """The global batch of each step: a pure function of the data, the seed and the step.

    Args:
        tokens: the training data.
        batches: which rows form which batch.
        program: which batches form which step.

    Attributes:
        token_limit: most input positions of a micro-batch, or None; set when memory is short.
    """

    def __init__(self, tokens: TokenSet, batches: Batches, program: Program) -> None:
        self._tokens = tokens
        self._batches = batches
        self._program = program
        self.token_limit: int | None = None
        self._largest = 0

    def share(self, step: int) -> Share:
        """All rows of a step, in micro-batches. Rows are numbered through the whole step."""
        parts: list[Rows] = []
        position = 0
        for iteration in self._program.iters(step):
            rows = gather(self._tokens, self._batches.rows(iteration), position)
            position += len(rows.ids)
            parts += micro_batches(rows, self.token_limit)
        self._largest = max(self._largest, *(len(part.ids) * part.padded_length for part in parts))
        return Share(step, tuple(parts))

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
