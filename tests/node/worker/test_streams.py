"""Adding up over streams, rank by rank in threads, with the coordinator's own sums between them."""

from __future__ import annotations

import numpy as np
import pytest

from node.events import Addend
from node.spec import PIECES_IN_FLIGHT, RingSpec, Total
from node.worker import streams
from node.worker.adder import Floats, Limit, ReductionFailed
from node.worker.streams import StreamAdder
from tests.fixtures.adding import SECONDS, Post

PIECE = 4


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PIECE_FLOATS", PIECE)


def spec(rank: int, size: int, token: int = 7) -> RingSpec:
    return RingSpec(rank, size, "grpc", (), (), token, SECONDS, SECONDS)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_are_those_of_the_ranks_in_order(size: int) -> None:
    most = PIECE * (3 * PIECES_IN_FLIGHT) + 3
    post = Post(size, most)
    random = np.random.default_rng(size)
    for step, count in enumerate((1, PIECE, PIECE + 1, most), start=1):
        given = [random.normal(size=count).astype(np.float32) for _ in range(size)]
        expected: Floats = given[0].copy()
        for numbers in given[1:]:
            expected += numbers

        def add(rank: int, adder: StreamAdder, step: int = step, given: list[Floats] = given) -> None:
            count = len(given[rank])
            adder.numbers[:count] = given[rank]
            adder.numbers[count:] = 9.0
            adder.add(count, step, Limit.of(SECONDS))

        assert not any(post.all(add))
        for adder in post.adders:
            assert adder.numbers[:count].tobytes() == expected.tobytes()
            assert (adder.numbers[count:] == 9.0).all()


def test_who_is_in_the_group_is_proven() -> None:
    assert Post(3, 6).all(lambda rank, adder: adder.form(spec(rank, 3), 5)) == ["", "", ""]
    (first, second) = Post(2, 6).all(lambda rank, adder: adder.form(spec(rank, 2), 5 + rank))
    assert "same arrays" in first
    assert "same arrays" in second
    (first, second) = Post(2, 6).all(lambda rank, adder: adder.form(spec(rank, 2, token=7 + rank), 5))
    assert "somebody else" in first
    assert "somebody else" in second


def test_only_so_many_pieces_are_sent_ahead() -> None:
    sent: list[Addend] = []
    adder = StreamAdder(PIECE * 100, sent.append, lambda _: None, lambda: False)
    with pytest.raises(ReductionFailed, match="no sum within 0 s"):
        adder.add(PIECE * 100, 1, Limit.of(0.0))
    assert [addend.index for addend in sent] == list(range(PIECES_IN_FLIGHT))


def test_a_newer_generation_is_told_from_a_deadline() -> None:
    adder = StreamAdder(PIECE, lambda _: None, lambda _: None, lambda: True)
    with pytest.raises(ReductionFailed, match="a newer generation"):
        adder.add(PIECE, 1, Limit.of(SECONDS))


@pytest.mark.parametrize("total", [Total(2, 0, bytes(16)), Total(1, 1, bytes(16)), Total(1, 0, bytes(12))])
def test_a_total_of_something_else_is_refused(total: Total) -> None:
    adder = StreamAdder(PIECE, lambda _: None, lambda _: total, lambda: False)
    with pytest.raises(ReductionFailed, match="16 for piece 0 of step 1 were due"):
        adder.add(PIECE, 1, Limit.of(SECONDS))
