"""The reduction over several ranks: the numbers of a step, packed for whatever adds them up over the group.

What is added up is fp32, in buckets of at most 256 MB, in the order in which the backward pass knows the gradients:
``[loss, tokens (two numbers), digests of the ranks' states, gradients …]``. Where all fits into one bucket and is worth
it, it is added up in a few runs, each as soon as it is computed, while the rest of the backward pass goes on. The
worker waits with a deadline, and gives up at once when a newer generation is heard of; the group is then left, and
nothing of the step has been applied.

In a group whose ``gradient_dtype`` is bf16 the gradients, and nothing else, are rounded on their way, and what that
keeps back is added the next time. A group begins with nothing owed, and a step whose state is to be saved pays all.

Rounds of local steps go the same way, once for all of a round's steps: ``[loss, tokens (two numbers) of each step,
digests, changes of the weights …]``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from node.events import Event, Synchronised
from node.info import GradientDtype
from node.runs import BUCKET_FLOATS, run_count
from node.spec import RingSpec, Share
from node.worker.adder import Adder, Floats, Limit, ReductionFailed, Rounding
from node.worker.rounds import LocalStep, RoundSums
from node.worker.trainer import Arrays, Published, Trainer, to_ask_for

# Counts go as two numbers below this and their multiples: fp32 holds whole numbers up to 2**24 exactly.
COUNT_BASE = 4096
DIGEST_WORDS = 3
DIGEST_WORD_BYTES = 3
LOSS_AND_COUNT = 3


class Ring:
    """A group that this worker is a rank of; see ``trainer.Reduction``. Made by ``join``."""

    def __init__(self, spec: RingSpec, adder: Adder, trainer: Trainer, emit: Callable[[Event], None]) -> None:
        self._spec = spec
        self._adder = adder
        self._trainer = trainer
        self._emit = emit
        self._share = Share(0, ())

    @classmethod
    def join(
        cls,
        spec: RingSpec,
        trainer: Trainer,
        make_adder: Callable[[int, int], Adder],
        emit: Callable[[Event], None],
        started: Callable[[Ring], None],
    ) -> Ring:
        """Form the group.

        Args:
            spec: this rank's view of it.
            trainer: whose gradients and state are reduced.
            make_adder: what adds up at most so many numbers at once, and so many in a step whose gradients are rounded.
            emit: takes ``Synchronised``.
            started: told of the ring before it has formed, to kill it from elsewhere.

        Raises:
            ReductionFailed: the group did not form.
        """
        state = trainer.published()
        most = sum(array.size for array in state.parameters.values())
        most += LOSS_AND_COUNT * trainer.local_steps + DIGEST_WORDS * spec.size
        adder = make_adder(min(BUCKET_FLOATS, most), most if spec.gradient_dtype == "bf16" else 0)
        ring = cls(spec, adder, trainer, emit)
        started(ring)
        try:
            adder.form(spec, _layout(state, spec.gradient_dtype))
        except ReductionFailed:
            ring.kill()
            raise
        return ring

    def prepare(self, share: Share) -> None:
        """Say of which step the next reduction is."""
        self._share = share

    def __call__(
        self, gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]
    ) -> tuple[Arrays, float, int]:
        """See ``trainer.Reduction``; gradients come back as fp32.

        Raises:
            ReductionFailed: there is no sum.
        """
        spec, size = self._spec, self._spec.size
        rounds = spec.gradient_dtype == "bf16"
        # Where gradients are rounded each has its place in all steps.
        head = np.zeros(LOSS_AND_COUNT + (DIGEST_WORDS * size if self._share.check or rounds else 0), np.float32)
        exact = len(head) if rounds else None
        shapes = {name: gradient.shape for name, gradient in gradients.items()}
        runs = _runs(
            {name: gradient.size for name, gradient in gradients.items()}, len(self._adder.numbers) - len(head)
        )
        first = [gradients[name] for name in runs[0]]
        mx.async_eval(loss, *to_ask_for(first))  # type: ignore[no-untyped-call]
        del first
        if self._share.check:
            self._tell_state(head[LOSS_AND_COUNT:])
        head[1:LOSS_AND_COUNT] = (tokens // COUNT_BASE, tokens % COUNT_BASE)
        if len(runs) > 1:
            sums = _Reader(iter([self._sum_meanwhile(head, loss, gradients, runs, exact, computed)]))
        else:
            head[0] = loss.item()
            mx.eval(gradients)
            computed()
            sums = _Reader(self._sum(_numbers(head, gradients), self._limit(), exact))
        head = sums.take(len(head)).copy()
        summed = dict(sums.arrays(shapes))
        if self._share.check:
            self._compare(head[LOSS_AND_COUNT:])
        return summed, float(head[0]), int(head[1]) * COUNT_BASE + int(head[2])

    def close_round(self, changes: Arrays, steps: Sequence[LocalStep]) -> RoundSums:
        """See ``trainer.RoundReduction``.

        Raises:
            ReductionFailed: there are no sums.
        """
        spec, most = self._spec, LOSS_AND_COUNT * self._trainer.local_steps
        # As long for a short round as for a whole one: where changes are rounded each has its place in all rounds.
        head = np.zeros(most + DIGEST_WORDS * spec.size, np.float32)
        for index, step in enumerate(steps):
            figures = (step.loss, step.tokens // COUNT_BASE, step.tokens % COUNT_BASE)
            head[LOSS_AND_COUNT * index : LOSS_AND_COUNT * (index + 1)] = figures
        if self._share.check:
            self._tell_state(head[most:])
        shapes = {name: change.shape for name, change in changes.items()}
        exact = len(head) if spec.gradient_dtype == "bf16" else None
        sums = _Reader(self._sum(_numbers(head, changes), self._limit(), exact))
        head = sums.take(len(head)).copy()
        summed = dict(sums.arrays(shapes))
        if self._share.check:
            self._compare(head[most:])
        figures_of = head[: LOSS_AND_COUNT * len(steps)].reshape(len(steps), LOSS_AND_COUNT).tolist()
        counts = [int(high) * COUNT_BASE + int(low) for _, high, low in figures_of]
        return RoundSums(summed, [loss for loss, _, _ in figures_of], counts, spec.size)

    def sums(self, arrays: Arrays) -> Iterator[tuple[str, mx.array]]:
        """See ``trainer.RoundReduction``; nothing is rounded.

        Raises:
            ReductionFailed: there are none.
        """
        shapes = {name: array.shape for name, array in arrays.items()}
        return _Reader(self._sum(_numbers(None, arrays), self._limit())).arrays(shapes)

    def kill(self) -> None:
        """Leave the group at once, and end what was begun for it. May be called twice."""
        self._adder.kill()

    def kill_process(self) -> None:
        """See ``Adder``."""
        self._adder.kill_process()

    def _limit(self) -> Limit:
        """Of this step's sums, from now."""
        return Limit.of(self._share.wait_seconds or self._spec.wait_seconds)

    def _sum_meanwhile(
        self,
        head: Floats,
        loss: mx.array,
        gradients: Arrays,
        names: list[list[str]],
        exact: int | None,
        computed: Callable[[], None],
    ) -> Floats:
        """The sums of all numbers, each run of them begun as soon as it is computed; the first run is under way."""
        runs = [[gradients.pop(name).astype(mx.float32).reshape(-1) for name in run] for run in names]
        # A GPU has the next run to compute while this one is handed over. On the CPU nothing is gained by that, and MLX
        # lets nobody go on who has asked for more than a little.
        ahead = 1 if mx.default_device().type == mx.gpu else 0
        asked, place = 0, 0
        for index, run in enumerate(runs):
            for later in runs[asked : index + ahead + 1]:
                mx.async_eval(*to_ask_for(later))  # type: ignore[no-untyped-call]
            asked = index + ahead + 1
            first = place
            if index == 0:
                head[0] = loss.item()
                self._adder.numbers[: len(head)] = head
                place = len(head)
            while run:
                piece = np.asarray(run.pop(0))
                self._adder.numbers[place : place + len(piece)] = piece
                place += len(piece)
            self._adder.begin(first, place - first, self._share.step, self._rounding(first, exact))
        computed()
        limit = self._limit()
        for _ in runs:
            self._adder.finish(limit)
        return self._adder.numbers[:place]

    def _sum(self, numbers: Iterator[Floats], limit: Limit, exact: int | None = None) -> Iterator[Floats]:
        """Sums over all ranks, bucket after bucket, of the numbers that are given in pieces.

        Each is good until the next one is asked for: it lies where the adder has them.

        Args:
            numbers: to add up.
            limit: of each bucket's sum.
            exact: all but the first so many are rounded on their way; None rounds nothing.
        """
        bucket, filled, place = self._adder.numbers, 0, 0

        def add() -> Floats:
            nonlocal filled, place
            self._adder.add(filled, self._share.step, limit, self._rounding(place, exact))
            total = bucket[:filled]
            filled, place = 0, place + filled
            return total

        for piece in numbers:
            done = 0
            while done < len(piece):
                count = min(len(piece) - done, len(bucket) - filled)
                bucket[filled : filled + count] = piece[done : done + count]
                done, filled = done + count, filled + count
                if filled == len(bucket):
                    yield add()
        if filled:
            yield add()

    def _rounding(self, first: int, exact: int | None) -> Rounding | None:
        """Of numbers from this one on, where all but the first ``exact`` of a step are rounded on their way."""
        return None if exact is None else Rounding(first, max(0, exact - first), self._share.settle)

    def _tell_state(self, words: Floats) -> None:
        """Put the digest of this rank's state where the others look for it."""
        first = DIGEST_WORDS * self._spec.rank
        words[first : first + DIGEST_WORDS] = _words(_state_digest(self._trainer.shared()))

    def _compare(self, words: Floats) -> None:
        """See from all ranks' digests whether they have the same state, and have them take one if not."""
        digests = words.reshape(self._spec.size, DIGEST_WORDS)
        if (digests != digests[0]).any():
            self._synchronise(differs=bool((digests[self._spec.rank] != digests[0]).any()))

    def _synchronise(self, *, differs: bool) -> None:
        """All ranks take rank 0's state; who had another one says so."""
        mine = self._trainer.shared()
        zeros = self._spec.rank != 0
        groups = (dict(sorted(mine.parameters.items())), dict(sorted(mine.moments.items())))
        arrays = [array for group in groups for array in group.values()]
        limit = Limit.of(self._spec.wait_seconds)
        sums = self._sum((_bits(array) * (0 if zeros else 1) for array in arrays), limit)
        if not differs:
            for _ in sums:  # what this rank gives is wanted, what comes back it has
                pass
            return
        taken = _Reader(sums)
        theirs = [_from_bits(taken.take(_bit_count(array)), array) for array in arrays]
        difference = max((_difference(ours, other) for ours, other in zip(arrays, theirs, strict=True)), default=0.0)
        names = [list(group) for group in groups]
        parameters = dict(zip(names[0], theirs, strict=False))
        moments = dict(zip(names[1], theirs[len(names[0]) :], strict=True))
        self._trainer.adopt(Published(mine.step, parameters, moments))
        self._emit(Synchronised(self._share.step, difference))


