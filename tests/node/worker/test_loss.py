"""The loss in parts is the loss of all logits at once, for every kind of head; what cannot be cut is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from node.spec import ModelSpec, TuningSpec
from node.worker import loss, tuning
from node.worker.cut import Cut
from node.worker.loss import Batch, TokenLoss, pad
from node.worker.randomness import RowContext
from tests.fixtures.models import FAMILIES, tiny_model
from tests.fixtures.training import as_rows, random_batches

MASKED = pad(as_rows(random_batches(1, rows=6, masked=True)[0], extra_padding=3))


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so few rows that even these batches have several, and a last one that is smaller."""
    monkeypatch.setattr(loss, "rows_at_once", lambda vocabulary, gpu: 7)


def trainable(folder: Path, method: Any = "lora") -> nn.Module:
    model, _ = tuning.load(ModelSpec(str(folder)))
    tuning.make_trainable(model, TuningSpec(method, num_layers=-1, rank=4), 0, RowContext())
    for name, array in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.load_weights(
                [(name, mx.random.normal(array.shape, key=mx.random.key(len(name))) * 0.1)], strict=False
            )
    return model


def of_all_logits(model: nn.Module, batch: Batch) -> Any:
    """As it is defined, from the logits of all positions, padding and all."""
    logits: mx.array = model(batch.inputs).astype(mx.float32).reshape(batch.inputs.size, -1)
    weights, targets = mx.zeros(len(logits)), mx.zeros(len(logits), mx.int32)
    weights = weights.at[batch.positions].add(batch.weights)
    targets = targets.at[batch.positions].maximum(mx.where(batch.weights > 0, batch.targets, 0))
    return (nn.losses.cross_entropy(logits, targets) * weights).sum()


def gradients(model: nn.Module, of: Any, batch: Batch) -> tuple[float, dict[str, mx.array]]:
    """A loss and its gradient with regard to what is trained."""

    def value(parameters: Any) -> mx.array:
        model.update(parameters)
        return of(batch)  # type: ignore[no-any-return]

    parameters = model.trainable_parameters()
    total, found = mx.value_and_grad(value)(parameters)
    mx.eval(total, found)
    model.update(parameters)
    return float(total), dict(tree_flatten(found))


def assert_same(model: nn.Module, *, tolerance: float = 1e-5) -> TokenLoss:
    """In parts or not: the same losses and gradients."""
    of = TokenLoss(model)
    expected, wanted = gradients(model, lambda batch: of_all_logits(model, batch), MASKED)
    found, got = gradients(model, of, MASKED)
    assert found == pytest.approx(expected, rel=tolerance)
    assert of.value(MASKED).item() == pytest.approx(expected, rel=tolerance)
    assert got.keys() == wanted.keys()
    assert any(mx.abs(array).max().item() > 1e-3 for array in wanted.values())  # type: ignore[operator]
    for name, gradient in wanted.items():
        difference = mx.abs(got[name].astype(mx.float32) - gradient.astype(mx.float32)).max()
        most = mx.maximum(mx.abs(gradient.astype(mx.float32)).max(), 1e-3)
        assert (difference / most).item() < 10 * tolerance, name  # type: ignore[operator]
    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_cut(tmp_path: Path, family: str) -> None:
    assert assert_same(trainable(tiny_model(tmp_path / "model", family))).in_parts


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2"])
def test_quantized_heads(tmp_path: Path, family: str) -> None:
    assert assert_same(trainable(tiny_model(tmp_path / "model", family, quantize=4))).in_parts


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads(tmp_path: Path, tied: bool) -> None:
    model = trainable(tiny_model(tmp_path / "model", "llama", tie_word_embeddings=tied))
    assert assert_same(model).in_parts
    assert ("lm_head" in model) is not tied


def test_scaled_and_capped_heads(tmp_path: Path) -> None:
    model = trainable(tiny_model(tmp_path / "model", "gemma2", final_logit_softcapping=0.5))
    assert mx.abs(model(mx.array([[1, 2, 3]]))).max() <= 0.5
    assert assert_same(model).in_parts


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    assert assert_same(trainable(tiny_model(tmp_path / "model", "llama", dtype=dtype)), tolerance=1e-2).in_parts


