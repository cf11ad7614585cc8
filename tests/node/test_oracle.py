from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from tests.fixtures.models import tiny_model
from tests.fixtures.oracle import Batch, mean_loss, number, oracle_loss, oracle_run, pad

BATCH: Batch = [([5, 6, 7, 8, 9, 10, 11], 0), ([30, 40, 50, 60], 2)]


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_loss_falls_on_a_repeated_batch(tmp_path: Path, method: str) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    run = oracle_run(model, [BATCH] * 6, fine_tune_type=method, learning_rates=1e-2)
    assert run.losses[-1] < run.losses[0] - 0.5
    assert set(run.weights) == set(run.initial_weights)
    assert any(not mx.array_equal(run.weights[name], run.initial_weights[name]) for name in run.weights)


def test_quantized_base_trains_adapters_only(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", quantize=4)
    run = oracle_run(model, [BATCH] * 3, learning_rates=1e-2)
    assert run.losses[-1] < run.losses[0]
    assert all("lora_" in name for name in run.weights)


def test_padding_is_no_target(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    model = load(str(folder))[0]
    total = 0.0
    for row, count in zip(BATCH, (6, 2), strict=True):
        inputs, mask = pad([row])
        assert number(mask.sum()) == count
        total += number(mean_loss(model, inputs, mask)) * count
    assert number(mean_loss(model, *pad(BATCH))) == pytest.approx(total / 8, abs=1e-5)
    loss, tokens = oracle_loss(folder, BATCH)
    assert loss == pytest.approx(total / 8, abs=1e-5)
    assert tokens == 8


def test_accumulated_batches_weigh_by_tokens(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    whole = oracle_run(folder, [BATCH, BATCH], learning_rates=[1e-4, 1e-4])
    rows = [[row] for row in BATCH]
    parts = oracle_run(folder, rows + rows, learning_rates=[1e-4, 1e-4], accumulation=2)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    assert parts.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)


def test_spans_choose_targets() -> None:
    _, mask = pad([([1, 2, 3, 4, 5], [(1, 2), (4, 5)]), ([1, 2, 3], 0)])
    assert mask.tolist() == [[True, False, False, True], [True, True, False, False]]
