"""However a batch is divided, the numbers are those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from node.events import ComputeStarted, ReduceEntered
from node.spec import OptimizerSpec, Rows, Share, TuningSpec
from node.worker.trainer import Arrays, Published, alone
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, as_rows, difference, random_batches

TOLERANCE = 1e-5
STEPS = 4
BATCHES = random_batches(STEPS, rows=8, masked=True, seed=4)
LORA = TuningSpec(num_layers=-1, rank=4, scale=10.0)
NOISY = replace(LORA, dropout=0.3, neftune_alpha=5.0)
ADAM = OptimizerSpec(learning_rate=1e-4)
SGD = OptimizerSpec(name="sgd", learning_rate=1e-3, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


class Ranks:
    """Several trainers as the ranks of one group: each works on its own share, the reduction adds all of them."""

    def __init__(self, count: int, *arguments: Any, **options: Any) -> None:
        self._sums: list[tuple[Arrays, mx.array, int]] = []
        self._complete = False
        self.ranks = [InProcess(*arguments, reduce=self._reduce, **options) for _ in range(count)]

    def _reduce(
        self, gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]
    ) -> tuple[Arrays, float, int]:
        mx.eval(gradients, loss)
        computed()
        if not self._complete:
            self._sums.append((gradients, loss, tokens))
        total = {name: sum((part[0][name] for part in self._sums), mx.array(0.0)) for name in gradients}
        return total, sum(float(part[1]) for part in self._sums), sum(part[2] for part in self._sums)

    def step(self, *shares: Sequence[Rows]) -> None:
        """First every rank's sums, from which nothing is kept; then the step, with all sums known."""
        number = self.ranks[0].trainer.step + 1
        self._sums, self._complete = [], False
        for rank, share in zip(self.ranks, shares, strict=True):
            before = rank.trainer.published()
            rank.trainer.run(Share(number, tuple(share)))
            rank.trainer.restore(before)
        self._complete = True
        for rank, share in zip(self.ranks, shares, strict=True):
            rank.step(*share)


def part(rows: Rows, *picked: int) -> Rows:
    """Some rows, padded no more than they need."""
    return rows.take(list(picked), int(rows.lengths[list(picked)].max()) - 1)


def assert_equal(one: InProcess, other: InProcess) -> None:
    assert one.losses == pytest.approx(other.losses, abs=TOLERANCE)
    assert one.grad_norms == pytest.approx(other.grad_norms, rel=TOLERANCE)
    assert difference(one.weights, other.weights) < TOLERANCE


CASES = {
    "dropout": (replace(LORA, dropout=0.3), ADAM),
    "neftune": (replace(LORA, neftune_alpha=5.0), ADAM),
    "both": (NOISY, SGD),
    "dora": (replace(NOISY, fine_tune_type="dora"), ADAM),
    "checkpointed": (replace(NOISY, grad_checkpoint=True), ADAM),
    "full": (replace(LORA, fine_tune_type="full", neftune_alpha=5.0), ADAM),
}


@pytest.mark.parametrize("case", CASES)
def test_division_changes_nothing(model: Path, case: str) -> None:
    spec, optimizer = CASES[case]
    whole = InProcess(model, spec, optimizer, seed=7)
    pieces = InProcess(model, spec, optimizer, seed=7)
    ranks = Ranks(2, model, spec, optimizer, seed=7)
    for batch in BATCHES:
        rows = as_rows(batch, extra_padding=5)
        whole.step(rows)
        pieces.step(part(rows, 4, 1, 6), part(rows, 0), part(rows, 2, 3, 5, 7))
        ranks.step([part(rows, 0, 1, 2)], [part(rows, 3, 5), part(rows, 4, 6, 7)])
    assert_equal(pieces, whole)
    for rank in ranks.ranks:
        assert_equal(rank, whole)
    assert difference(*[rank.weights for rank in ranks.ranks]) == 0
    # The noise is there, or there would be nothing to prove.
    silent = InProcess(model, replace(spec, dropout=0.0, neftune_alpha=0.0), optimizer, seed=7)
    silent.step(as_rows(BATCHES[0]))
    silent.step(as_rows(BATCHES[1]))
    assert abs(silent.losses[1] - whole.losses[1]) > 10 * TOLERANCE


def test_a_rank_without_rows_applies_the_same_step(model: Path) -> None:
    whole = InProcess(model, NOISY, ADAM)
    ranks = Ranks(2, model, NOISY, ADAM)
    for batch in BATCHES:
        whole.step(as_rows(batch))
        ranks.step([], [as_rows(batch)])
    for rank in ranks.ranks:
        assert_equal(rank, whole)


