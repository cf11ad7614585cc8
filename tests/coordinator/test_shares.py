"""A step's rows are the same however they are divided."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.data.batches import Batches
from coordinator.data.tokenset import TokenisedChunk, TokenSet, TokenSetWriter
from coordinator.pace import Pace, Speed
from coordinator.program import Program
from coordinator.shares import StepSource, halved
from node.spec import Rows, Share

MAX_SEQ_LENGTH = 300


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """Sixty rows of 2 to 300 tokens with one or two spans."""
    random = np.random.default_rng(3)
    lengths = random.integers(6, MAX_SEQ_LENGTH + 1, 60).astype(np.int32)
    lengths[0] = 2
    spans = [[1, 2] if n < 6 else [1, 2, n // 2, n] for n in lengths.tolist()]
    folder = tmp_path_factory.mktemp("tokens")
    writer = TokenSetWriter(folder, MAX_SEQ_LENGTH)
    writer.add(
        TokenisedChunk(
            tokens=random.integers(0, 1000, int(lengths.sum())).astype(np.int32),
            lengths=lengths,
            spans=np.concatenate(spans).astype(np.int32),
            span_counts=np.array([len(span) // 2 for span in spans], np.int32),
            lines=np.arange(60, dtype=np.int64),
            cut=0,
            dropped=0,
        )
    )
    writer.finish()
    return TokenSet(folder)


def source(tokens: TokenSet, batch_size: int = 8, accumulation: int = 1) -> StepSource:
    program = Program(16, accumulation, 100, 100, 10, validates=False)
    return StepSource(tokens, Batches(tokens.lengths, batch_size, 5), program)


def contents(shares: list[Share]) -> dict[int, tuple[list[int], list[int]]]:
    """Tokens and spans of every row by its number; a number given twice is an error."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for part in (part for share in shares for part in share.micro_batches):
        for index, number in enumerate(part.ids.tolist()):
            assert number not in found
            row = part.take([index], part.padded_length)
            found[number] = (row.tokens.tolist(), row.spans.tolist())
    return found


def parts_of(shares: list[Share]) -> list[Rows]:
    return [part for share in shares for part in share.micro_batches]


@settings(max_examples=40)
@given(
    step=st.integers(1, 5),
    batch_size=st.integers(1, 20),
    accumulation=st.integers(1, 3),
    factors=st.lists(st.floats(0.2, 5), min_size=1, max_size=6),
    limit=st.sampled_from([None, 64, 500, 2000]),
)
def test_shares_hold_what_the_whole_step_holds(
    tokens: TokenSet, step: int, batch_size: int, accumulation: int, factors: list[float], limit: int | None
) -> None:
    steps = source(tokens, batch_size, accumulation)
    whole = [steps.share(step)]
    shares = steps.shares(step, [Pace(Speed(0.01, 1e-4), factor) for factor in factors], [limit] * len(factors))
    assert len(shares) == len(factors)
    assert {share.step for share in shares} == {step}
    assert contents(shares) == contents(whole)
    assert sum(part.target_tokens for part in parts_of(shares)) == sum(part.target_tokens for part in parts_of(whole))
    assert sorted(contents(shares)) == list(range(len(steps.lengths(step))))
    for part in parts_of(shares):
        assert 1 <= len(part.ids) <= batch_size
        assert max(part.lengths) - 1 <= part.padded_length
        assert part.ids.dtype == np.int32
        assert limit is None or len(part.ids) == 1 or len(part.ids) * part.padded_length <= limit


def test_lengths_are_those_of_the_numbered_rows(tokens: TokenSet) -> None:
    steps = source(tokens, 8, 2)
    rows = contents([steps.share(3)])
    assert steps.lengths(3).tolist() == [len(rows[number][0]) for number in range(16)]


def test_more_machines_than_rows_get_nothing(tokens: TokenSet) -> None:
    shares = source(tokens, 2).shares(1, [Pace(Speed(0.01, 1e-4))] * 5)
    assert sum(not share.micro_batches for share in shares) >= 3
    assert len(contents(shares)) == 2


def test_rows_follow_affinity_by_their_id_in_the_data(tokens: TokenSet) -> None:
    batches = Batches(tokens.lengths, 8, 5)
    wanted = {int(row): index % 2 for index, row in enumerate(batches.rows(1))}
    paces = [Pace(Speed(0, 1e-4))] * 2
    free = source(tokens).shares(1, paces)
    asked = source(tokens).shares(1, paces, affinity=wanted)

    def kept(shares: list[Share]) -> int:
        return sum(i % 2 == member for member, share in enumerate(shares) for i in contents([share]))

    assert contents(asked) == contents(free)
    assert kept(asked) >= kept(free)


def test_a_limit_is_halved_until_micro_batches_are_single_rows(tokens: TokenSet) -> None:
    limit: int | None = 64 * tokens.longest
    limits = []
    while (limit := halved(limit, tokens.longest)) is not None:
        limits.append(limit)
    assert limits
    assert all(a // 2 == b for a, b in itertools.pairwise(limits))
    assert limits[-1] // 2 < tokens.longest // 2
    assert halved(0, tokens.longest) is None
