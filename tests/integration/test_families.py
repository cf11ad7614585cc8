"""Every architecture that the documents name trains and fuses, on a small random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from node.errors import UserError
from node.spec import Fuse, ModelSpec, OptimizerSpec, TuningSpec
from node.worker import tuning
from node.worker.export import fuse
from tests.fixtures.models import FAMILIES, tiny_model
from tests.fixtures.training import InProcess, random_batches

TEXT = mx.array([[5, 17, 40, 3, 99, 150, 7, 7, 23, 180, 61, 12]])


def save_adapter(run: InProcess, spec: TuningSpec, folder: Path) -> Path:
    """As ``coordinator train`` does: the weights, and a configuration in ``mlx_lm``'s form."""
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), run.weights)
    parameters = None
    if spec.fine_tune_type != "full":
        parameters = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout}
    config = {"fine_tune_type": spec.fine_tune_type, "num_layers": spec.num_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def logits(model: nn.Module) -> np.ndarray[Any, Any]:
    model.eval()
    return np.array(model(TEXT)[0].astype(mx.float32))


def train_and_fuse(folder: Path, family: str, spec: TuningSpec, quantize: int | None) -> InProcess:
    """Train two steps, fuse, and compare: the trained model, base and adapter loaded again, and the fused one."""
    model = tiny_model(folder / "model", family, quantize=quantize)
    before = logits(load_model(model)[0])
    run = InProcess(model, spec, OptimizerSpec(learning_rate=1e-2)).run(random_batches(2))
    assert np.isfinite(run.losses).all()
    assert min(run.grad_norms) > 0
    trained = logits(run.model)
    assert np.abs(trained - before).max() > 0.05
    adapter = save_adapter(run, spec, folder / "adapter")
    loaded = logits(tuning.load(ModelSpec(str(model), str(adapter)))[0])
    assert np.abs(loaded - trained).max() < 1e-5
    request = Fuse(
        ModelSpec(str(model), str(adapter)), str(folder / "fused"), dequantize=quantize is not None, source=family
    )
    fuse(request.model, request, lambda task, done, total: None)
    fused = logits(load_model(folder / "fused")[0])
    assert np.abs(fused - trained).max() < 1e-4 * np.abs(trained).max()
    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(tmp_path: Path, family: str) -> None:
    spec = TuningSpec(num_layers=-1, rank=4, scale=10.0, dropout=0.1, neftune_alpha=1.0)
    run = train_and_fuse(tmp_path, family, spec, None)
    if family == "mixtral":
        assert run.notes == ["--lora-dropout is not applied to the 6 expert layers: their rows are mixed"]
    else:
        assert run.notes == []


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2", "gemma2", "phi3"])
def test_qlora(tmp_path: Path, family: str) -> None:
    train_and_fuse(tmp_path, family, TuningSpec(num_layers=-1, rank=4, scale=10.0), 4)


@pytest.mark.parametrize("family", ["mistral", "phi2", "gemma3", "internlm2"])
def test_dora(tmp_path: Path, family: str) -> None:
    train_and_fuse(tmp_path, family, TuningSpec("dora", num_layers=-1, rank=4, scale=10.0), None)


@pytest.mark.parametrize("family", ["mixtral", "minicpm", "qwen3", "olmo"])
def test_full(tmp_path: Path, family: str) -> None:
    train_and_fuse(tmp_path, family, TuningSpec("full", num_layers=-1), None)


@pytest.mark.parametrize("family", ["mixtral", "gemma2", "gemma3", "phi2"])
def test_grad_checkpoint(tmp_path: Path, family: str) -> None:
    """Blocks are called with masks of several kinds: none, a name, an array."""
    model = tiny_model(tmp_path / "model", family)
    batches = random_batches(2, longest=60)
    plain = InProcess(model, TuningSpec(num_layers=-1)).run(batches)
    lean = InProcess(model, TuningSpec(num_layers=-1, grad_checkpoint=True)).run(batches)
    assert lean.losses == pytest.approx(plain.losses, abs=1e-5)
    assert lean.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)


@pytest.mark.parametrize("quantize", [None, 4])
def test_dora_on_experts_is_refused(tmp_path: Path, quantize: int | None) -> None:
    model = tiny_model(tmp_path / "model", "mixtral", quantize=quantize)
    with pytest.raises(UserError, match=r"--fine-tune-type dora: .*SwitchLinear doesn't support DoRA") as caught:
        InProcess(model, TuningSpec("dora", num_layers=-1))
    assert "\n" not in str(caught.value)


def test_full_on_a_quantized_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", quantize=4)
    with pytest.raises(UserError, match="--fine-tune-type full: a quantized model cannot be trained in full"):
        InProcess(model, TuningSpec("full", num_layers=-1))


def test_more_layers_than_there_are_means_all_and_is_said(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=3)
    run = InProcess(model, TuningSpec(num_layers=16))
    assert run.notes == ["the model has 3 layers, fewer than --num-layers 16: training them all"]
    assert {name.split(".")[2] for name in run.weights} == {"0", "1", "2"}


def test_keys_that_match_nothing_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=r"nothing to train: .*no_such_layer; check --lora-keys"):
        InProcess(model, TuningSpec(num_layers=-1, keys=("no_such_layer",)))