def test_sums_come_in_the_order_in_which_they_are_computed(model: Path) -> None:
    """Ranks with different histories must agree on it: a merge of trees, as LoRA+ makes, orders them at random."""
    orders: list[list[str]] = []

    def reduce(
        gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]
    ) -> tuple[Arrays, float, int]:
        orders.append(list(gradients))
        return alone(gradients, loss, tokens, computed)

    run = InProcess(model, NOISY, replace(ADAM, loraplus_ratio=4.0), reduce=reduce).run(BATCHES[:2])
    run.trainer.restore(replace(run.trainer.published(), parameters=dict(reversed(run.weights.items()))))
    run.run(BATCHES[2:3])
    run.step()
    last, first = (sorted(name for name in run.weights if f".{block}." in name) for block in (1, 0))
    assert orders == [[*last, *first]] * 4


def test_the_reduction_may_be_replaced_between_steps(model: Path) -> None:
    def twice(
        gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]
    ) -> tuple[Arrays, float, int]:
        total, value, count = alone(gradients, loss, tokens, computed)
        return {name: 2 * gradient for name, gradient in total.items()}, 2 * value, 2 * count

    plain, replaced = InProcess(model, LORA, ADAM).run(BATCHES), InProcess(model, LORA, ADAM).run(BATCHES[:1])
    replaced.trainer.reduce = twice
    replaced.run(BATCHES[1:])
    assert [done.tokens for done in replaced.done[1:]] == [2 * done.tokens for done in plain.done[1:]]
    assert_equal(plain, replaced)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_is_a_bigger_batch(model: Path, method: Any) -> None:
    spec = replace(NOISY, fine_tune_type=method)
    big = InProcess(model, spec, SGD).run([[*a, *b] for a, b in zip(BATCHES[::2], BATCHES[1::2], strict=True)])
    accumulated = InProcess(model, spec, SGD).run(BATCHES, accumulation=2)
    assert len(big.losses) == 2
    assert_equal(accumulated, big)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_grad_checkpoint_changes_nothing(model: Path, dropout: float) -> None:
    """The recomputed forward pass of the backward pass must draw the same dropout."""
    plain = InProcess(model, replace(LORA, dropout=dropout), SGD).run(BATCHES)
    lean = InProcess(model, replace(LORA, dropout=dropout, grad_checkpoint=True), SGD).run(BATCHES)
    assert_equal(lean, plain)


def test_noise_depends_on_seed_step_and_row(model: Path) -> None:
    frozen = OptimizerSpec(name="sgd", learning_rate=0.0)
    rows = as_rows(BATCHES[0])

    def losses(seed: int, *steps: Rows) -> list[float]:
        run = InProcess(model, replace(LORA, neftune_alpha=50.0), frozen)
        run.trainer._seed = seed
        for step in steps:
            run.step(step)
        return run.losses

    first, second = losses(1, rows, rows)
    assert abs(first - second) > 1e-3
    assert losses(1, rows) == [first]
    assert abs(losses(2, rows)[0] - first) > 1e-3
    assert abs(losses(1, as_rows(BATCHES[0], first_id=8))[0] - first) > 1e-3


def test_restoring_and_going_on_is_bitwise_the_same(model: Path) -> None:
    there = InProcess(model, NOISY, ADAM).run(BATCHES[:2])
    state: Published = there.trainer.published()
    there.run(BATCHES[2:])
    again = InProcess(model, NOISY, ADAM)
    again.trainer.restore(state)
    assert again.trainer.step == 2
    again.run(BATCHES[2:])
    assert again.losses == there.losses[2:]
    assert difference(again.weights, there.weights) == 0
    # What was published is a state of its own: the steps after it have not touched it.
    assert difference(state.parameters, there.weights) > 0


def test_a_step_without_targets_changes_nothing(model: Path) -> None:
    run = InProcess(model, NOISY, SGD)
    before = run.weights
    done = run.step(as_rows([([5, 6, 7], []), ([8, 9], [])]))
    assert (done.loss_sum, done.tokens, done.grad_norm) == (0.0, 0, 0.0)
    assert difference(run.weights, before) == 0


def test_what_a_step_reports(model: Path) -> None:
    run = InProcess(model)
    rows = [as_rows(BATCHES[0], extra_padding=2), as_rows(BATCHES[1], first_id=8)]
    done = run.step(*rows)
    assert done.step == 1
    assert done.tokens == rows[0].target_tokens + rows[1].target_tokens
    assert done.padded_tokens == 8 * (rows[0].padded_length + rows[1].padded_length)
    assert 0 < done.compute_seconds + done.wait_seconds <= done.seconds
    assert done.peak_memory_bytes > 0
    assert run.events == [ComputeStarted(1), ReduceEntered(1)]


@pytest.mark.parametrize(("threshold", "cleared"), [(0, False), (1 << 20, True), (1 << 40, False)])
def test_the_cache_is_cleared_above_its_threshold(model: Path, threshold: int, cleared: bool) -> None:
    run = InProcess(model)
    run.trainer._clear_cache_threshold = threshold
    mx.clear_cache()
    large = mx.arange(1 << 23)
    mx.eval(large)
    del large
    assert mx.get_cache_memory() >= 4 << 23
    run.step(as_rows(BATCHES[0]))
    assert (mx.get_cache_memory() < 2 << 23) == cleared
