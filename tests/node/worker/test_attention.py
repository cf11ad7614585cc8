"""Attention in parts is attention: the same numbers and gradients, and MLX's own where parts are of no use."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache

from node.attention import query_parts
from node.spec import ModelSpec, TuningSpec
from node.worker import attention, tuning
from node.worker.attention import for_gradients
from node.worker.loss import TokenLoss, pad
from node.worker.randomness import RowContext
from tests.fixtures.models import FAMILIES, tiny_model
from tests.fixtures.training import as_rows, random_batches

LONG = 150  # two parts, of which the second is a little longer


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 127, 128, 129, 150, 512, 1023, 1024, 2047, 2500])
def test_parts_are_all_of_the_row(length: int, gpu: bool) -> None:
    parts = query_parts(length, gpu=gpu)
    assert parts[0][0] == 0
    assert parts[-1][1] == length
    assert all(end == start for (_, end), (start, _) in pairwise(parts))
    sizes = {end - start for start, end in parts}
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == 1 or min(sizes) >= (512 if gpu else 64)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that were attended in parts."""
    found: list[tuple[int, ...]] = []
    real = attention._in_parts

    def seen(queries: mx.array, *more: Any) -> mx.array:
        found.append(queries.shape)
        return real(queries, *more)

    monkeypatch.setattr(attention, "_in_parts", seen)
    return found


def drawn(length: int, heads: int, groups: int, width: int, values: int, dtype: mx.Dtype) -> list[mx.array]:
    """Queries, keys and values as models hand them over: transposed views."""
    shapes = ((3, length, heads, width), (3, length, groups, width), (3, length, groups, values))
    return [
        mx.random.normal(shape, key=mx.random.key(number)).astype(dtype).swapaxes(1, 2)
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("length", [128, 131, LONG, 300])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "values"), [(4, 4, 16, 16), (4, 2, 16, 16), (6, 1, 8, 8), (4, 2, 24, 16)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-6), (mx.bfloat16, 2e-2), (mx.float16, 4e-3)])
def test_the_same_numbers_and_gradients(
    calls: list[tuple[int, ...]],
    length: int,
    heads: int,
    groups: int,
    width: int,
    values: int,
    dtype: mx.Dtype,
    tolerance: float,
) -> None:
    arrays = drawn(length, heads, groups, width, values, dtype)
    weights = mx.random.normal((3, heads, length, values), key=mx.random.key(9))

    def computed(attend: Callable[..., mx.array], arrays: list[mx.array]) -> list[mx.array]:
        def of(*arrays: mx.array) -> tuple[mx.array, mx.array]:
            outputs = attend(*arrays, None, scale=0.3, mask="causal")
            return (outputs.astype(mx.float32) * weights).sum(), outputs

        (_, outputs), gradients = mx.value_and_grad(of, argnums=(0, 1, 2))(*arrays)
        return [outputs, *gradients]

    with for_gradients():
        found = computed(attention.attention, arrays)
    assert calls == [(3, heads, length, width)]
    exact = computed(base.scaled_dot_product_attention, [array.astype(mx.float32) for array in arrays])
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert (mx.abs(one.astype(mx.float32) - other).max() / mx.abs(other).max()).item() < tolerance  # type: ignore[operator]


@pytest.mark.parametrize(
    "more",
    [
        {"mask": None},
        {"mask": base.create_causal_mask(LONG, window_size=40)},
        {"mask": "causal", "cache": KVCache()},
        {"mask": "causal", "sinks": mx.zeros(4)},
    ],
    ids=["no mask", "a window", "a cache", "sinks"],
)
def test_all_else_is_left_to_mlx(calls: list[tuple[int, ...]], more: dict[str, Any]) -> None:
    arrays, options = drawn(LONG, 4, 2, 16, 16, mx.float32), {"cache": None, "scale": 0.3, **more}
    with for_gradients():
        found = attention.attention(*arrays, **options)
    assert mx.array_equal(found, base.scaled_dot_product_attention(*arrays, **options))
    assert calls == []


def test_short_rows_and_values_without_gradients_are_left_to_mlx(calls: list[tuple[int, ...]]) -> None:
    attention.attention(*drawn(LONG, 4, 2, 16, 16, mx.float32), None, scale=0.3, mask="causal")
    with for_gradients():
        attention.attention(*drawn(100, 4, 2, 16, 16, mx.float32), None, scale=0.3, mask="causal")
    assert calls == []


def test_queries_of_another_length_or_type_are_left_to_mlx(calls: list[tuple[int, ...]]) -> None:
    queries, keys, values = drawn(LONG, 4, 2, 16, 16, mx.float32)
    with for_gradients():
        attention.attention(queries[:, :, 5:], keys, values, None, scale=0.3, mask="causal")
        attention.attention(queries, keys.astype(mx.bfloat16), values, None, scale=0.3, mask="causal")
    assert calls == []


def gradients(model: nn.Module) -> dict[str, mx.array]:
    """Of a loss over rows of which one is long, with regard to what is trained."""
    (batch,) = random_batches(1, rows=3, masked=True, longest=LONG, seed=2)
    of, padded = TokenLoss(model), pad(as_rows(batch, extra_padding=LONG - max(len(row) for row, _ in batch)))
    parameters = model.trainable_parameters()

    def value(parameters: Any) -> mx.array:
        model.update(parameters)
        return of(padded)

    found: Any = mx.grad(value)(parameters)
    model.update(parameters)
    return dict(tree_flatten(found))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(tmp_path: Path, calls: list[tuple[int, ...]], family: str, checkpointed: bool) -> None:
    model, _ = tuning.load(ModelSpec(str(tiny_model(tmp_path / "model", family))))
    spec = TuningSpec(num_layers=-1, rank=4, grad_checkpoint=checkpointed)
    tuning.make_trainable(model, spec, 0, RowContext())
    for number, (name, array) in enumerate(tree_flatten(model.trainable_parameters())):
        if name.endswith("lora_b"):
            drawn_b = mx.random.normal(array.shape, key=mx.random.key(number)) * 0.1
            model.load_weights([(name, drawn_b)], strict=False)
    wanted = gradients(model)
    assert calls == []
    with for_gradients():
        found = gradients(model)
    # Soft-capped scores are the models' own affair.
    assert bool(calls) is (family != "gemma2")
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        most = mx.maximum(mx.abs(gradient).max(), 1e-3)
        assert (mx.abs(found[name] - gradient).max() / most).item() < 1e-4, name  # type: ignore[operator]


OWN_CODE = """
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

class Attending(nn.Module):
    def __call__(self, x):
        return scaled_dot_product_attention(x, x, x, cache=None, scale=0.3, mask="causal")
"""


def test_a_models_own_file_is_no_module_of_python(calls: list[tuple[int, ...]]) -> None:
    names: dict[str, Any] = {"__name__": "custom_model"}
    exec(OWN_CODE, names)  # as ``mlx_lm`` runs it
    model, (x, *_) = names["Attending"](), drawn(LONG, 4, 4, 16, 16, mx.float32)
    wanted = model(x)
    attention.attend_in_parts(model)
    with for_gradients():
        assert mx.allclose(model(x), wanted, atol=1e-5)
    assert calls == [x.shape]
