"""Sums over the ranks of a group that go through the coordinator, where no ring carries them.

Each rank sends its numbers in pieces over its node's stream; when all have sent a piece, all are sent its total. That
goes on whatever the engine is busy with: the ranks wait for it with a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.workers import SILENCE_SECONDS
from node.bf16 import rounded_with_feedback, widened
from node.errors import TandemError
from node.events import Addend
from node.info import RingPart
from node.spec import PIECE_BYTES, PIECES_IN_FLIGHT, Total
from node.supervisor import WorkerLink

CLOSING_SECONDS = 5.0

Floats = npt.NDArray[np.float32]


class NotAddable(TandemError):
    """A piece that belongs to no sum of the group; the message says why, on one line."""


@dataclass
class _Piece:
    """A sum that is not complete: over the first ``added`` ranks, and what later ones have given already."""

    step: int
    size: int
    place: int
    bf16: bool
    total: Floats | None = None
    added: int = 0
    given: dict[int, bytes] = field(default_factory=dict)


class StreamSums:
    """The sums of one group: pieces are added up in the order of the ranks, in whatever order they arrive.

    So each run has the same numbers. At most ``PIECES_IN_FLIGHT`` pieces of each rank are held. The totals of gradients
    that are sent as bf16 are rounded, too, and what that keeps back is added the next time; see ``node.bf16``.

    Args:
        size: of the group.
    """

    def __init__(self, size: int) -> None:
        self._due = [0] * size  # index of the next piece of each rank
        self._pieces: dict[int, _Piece] = {}
        self._owed: dict[int, Floats] = {}  # by the pieces' places in a gradient

    def add(self, rank: int, addend: Addend) -> bytes | None:
        """Take in a rank's piece; the total when it was the last one's, to be sent to all.

        Raises:
            NotAddable: it does not follow the rank's last one, is too far ahead of the others', or is not of the same
                step and size as theirs.
        """
        index, data, due = addend.index, addend.data, self._due[rank]
        if index != due:
            raise NotAddable(f"rank {rank} gave piece {index} of step {addend.step} where {due} was due")
        if index >= min(self._due) + PIECES_IN_FLIGHT:
            raise NotAddable(f"rank {rank} gave piece {index} before others gave piece {min(self._due)}")
        if not 0 < len(data) <= PIECE_BYTES or len(data) % (2 if addend.bf16 else 4):
            raise NotAddable(f"rank {rank} gave a piece of {len(data)} bytes")
        if not addend.bf16 <= addend.place <= len(self._owed) + PIECES_IN_FLIGHT:
            raise NotAddable(
                f"rank {rank} gave piece {addend.place} of a gradient of which {len(self._owed)} are known"
            )
        owed = self._owed.get(addend.place)
        if owed is not None and len(data) != (2 if addend.bf16 else 4) * len(owed):
            raise NotAddable(f"rank {rank} gave {len(data)} bytes for {len(owed)} numbers of a gradient")
        piece = self._pieces.setdefault(index, _Piece(addend.step, len(data), addend.place, addend.bf16))
        if (addend.step, len(data)) != (piece.step, piece.size):
            raise NotAddable(
                f"rank {rank} gave {len(data)} bytes of step {addend.step} for piece {index},"
                f" others {piece.size} bytes of step {piece.step}"
            )
        if (addend.place, addend.bf16) != (piece.place, piece.bf16):
            raise NotAddable(f"rank {rank} gave another part of the gradient for piece {index} than others")
        self._due[rank] += 1
        piece.given[rank] = data
        while piece.added in piece.given:
            numbers = _numbers(piece.given.pop(piece.added), bf16=piece.bf16)
            with np.errstate(all="ignore"):  # the step says so when there are values that are not finite
                piece.total = numbers if piece.total is None else piece.total + numbers
            piece.added += 1
        if piece.total is None or piece.added < len(self._due):
            return None
        del self._pieces[index]
        return self._sent(piece, piece.total)

    def _sent(self, piece: _Piece, total: Floats) -> bytes:
        if not piece.place:
            return total.astype("<f4", copy=False).tobytes()
        owed = self._owed.setdefault(piece.place, np.zeros(len(total), np.float32))
        if piece.bf16:
            return rounded_with_feedback(total, owed).astype("<u2", copy=False).tobytes()
        total = total + owed
        owed[:] = 0
        return total.astype("<f4", copy=False).tobytes()


def _numbers(data: bytes, *, bf16: bool) -> Floats:
    return widened(np.frombuffer(data, "<u2")) if bf16 else np.frombuffer(data, "<f4")


class _Outbox:
    """Totals on their way to one member; nobody waits for it, in case that it takes nothing in."""

    def __init__(self, link: WorkerLink) -> None:
        self.link = link
        self._waiting: deque[Total] = deque()
        self.sending: asyncio.Task[None] | None = None

    def put(self, total: Total) -> None:
        self._waiting.append(total)
        if self.sending is None or self.sending.done():
            self.sending = asyncio.create_task(self._send())

    def clear(self) -> None:
        self._waiting.clear()

    async def _send(self) -> None:
        # Whoever listens to a member hears that it is gone.
        with contextlib.suppress(TandemError, TimeoutError):
            while self._waiting:
                async with asyncio.timeout(SILENCE_SECONDS):
                    # Nothing comes between: a total is never sent as if it were of a newer generation.
                    await self.link.send(self._waiting.popleft())


class Adding:
    """Adds up for the groups of one crew, one after another."""

    def __init__(self) -> None:
        self._outboxes: dict[str, _Outbox] = {}
        self._sums: StreamSums | None = None
        self._ranks: dict[str, int] = {}

    def expect(self, machine: str, link: WorkerLink, part: RingPart) -> None:
        """A machine's worker is about to join a group."""
        if part.backend == "grpc":
            self._sums = self._sums or StreamSums(part.size)
            self._ranks[machine] = part.rank
            known = self._outboxes.get(machine)
            if known is None or known.link is not link:
                self._outboxes[machine] = _Outbox(link)

    def forget(self) -> None:
        """The group is over: nothing more is added up or sent."""
        self._sums = None
        self._ranks = {}
        for outbox in self._outboxes.values():
            outbox.clear()

    def take(self, machine: str, addend: Addend) -> None:
        """Take in what a worker adds; whoever completes a sum has it sent to all. Pieces of no group are dropped.

        Raises:
            NotAddable: see ``StreamSums``.
        """
        if self._sums is None or machine not in self._ranks:
            return
        data = self._sums.add(self._ranks[machine], addend)
        if data is not None:
            for member in self._ranks:
                self._outboxes[member].put(Total(addend.step, addend.index, data))

    async def close(self) -> None:
        """Send nothing more."""
        self.forget()
        tasks = [outbox.sending for outbox in self._outboxes.values() if outbox.sending is not None]
        if tasks:
            # What is half sent goes out whole where it can: to break it off would break the connection.
            _, late = await asyncio.wait(tasks, timeout=CLOSING_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