def test_full_fine_tuning_of_blocks_leaves_the_head_alone(tmp_path: Path) -> None:
    assert assert_same(trainable(tiny_model(tmp_path / "model", "llama"), "full")).in_parts


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_takes_the_plain_way(tmp_path: Path, tied: bool) -> None:
    model = trainable(tiny_model(tmp_path / "model", "llama", tie_word_embeddings=tied))
    (model.model.embed_tokens if tied else model.lm_head).unfreeze()
    assert not assert_same(model).in_parts


class Mixed(nn.Module):  # type: ignore[misc]
    """A head that looks at the positions before, as none of mlx-lm's does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, inputs: mx.array) -> mx.array:
        logits: mx.array = self.lm_head(self.model(inputs))
        return mx.cumsum(logits, axis=1) / 8


class Unnamed(nn.Module):  # type: ignore[misc]
    """A model that keeps its body where nobody looks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model

    @property
    def layers(self) -> Any:
        return self.inside.layers

    def __call__(self, inputs: mx.array) -> Any:
        return self.inside(inputs)


@pytest.mark.parametrize("wrapper", [Mixed, Unnamed])
def test_what_cannot_be_cut_takes_the_plain_way(tmp_path: Path, wrapper: Any) -> None:
    model = wrapper(trainable(tiny_model(tmp_path / "model", "llama", tie_word_embeddings=False)))
    assert not assert_same(model).in_parts


def test_no_target_at_all(tmp_path: Path) -> None:
    model = trainable(tiny_model(tmp_path / "model", "llama"))
    batch = pad(as_rows([([5, 6, 7, 8], [])]))
    total, found = gradients(model, TokenLoss(model), batch)
    assert total == 0
    assert not any(array.any() for array in found.values())


def test_targets_are_the_tokens_after_their_positions() -> None:
    batch = pad(as_rows([([10, 11, 12, 13], [(1, 2), (3, 4)]), ([20, 21], 1)], extra_padding=1))
    inputs, targets = batch.inputs.reshape(-1)[batch.positions], batch.targets
    pairs = list(zip(inputs.tolist(), targets.tolist(), batch.weights.tolist(), strict=True))  # type: ignore[arg-type]
    assert pairs[:3] == [(10, 11, 1), (12, 13, 1), (20, 21, 1)]
    assert {weight for *_, weight in pairs[3:]} == {0}
    assert batch.lengths.tolist() == [3, 1]


def test_counts_have_few_sizes_and_little_to_fill_up() -> None:
    sizes = [loss._rounded(count) for count in range(1, 4097)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert all(size <= max(16, count * 9 / 8) for count, size in enumerate(sizes, 1) if count > 128)
    assert len(set(sizes)) < 64


def test_all_logits_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "rows_at_once", lambda vocabulary, gpu: 32)
    vocabulary, length = 8192, 512
    model = trainable(tiny_model(tmp_path / "model", "llama", vocab_size=vocabulary, hidden=32, layers=1))
    batch = pad(as_rows([(list(range(3, 4 + length)), 1)]))
    peaks = []
    for of in (lambda batch: of_all_logits(model, batch), TokenLoss(model)):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        gradients(model, of, batch)
        peaks.append(mx.get_peak_memory() - before)
    whole = 4 * vocabulary * length
    assert peaks[0] > 3 * whole
    assert peaks[1] < whole


def test_a_model_is_whole_again_after_a_failure(tmp_path: Path) -> None:
    model = trainable(tiny_model(tmp_path / "model", "llama"))
    names = [name for name, _ in tree_flatten(model.parameters())]
    cut = Cut.at(model, ("model",))
    with pytest.raises(ValueError, match="dimension"):
        cut.after(mx.zeros((1, 3, 5)))
    with pytest.raises(KeyError):
        Cut.at(model, ("model", "norm", "weight"))
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert cut.before(mx.array([[1, 2]])).shape == (1, 2, 64)