class _Reader:
    """Takes runs of numbers from pieces of any length, each of them good until the next one is asked for."""

    def __init__(self, pieces: Iterator[Floats]) -> None:
        self._pieces = pieces
        self._rest = np.zeros(0, np.float32)

    def take(self, count: int) -> Floats:
        """The next so many numbers: good until more are taken."""
        if count <= len(self._rest):
            taken, self._rest = self._rest[:count], self._rest[count:]
            return taken
        whole = np.empty(count, np.float32)
        done = 0
        while done < count:
            if not len(self._rest):
                self._rest = next(self._pieces)
            part = self._rest[: count - done]
            whole[done : done + len(part)] = part
            done, self._rest = done + len(part), self._rest[len(part) :]
        return whole

    def arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, mx.array]]:
        """The next arrays of these shapes, one by one."""
        for name, shape in shapes.items():
            yield name, mx.array(self.take(int(np.prod(shape, dtype=np.int64)))).reshape(shape)


def digest(parameters: Arrays) -> str:
    """SHA-256 over names and bytes of arrays, in order of name."""
    return _hash(parameters).hexdigest()


def _hash(*groups: Arrays) -> hashlib._Hash:
    found = hashlib.sha256()
    for group in groups:
        for name in sorted(group):
            found.update(name.encode() + b"\0")
            found.update(memoryview(group[name].reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
    return found


def _state_digest(state: Published) -> bytes:
    return _hash(state.parameters, state.moments).digest()


def _layout(state: Published, gradient_dtype: GradientDtype) -> int:
    """A number below 2**24 that stands for a state's arrays, by names, shapes and types, and for how they are sent."""
    arrays = [(name, array) for group in (state.parameters, state.moments) for name, array in sorted(group.items())]
    text = "\n".join(f"{name} {array.shape} {array.dtype}" for name, array in arrays)
    if gradient_dtype == "bf16":
        text += "\ngradients bf16"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:DIGEST_WORD_BYTES], "big")


