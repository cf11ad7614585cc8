"""Adding up through the coordinator, over the stream that events go up and requests come down."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from node.bf16 import rounded_with_feedback, widened
from node.events import Addend
from node.reducer.proof import proof, refutation
from node.spec import PIECE_BYTES, PIECES_IN_FLIGHT, RingSpec, Total
from node.worker.adder import NEWER_GENERATION, Floats, Limit, ReductionFailed, Rounding

PIECE_FLOATS = PIECE_BYTES // 4


class StreamAdder:
    """Sends numbers up in pieces, a few ahead, and takes their totals; see ``Adder``. Nothing runs beside the worker.

    Args:
        count: most numbers that are added up at once.
        emit: takes the ``Addend`` events.
        total: the next total, waited for until a time of ``time.monotonic()``; see ``Inbox.total``.
        superseded: whether a newer generation was heard of.
        owed: numbers of a step, where what rounding keeps back of them is remembered; else 0.
    """

    def __init__(
        self,
        count: int,
        emit: Callable[[Addend], None],
        total: Callable[[float], Total | None],
        superseded: Callable[[], bool],
        owed: int = 0,
    ) -> None:
        self.numbers: Floats = np.zeros(count, np.float32)
        self._owed: Floats = np.zeros(owed, np.float32)
        self._place = 0  # of the last piece of a gradient that is rounded
        self._emit = emit
        self._total = total
        self._superseded = superseded
        self._sent = self._summed = 0  # pieces, in all of the group's sums
        self._unsent: deque[tuple[int, _Piece]] = deque()
        self._under_way: deque[tuple[int, list[_Piece]]] = deque()

    def form(self, spec: RingSpec, layout: int) -> None:
        """See ``Adder``."""
        mine = proof(spec.rank, spec.size, spec.token, layout)
        self.numbers[: len(mine)] = mine
        self.add(len(mine), 0, Limit.of_forming(spec))
        if why := refutation(self.numbers[: len(mine)].tolist(), spec.size, spec.token, layout):
            raise ReductionFailed(why)

    def begin(self, first: int, count: int, step: int, rounding: Rounding | None = None) -> None:
        """See ``Adder``."""
        pieces = list(self._pieces(first, count, rounding))
        self._unsent += [(step, piece) for piece in pieces]
        self._under_way.append((step, pieces))
        self._send()

    def finish(self, limit: Limit) -> None:
        """See ``Adder``."""
        step, pieces = self._under_way.popleft()
        for piece in pieces:
            piece.numbers[:] = self._next_total(step, piece, limit)
            self._send()

    def add(self, count: int, step: int, limit: Limit, rounding: Rounding | None = None) -> None:
        """See ``Adder``."""
        self.begin(0, count, step, rounding)
        self.finish(limit)

    def kill(self) -> None:
        """See ``Adder``."""

    def kill_process(self) -> None:
        """See ``Adder``."""

    def _send(self) -> None:
        """As many pieces as may be on their way."""
        while self._unsent and self._sent < self._summed + PIECES_IN_FLIGHT:
            step, piece = self._unsent.popleft()
            self._emit(Addend(step, self._sent, piece.data(), piece.place, piece.bf16))
            self._sent += 1

    def _pieces(self, first: int, count: int, rounding: Rounding | None) -> Iterator[_Piece]:
        numbers = self.numbers[first : first + count]
        exact = count if rounding is None else rounding.exact
        for part in _parts(0, exact):
            yield _Piece(numbers[part])
        if rounding is None:
            return
        if not rounding.place:
            self._place = 0
        for part in _parts(exact, count):
            self._place += 1
            owed = self._owed[rounding.place + part.start : rounding.place + part.stop]
            yield _Piece(numbers[part], self._place, not rounding.settle, owed)

    def _next_total(self, step: int, piece: _Piece, limit: Limit) -> Floats:
        total = self._total(limit.until)
        if total is None:
            raise ReductionFailed(NEWER_GENERATION if self._superseded() else limit.late)
        size = (2 if piece.bf16 else 4) * len(piece.numbers)
        if (total.step, total.index, len(total.data)) != (step, self._summed, size):
            raise ReductionFailed(
                f"a total of {len(total.data)} bytes came for piece {total.index} of step {total.step},"
                f" where {size} for piece {self._summed} of step {step} were due"
            )
        self._summed += 1
        return widened(np.frombuffer(total.data, "<u2")) if piece.bf16 else np.frombuffer(total.data, "<f4")


@dataclass(frozen=True)
class _Piece:
    """Some of the numbers, as they are sent.

    Attributes:
        numbers: where they are, and where their sums belong.
        place, bf16: as in ``Addend``.
        owed: of them, or None where they are never rounded.
    """

    numbers: Floats
    place: int = 0
    bf16: bool = False
    owed: Floats | None = None

    def data(self) -> bytes:
        """What is sent; what is owed is seen to."""
        if self.owed is None:
            return self.numbers.astype("<f4", copy=False).tobytes()
        if self.bf16:
            return rounded_with_feedback(self.numbers, self.owed).astype("<u2", copy=False).tobytes()
        settled = self.numbers + self.owed
        self.owed[:] = 0
        return settled.astype("<f4", copy=False).tobytes()


def _parts(start: int, stop: int) -> Iterator[slice]:
    """Of at most ``PIECE_FLOATS`` numbers each."""
    return (slice(first, min(first + PIECE_FLOATS, stop)) for first in range(start, stop, PIECE_FLOATS))
