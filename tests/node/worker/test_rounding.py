"""Sums whose numbers cross the wire as bf16, by both ways of adding up: nothing that rounding keeps back is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from node.bf16 import rounded, rounded_with_feedback, widened
from node.info import Backend
from node.spec import PIECES_IN_FLIGHT
from node.worker import streams
from node.worker.adder import Adder, Floats, Limit, Rounding
from node.worker.reducer import Interrupt, ReducerAdder
from tests.fixtures.adding import Post
from tests.fixtures.ranks import ring_specs

SECONDS = 30.0
HEAD = 9
EXACT = [0.1, 1001.0, 4095.0, *[16777215.0] * (HEAD - 3)]
"""What bf16 does not hold."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE_FLOATS", 64)


class Group:
    """Adders of one group, each used from a thread of its own."""

    def __init__(self, adders: Sequence[Adder], pool: ThreadPoolExecutor) -> None:
        self.adders = adders
        self._pool = pool

    def all(self, work: Callable[[int, Adder], object]) -> None:
        """Have all ranks do this at once."""
        for done in [self._pool.submit(work, rank, adder) for rank, adder in enumerate(self.adders)]:
            done.result(SECONDS)

    def sum(self, gradients: Sequence[Floats], *, settle: bool = False, buckets: int = 1) -> list[Floats]:
        """The sums on each rank of these gradients, with ``EXACT`` before them, added up in so many sums."""
        totals: list[Floats] = [np.zeros(0, np.float32)] * len(self.adders)

        def one(rank: int, adder: Adder) -> None:
            numbers = np.concatenate([np.array(EXACT, np.float32), gradients[rank]])
            size, found = -(-len(numbers) // buckets), []
            for place in range(0, len(numbers), size):
                part = numbers[place : place + size]
                adder.numbers[: len(part)] = part
                adder.add(len(part), 1, Limit.of(SECONDS), Rounding(place, max(0, HEAD - place), settle))
                found.append(adder.numbers[: len(part)].copy())
            totals[rank] = np.concatenate(found)

        self.all(one)
        assert {total.tobytes() for total in totals} == {totals[0].tobytes()}, "the same bits on all ranks"
        exact = np.array(EXACT, np.float32)
        expected = exact.copy()
        for _ in self.adders[1:]:
            expected += exact
        assert totals[0][:HEAD].tobytes() == expected.tobytes()
        return [total[HEAD:] for total in totals]


@contextmanager
def group(backend: Backend, size: int, count: int, folder: Path) -> Iterator[Group]:
    """A group that is formed."""
    most = HEAD + count
    bells = [os.pipe() for _ in range(size)]
    if backend == "grpc":
        adders: list[Adder] = list(Post(size, most, owed=most).adders)
    else:
        adders = [ReducerAdder(most, Interrupt(bell, lambda: False), folder / "log", most) for bell, _ in bells]
    with ThreadPoolExecutor(size) as pool:
        made = Group(adders, pool)
        specs = ring_specs(size, backend=backend)
        try:
            made.all(lambda rank, adder: adder.form(specs[rank], 7))
            yield made
        finally:
            for adder in adders:
                adder.kill()
            for pipe in bells:
                for end in pipe:
                    os.close(end)


ways = pytest.mark.parametrize(("backend", "size"), [("ring", 2), ("ring", 3), ("grpc", 2), ("grpc", 3)])


@ways
@pytest.mark.parametrize("count", [1, 2, 7, 64 * (PIECES_IN_FLIGHT + 2) + 5])
def test_a_sum_is_right_to_bf16_rounding(backend: Backend, size: int, count: int, tmp_path: Path) -> None:
    random = np.random.default_rng(count)
    with group(backend, size, count, tmp_path) as made:
        gradients = [random.normal(size=count).astype(np.float32) for _ in range(size)]
        total = made.sum(gradients)[0]
        assert (total == widened(rounded(total))).all()
        largest = sum(np.abs(gradient) for gradient in gradients)
        assert (np.abs(total - sum(gradients)) <= largest * size * 2**-8).all()
        assert (total != sum(gradients)).any()


@ways
def test_what_is_kept_back_is_paid(backend: Backend, size: int, tmp_path: Path) -> None:
    """Numbers that bf16 does not hold, again and again: without feedback all of the steps are off by the same."""
    steps = 1000 if size == 2 else 300  # three reducers wait actively, on however few cores there are
    with group(backend, size, 4, tmp_path) as made:
        # Of different ranks: a total of two alike may be one that bf16 holds.
        gradients = [np.full(4, 1 + (rank + 1) * 2**-10, np.float32) for rank in range(size)]
        expected = sum(gradients)[0]
        got = sum(made.sum(gradients)[0].astype(np.float64) for _ in range(steps)) / steps
        assert abs(float(widened(rounded(np.array([expected], np.float32)))[0]) / expected - 1) > 1e-4
        assert got == pytest.approx(np.full(4, expected), rel=1e-4)


@ways
def test_when_it_is_settled_nothing_is_owed(backend: Backend, size: int, tmp_path: Path) -> None:
    random = np.random.default_rng(size)
    count = 200
    with group(backend, size, count, tmp_path) as made:
        for _ in range(2):  # and the second time from nothing owed
            given = np.zeros(count)
            got = np.zeros(count)
            for step in range(5):
                gradients = [random.normal(size=count).astype(np.float32) for _ in range(size)]
                given += sum(gradient.astype(np.float64) for gradient in gradients)
                got += made.sum(gradients, settle=step == 4, buckets=3)[0]
            assert got == pytest.approx(given, abs=2e-6)


@ways
def test_a_group_begins_with_nothing_owed(backend: Backend, size: int, tmp_path: Path) -> None:
    random = np.random.default_rng(size)
    gradients = [random.normal(size=10).astype(np.float32) for _ in range(size)]
    firsts = []
    for _ in range(2):
        with group(backend, size, 10, tmp_path) as made:
            firsts.append(made.sum(gradients)[0])
            assert (made.sum(gradients)[0] != firsts[-1]).any()
    assert (firsts[0] == firsts[1]).all()


@ways
def test_what_is_not_finite_is_not_owed(backend: Backend, size: int, tmp_path: Path) -> None:
    with group(backend, size, 3, tmp_path) as made:
        bad = np.array([np.inf, np.nan, 3.4e38], np.float32)
        total = made.sum([bad, *[np.zeros(3, np.float32)] * (size - 1)])[0]
        assert str(total.tolist()) == "[inf, nan, inf]"
        for settle in (False, True):
            assert made.sum([np.ones(3, np.float32)] * size, settle=settle)[0].tolist() == [size] * 3


def test_bf16_is_what_mlx_makes_of_it() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    edges = np.array([0, 1 << 31, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000], np.uint32)
    numbers = np.concatenate([bits, edges]).view(np.float32)
    numbers = numbers[~np.isnan(numbers)]
    with np.errstate(all="ignore"):
        assert np.array_equal(rounded(numbers), np.array(mx.array(numbers).astype(mx.bfloat16).view(mx.uint16)))
    assert np.isnan(widened(rounded(np.array([np.nan, -np.nan], np.float32)))).all()
    owed = np.zeros(1, np.float32)
    sent = [float(widened(rounded_with_feedback(np.array([1 + 2**-9], np.float32), owed))[0]) for _ in range(4)]
    assert sum(sent) == 4 * (1 + 2**-9)
    assert set(sent) == {1.0, 1 + 2**-7}