def _words(found: bytes) -> list[float]:
    """The first bytes of a digest as whole numbers that fp32 holds exactly."""
    starts = range(0, DIGEST_WORDS * DIGEST_WORD_BYTES, DIGEST_WORD_BYTES)
    return [float(int.from_bytes(found[start : start + DIGEST_WORD_BYTES], "big")) for start in starts]


def _runs(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Names of gradients, in their order, cut where about equal parts end.

    A single run where parts would be too small, or where there is no room for all at once.

    Args:
        sizes: numbers of each.
        room: for how many numbers there is.
    """
    total = sum(sizes.values())
    count = 1 if total > room else run_count(total)
    runs: list[list[str]] = [[]]
    done = 0
    for name, size in sizes.items():
        if done >= total * len(runs) / count:
            runs.append([])
        runs[-1].append(name)
        done += size
    return runs


def _numbers(head: Floats | None, gradients: Arrays) -> Iterator[Floats]:
    """What is added up, piece by piece; the mapping is emptied, so that a used gradient's memory is free."""
    if head is not None:
        yield head
    for name in list(gradients):
        gradient = gradients.pop(name).astype(mx.float32).reshape(-1)
        mx.eval(gradient)
        yield np.asarray(gradient)


def _bits(array: mx.array) -> Floats:
    """Any array as fp32 whole numbers below 2**16, two bytes each; an odd last byte stands alone."""
    data = np.asarray(array.reshape(-1).view(mx.uint8))
    if len(data) % 2:
        data = np.append(data, np.uint8(0))
    return data.view("<u2").astype(np.float32)


def _bit_count(array: mx.array) -> int:
    return (array.nbytes + 1) // 2


def _from_bits(numbers: Floats, like: mx.array) -> mx.array:
    data = numbers.astype("<u2").view(np.uint8)[: like.nbytes]
    return mx.array(data).view(like.dtype).reshape(like.shape)


def _difference(ours: mx.array, theirs: mx.array) -> float:
    """Relative difference (L2) of two arrays."""
    one, other = ours.astype(mx.float32), theirs.astype(mx.float32)
    gap, size = mx.sqrt(mx.square(one - other).sum()).item(), mx.sqrt(mx.square(other).sum()).item()
    value = float(gap) / max(float(size), 1e-12)  # type: ignore[arg-type]
    return math.inf if math.isnan(value) else value
