"""Models in half precision train as they are: nothing changes its type, and the losses are those of fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from node.spec import ModelSpec, OptimizerSpec, TuningSpec
from node.worker import tuning
from node.worker.optimizer import CLASSES
from node.worker.trainer import Arrays, alone
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, as_rows, random_batches

BATCHES = random_batches(2) * 2


def types(arrays: dict[str, mx.array]) -> dict[str, Any]:
    return {name: array.dtype for name, array in arrays.items()}


def train(model: Path, method: Any, optimizer: str, accumulation: int) -> InProcess:
    spec = TuningSpec(method, num_layers=-1, dropout=0.1, neftune_alpha=1.0)
    return InProcess(model, spec, OptimizerSpec(optimizer, learning_rate=1e-3)).run(BATCHES, accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str, method: str, accumulation: int) -> None:
    half = tiny_model(tmp_path / "half", "llama", dtype=dtype)
    before = types(dict(tree_flatten(tuning.load(ModelSpec(str(half)))[0].parameters())))
    run = train(half, method, "adam", accumulation)
    exact = train(tiny_model(tmp_path / "exact", "llama"), method, "adam", accumulation)
    assert run.losses == pytest.approx(exact.losses, abs=0.05)
    assert run.losses[-1] != run.losses[0]
    after = types(run.weights)
    if method == "full":
        assert set(after.values()) == {getattr(mx, dtype)}
        assert after.items() <= before.items()
    else:
        assert set(after.values()) == {mx.float32}
    assert types(dict(tree_flatten(run.model.trainable_parameters()))) == after


@pytest.mark.parametrize("optimizer", CLASSES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_optimizer_stays_finite(tmp_path: Path, dtype: str, optimizer: str) -> None:
    run = train(tiny_model(tmp_path / "half", "llama", dtype=dtype), "full", optimizer, 1)
    assert all(mx.isfinite(array).all() for array in run.weights.values())
    assert max(run.losses) < 8
    assert set(types(run.weights).values()) == {getattr(mx, dtype)}


def test_many_micro_batches_are_added_in_fp32(tmp_path: Path) -> None:
    """In bf16 a sum stops growing once it is 256 times its next summand."""
    model = tiny_model(tmp_path / "model", "llama", dtype="bfloat16", layers=1)
    sums: list[dict[str, mx.array]] = []

    def reduce(
        gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]
    ) -> tuple[Arrays, float, int]:
        sums.append(dict(gradients))
        return alone(gradients, loss, tokens, computed)

    run = InProcess(model, TuningSpec("full", num_layers=-1), OptimizerSpec(learning_rate=0.0), reduce=reduce)
    rows = as_rows([([5, 6, 7, 8], 0)])
    run.step(rows)
    run.step(*[rows] * 100)
    once, often = sums
    for name, gradient in once.items():
        assert often[name].dtype == mx.float32
        assert mx.allclose(often[name] / 100, gradient.astype(mx.float32), rtol=1e-4, atol=1e-7), name
    assert run.done[1].tokens == 100 * run.done[0].tokens
