from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from node.errors import TandemError
from node.spec import ModelSpec
from node.worker import tuning
from node.worker.randomness import KeyedDropout, RowContext, add_embedding_noise, key_dropout, row_keys
from tests.fixtures.models import tiny_model

FEATURES = 64


def ids(*numbers: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


def context_of(*rows: int, seed: int = 0, step: int = 1, lengths: tuple[int, ...] | None = None) -> RowContext:
    context = RowContext()
    context.keys = mx.array(row_keys(seed, step, ids(*rows)))
    context.lengths = None if lengths is None else mx.array(lengths)
    return context


def mask(context: RowContext, length: int, *, probability: float = 0.3, layer: int = 0) -> np.ndarray[Any, Any]:
    """(rows, length, features): what dropout makes of ones."""
    assert context.keys is not None
    ones = mx.ones((context.keys.shape[0], length, FEATURES))
    return np.array(KeyedDropout(context, probability, layer)(ones))


def test_keys_differ_by_seed_step_and_row() -> None:
    keys = {
        tuple(key)
        for seed in (0, 1, 11)
        for step in (1, 2, 11)
        for key in row_keys(seed, step, ids(*range(1, 30))).tolist()
    }
    assert len(keys) == 3 * 3 * 29


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.75])
def test_dropout_drops_at_its_rate_and_scales_what_it_keeps(probability: float) -> None:
    drawn = mask(context_of(*range(16)), 50, probability=probability)
    dropped = (drawn == 0).mean()
    assert abs(dropped - probability) < 4 * math.sqrt(probability * (1 - probability) / drawn.size)
    assert drawn[drawn > 0] == pytest.approx(1 / (1 - probability))
    # No row, position or feature is dropped as a whole.
    for axes in ((0, 1), (0, 2), (1, 2)):
        rates = (drawn == 0).mean(axis=axes)
        assert abs(rates - probability).max() < 6 * math.sqrt(probability * (1 - probability) * rates.size / drawn.size)


def test_dropout_is_the_same_however_rows_are_padded_and_grouped() -> None:
    whole = mask(context_of(0, 1, 2, 3), 20)
    assert np.array_equal(mask(context_of(0, 1, 2, 3), 33)[:, :20], whole)
    assert np.array_equal(mask(context_of(3, 1), 12), whole[[3, 1], :12])


def test_dropout_differs_by_layer_step_seed_row_and_position() -> None:
    base = mask(context_of(0, 1), 20)
    others = [
        mask(context_of(0, 1), 20, layer=1),
        mask(context_of(0, 1, step=2), 20),
        mask(context_of(0, 1, seed=1), 20),
        mask(context_of(1, 0), 20),
        np.roll(base, 1, axis=1),
    ]
    # Independent masks of rate 0.3 agree on 58 % of their elements.
    for other in others:
        assert abs((other == base).mean() - 0.58) < 4 * math.sqrt(0.58 * 0.42 / base.size)


def test_dropout_of_a_layer_that_sees_rows_and_positions_in_one_axis() -> None:
    context = context_of(0, 1, 2)
    flat = KeyedDropout(context, 0.3, 0)(mx.ones((30, FEATURES)))
    assert np.array_equal(np.array(flat).reshape(3, 10, FEATURES), mask(context, 10))
    with pytest.raises(TandemError, match="no row axis"):
        KeyedDropout(context, 0.3, 0)(mx.ones((10, 3, FEATURES)))


def test_no_dropout_outside_training() -> None:
    x = mx.ones((2, 5, FEATURES))
    layer = KeyedDropout(context_of(0, 1), 0.5, 0)
    assert not mx.array_equal(layer(x), x)
    layer.eval()
    assert mx.array_equal(layer(x), x)
    assert mx.array_equal(KeyedDropout(RowContext(), 0.5, 0)(x), x)


def test_every_adapter_layer_has_a_mask_of_its_own(tmp_path: Path) -> None:
    model, _ = tuning.load(ModelSpec(str(tiny_model(tmp_path / "model", "llama"))))
    linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    context = context_of(0)
    assert key_dropout(model, context, 0.3) == []
    x = mx.ones((1, 20, FEATURES))
    layers = [m for _, m in model.named_modules() if isinstance(m, KeyedDropout)]
    assert len(layers) == 2 * 7
    assert len({np.array(layer(x)).tobytes() for layer in layers}) == len(layers)


# --- NEFTune ----------------------------------------------------------------------------------------------------------


def noise(model: nn.Module, context: RowContext, tokens: mx.array) -> np.ndarray[Any, Any]:
    embedding = model.model.embed_tokens
    noisy = embedding(tokens)
    kept, context.keys = context.keys, None
    plain = embedding(tokens)
    context.keys = kept
    return np.array(noisy - plain)


def test_embedding_noise_has_the_papers_amplitude(tmp_path: Path) -> None:
    model, _ = tuning.load(ModelSpec(str(tiny_model(tmp_path / "model", "llama"))))
    names = [name for name, _ in tree_flatten(model.parameters())]
    context = context_of(0, 1, lengths=(10, 40))
    add_embedding_noise(model, context, 5.0)
    model.train()
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    tokens = mx.array(np.random.default_rng(0).integers(0, 200, (2, 40)))
    drawn = noise(model, context, tokens)
    for row, length in enumerate((10, 40)):
        bound = 5.0 / math.sqrt(length * FEATURES)
        values = drawn[row, :length] / bound
        assert np.abs(values).max() <= 1 + 1e-4
        assert np.abs(values).max() > 0.95
        assert abs(values.mean()) < 4 * math.sqrt(1 / 3 / values.size)
        assert abs(values.var() - 1 / 3) < 0.05
    # Independent of padding and of the other rows.
    alone = context_of(1, lengths=(40,))
    context.keys, context.lengths = alone.keys, alone.lengths
    assert np.array_equal(noise(model, context, tokens[1:]), drawn[1:])
    model.eval()
    assert not noise(model, context, tokens[1:]).any()


def test_embedding_noise_is_not_dropouts(tmp_path: Path) -> None:
    """The two streams must not be one: noise and masks would be correlated."""
    model, _ = tuning.load(ModelSpec(str(tiny_model(tmp_path / "model", "llama"))))
    context = context_of(0, lengths=(400,))
    add_embedding_noise(model, context, 1.0)
    model.train()
    signs = noise(model, context, mx.zeros((1, 400), mx.int32)) > 0
    assert abs(signs.mean() - 0.5) < 0.02
    for layer in range(3):
        kept = mask(context, 400, probability=0.5, layer=layer) > 0
        assert abs((kept == signs).mean() - 0.5) < 4 * math.sqrt(0.25 / kept.size)
