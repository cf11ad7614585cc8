"""Adding up through the coordinator, over the stream that events go up and requests come down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from node.events import Addend
from node.reducer.proof import proof, refutation
from node.spec import PIECE_BYTES, PIECES_IN_FLIGHT, RingSpec, Total
from node.worker.adder import NEWER_GENERATION, Floats, Limit, ReductionFailed

PIECE_FLOATS = PIECE_BYTES // 4


class StreamAdder:
    """Sends numbers up in pieces, a few ahead, and takes their totals; see ``Adder``. Nothing runs beside the worker.

    Args:
        count: most numbers that are added up at once.
        emit: takes the ``Addend`` events.
        total: the next total, waited for until a time of ``time.monotonic()``; see ``Inbox.total``.
        superseded: whether a newer generation was heard of.
    """

    def __init__(
        self,
        count: int,
        emit: Callable[[Addend], None],
        total: Callable[[float], Total | None],
        superseded: Callable[[], bool],
    ) -> None:
        self.numbers: Floats = np.zeros(count, np.float32)
        self._emit = emit
        self._total = total
        self._superseded = superseded
        self._sent = self._summed = 0  # pieces, in all of the group's sums

    def form(self, spec: RingSpec, layout: int) -> None:
        """See ``Adder``."""
        mine = proof(spec.rank, spec.size, spec.token, layout)
        self.numbers[: len(mine)] = mine
        self.add(len(mine), 0, Limit.of_forming(spec))
        if why := refutation(self.numbers[: len(mine)].tolist(), spec.size, spec.token, layout):
            raise ReductionFailed(why)

    def add(self, count: int, step: int, limit: Limit) -> None:
        """See ``Adder``."""
        pieces = [self.numbers[first : min(first + PIECE_FLOATS, count)] for first in range(0, count, PIECE_FLOATS)]
        unsent = iter(pieces)
        for piece in pieces:
            while self._sent < self._summed + PIECES_IN_FLIGHT and (mine := next(unsent, None)) is not None:
                self._emit(Addend(step, self._sent, mine.astype("<f4", copy=False).tobytes()))
                self._sent += 1
            piece[:] = self._next_total(step, len(piece), limit)

    def kill(self) -> None:
        """See ``Adder``."""

    def kill_process(self) -> None:
        """See ``Adder``."""

    def _next_total(self, step: int, count: int, limit: Limit) -> Floats:
        total = self._total(limit.until)
        if total is None:
            raise ReductionFailed(NEWER_GENERATION if self._superseded() else limit.late)
        if (total.step, total.index, len(total.data)) != (step, self._summed, 4 * count):
            raise ReductionFailed(
                f"a total of {len(total.data)} bytes came for piece {total.index} of step {total.step},"
                f" where {4 * count} for piece {self._summed} of step {step} were due"
            )
        self._summed += 1
        return np.frombuffer(total.data, "<f4")
