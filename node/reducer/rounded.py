"""Add up numbers that are rounded to bf16 on their way; what each rounding keeps back is remembered for the next time.

MLX's own ``all_sum`` of bf16 rounds at each hop, and nobody learns what that took. Here each rank rounds each number
once, on handing its sum on to the next rank, and remembers what it kept back. So all that is lost is paid later, no
matter who rounded, in as many turns as an fp32 ring takes and with half of its bytes.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class _Way:
    """One way around the ring, with the part of the numbers that goes this way: a segment for each rank.

    Args:
        group: of ``mx.distributed``.
        step: 1 to the next rank, -1 to the previous one.
        due: (n,) fp32, what is to be added up, n a multiple of the number of ranks.
        head: (m,) fp32, added up with the first segment and never rounded.
        streams: of the CPU, to send and to receive on at the same time.
    """

    def __init__(self, group: Any, step: int, due: mx.array, head: mx.array, streams: tuple[Any, Any]) -> None:
        self._group = group
        self._size, self._rank = group.size(), group.rank()
        self._step = step
        self._parts = list(due.reshape(self._size, -1))
        self._owed = [mx.array(0.0)] * self._size
        self._head = head
        self._sending, self._receiving = streams
        self._rounded: list[mx.array] = [mx.array(0.0)] * self._size

    @property
    def total(self) -> mx.array:
        """(n,) the sums, fp32."""
        return mx.concatenate([part.astype(mx.float32) for part in self._rounded])

    @property
    def owed(self) -> mx.array:
        """(n,) what this rank kept back."""
        return mx.concatenate(self._owed)

    @property
    def head(self) -> mx.array:
        """(m,) the sums of the numbers that are not rounded."""
        return self._head

    def turn(self, number: int) -> list[mx.array]:
        """Begin one of ``2 * (size - 1)`` turns; what is returned has to be evaluated, then ``took`` called."""
        around = self._step * number
        if number < self._size:  # the last time is for the rank's own segment, which is whole then
            self._round((self._rank - around) % self._size)
        outgoing, incoming = (self._rank - around) % self._size, (self._rank - around - self._step) % self._size
        message = self._rounded[outgoing].view(mx.uint16)
        if outgoing == 0 and self._head.size:
            message = mx.concatenate([self._head.view(mx.uint16), message])
        length = self._parts[incoming].size + (2 * self._head.size if incoming == 0 else 0)
        mx.eval(message)
        onward, back = (self._rank + self._step) % self._size, (self._rank - self._step) % self._size
        self._sent = mx.distributed.send(message, onward, group=self._group, stream=self._sending)
        self._got = mx.distributed.recv((length,), mx.uint16, back, group=self._group, stream=self._receiving)
        self._incoming = incoming
        return [self._sent, self._got]

    def took(self, number: int) -> None:
        """End a turn."""
        incoming, got = self._incoming, self._got
        before = got.size - self._parts[incoming].size
        part = got[before:].view(mx.bfloat16)
        adds = number < self._size - 1
        if adds:
            self._parts[incoming] = part.astype(mx.float32) + self._parts[incoming]
        else:
            self._rounded[incoming] = part
        if before:
            head = got[:before].view(mx.float32)
            self._head = head + self._head if adds else head

    def _round(self, segment: int) -> None:
        due = self._parts[segment]
        self._rounded[segment] = due.astype(mx.bfloat16)
        kept_back = due - self._rounded[segment].astype(mx.float32)
        # What is not finite owes nothing: it would spoil every step after it.
        self._owed[segment] = mx.where(mx.isfinite(kept_back), kept_back, 0)


class RoundedSums:
    """Rounded sums of one group.

    Args:
        group: of ``mx.distributed``, of at least two ranks.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        # Two ranks have one link, whose two directions one way around fills; of more, both ways use different ones.
        steps = (1,) if group.size() == 2 else (1, -1)
        self._ways = [(step, (mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))) for step in steps]

    def add_up(self, numbers: Any, owed: Any, exact: int) -> None:
        """Replace numbers by their sums over all ranks: the same bits on each.

        Args:
            numbers: a memoryview of floats.
            owed: as many: what rounding has kept back of each so far; it is added, and what is kept back now put there.
            exact: so many numbers at the beginning are not rounded.

        Raises:
            RuntimeError: a neighbour is gone.
        """
        with mx.stream(mx.cpu):
            ways = self._begin(numbers, owed, exact)
            for number in range(2 * (self._group.size() - 1)):
                mx.eval([way.turn(number) for way in ways])
                for way in ways:
                    way.took(number)
            count = len(numbers) - exact
            total = mx.concatenate([way.total for way in ways])[:count]
            kept_back = mx.concatenate([way.owed for way in ways])[:count]
            mx.eval(total, kept_back, ways[0].head)
        if exact:
            numbers[:exact] = _view(ways[0].head)
        numbers[exact:], owed[exact:] = _view(total), _view(kept_back)

    def _begin(self, numbers: Any, owed: Any, exact: int) -> list[_Way]:
        parts, none = len(self._ways), mx.zeros(0)
        padding = -(len(numbers) - exact) % (parts * self._group.size())
        due = mx.pad(mx.array(numbers[exact:]) + mx.array(owed[exact:]), (0, padding)).reshape(parts, -1)
        heads = [mx.array(numbers[:exact]) if exact else none, *[none] * (parts - 1)]
        return [
            _Way(self._group, step, part, head, streams)
            for (step, streams), part, head in zip(self._ways, due, heads, strict=True)
        ]


def _view(array: mx.array) -> Any:
    return memoryview(array)  # type: ignore[arg-type]
