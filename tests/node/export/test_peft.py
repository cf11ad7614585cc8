from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm import load
from mlx_lm.utils import load_model
from safetensors.numpy import load_file

from node.errors import UserError
from node.spec import Fuse, ModelSpec
from node.worker.export import fuse
from tests.fixtures.models import tiny_model
from tests.node.export.adapters import logits, random_adapter

PREFIX = "base_model.model."


def exported(tmp_path: Path, base: Path, adapter: Path) -> Path:
    spec = ModelSpec(str(base), str(adapter))
    folder = tmp_path / "peft"
    request = Fuse(model=spec, save_path="", fused_model=False, peft_path=str(folder), source="owner/base")
    assert fuse(spec, request, lambda _task, _done, _total: None) == (str(folder),)
    return folder


def merged_as_peft_does(base: Path, folder: Path) -> Any:
    """The base model with each target's weight replaced, by PEFT's formulas, in numpy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model, _ = load_model(base)
    modules = dict(model.named_modules())
    changed = []
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        weight = np.array(modules[path].weight)
        weight = weight + config["lora_alpha"] / config["r"] * (
            tensors[f"{PREFIX}{path}.lora_B.weight"] @ tensors[name]
        )
        if config["use_dora"]:
            magnitude = tensors[f"{PREFIX}{path}.lora_magnitude_vector"]
            weight = (magnitude / np.linalg.norm(weight, axis=1))[:, None] * weight
        changed.append((f"{path}.weight", mx.array(weight.astype(np.float32))))
    model.update(tree_unflatten(changed))
    return model


def is_target(path: str, config: dict[str, Any]) -> bool:
    """PEFT's rule: the path is a target or ends in one, in one of the named layers."""
    if not any(path == target or path.endswith(f".{target}") for target in config["target_modules"]):
        return False
    numbers = config["layers_to_transform"]
    return numbers is None or int(path.split(".layers.")[1].partition(".")[0]) in numbers


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "internlm2"])
def test_peft_formulas_give_the_same_answers(tmp_path: Path, family: str, kind: str) -> None:
    base = tiny_model(tmp_path / "base", family)
    adapter = random_adapter(tmp_path / "adapter", base, kind=kind, rank=4, scale=2.5)
    model, *_ = load(str(base), adapter_path=str(adapter))
    folder = exported(tmp_path, base, adapter)
    np.testing.assert_allclose(logits(merged_as_peft_does(base, folder)), logits(model), atol=2e-4)


@pytest.mark.parametrize(
    ("options", "targets", "numbers"),
    [
        ({}, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], None),
        ({"layers": 1}, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], [2]),
        ({"keys": ["self_attn.q_proj", "self_attn.v_proj"], "layers": 2}, ["q_proj", "v_proj"], [1, 2]),
        ({"keys": ["lm_head", "self_attn.q_proj"], "layers": 1}, ["lm_head", "model.layers.2.self_attn.q_proj"], None),
    ],
)
def test_targets_are_exactly_the_adapted_modules(
    tmp_path: Path, options: dict[str, Any], targets: list[str], numbers: list[int] | None
) -> None:
    base = tiny_model(tmp_path / "base", "llama", layers=3)
    folder = exported(tmp_path, base, random_adapter(tmp_path / "adapter", base, **options))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["target_modules"], config["layers_to_transform"]) == (targets, numbers)
    tensors = load_file(folder / "adapter_model.safetensors")
    adapted = {name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors}
    model, _ = load_model(base)
    linear = {path for path, module in model.named_modules() if "weight" in module and module.weight.ndim == 2}
    assert {path for path in linear if is_target(path, config)} == adapted


def test_configuration(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    folder = exported(tmp_path, base, random_adapter(tmp_path / "adapter", base, rank=8, scale=0.3))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] == pytest.approx(2.4)
    assert config["base_model_name_or_path"] == "owner/base"
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight"].shape == (8, 64)
    assert tensors[f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"].shape == (128, 8)


def test_attention_of_a_model_with_experts(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "mixtral")
    adapter = random_adapter(tmp_path / "adapter", base, keys=["self_attn.q_proj"])
    assert load_file(exported(tmp_path, base, adapter) / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"kind": "full"}, "a full fine-tune, not an adapter"),
        ("mixtral", {}, "belongs to a mixture of experts"),
        ("mixtral", {"keys": ["block_sparse_moe.gate"]}, "belongs to a mixture of experts"),
        ("llama", {"keys": ["model.embed_tokens"]}, "is an embedding"),
        ("olmo", {}, None),
    ],
)
def test_what_peft_lacks_is_refused(tmp_path: Path, family: str, options: dict[str, Any], message: str | None) -> None:
    base = tiny_model(tmp_path / "base", family)
    adapter = random_adapter(tmp_path / "adapter", base, **options)
    if message is None:
        exported(tmp_path, base, adapter)
        return
    with pytest.raises(UserError, match=message):
        exported(tmp_path, base, adapter)
    assert not (tmp_path / "peft").exists()


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    adapter = random_adapter(tmp_path / "adapter", base)
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content | {"model_type": "novel"}))
    with pytest.raises(UserError, match="the names of 'novel' modules are not known to agree"):
        exported(tmp_path, base, adapter)


def test_a_missing_adapter_is_one_line(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="cannot read the adapter in") as error:
        exported(tmp_path, base, tmp_path / "nowhere")
    assert "\n" not in str(error.value)


def test_our_own_folder_is_replaced_and_others_are_not(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    adapter = random_adapter(tmp_path / "adapter", base)
    folder = exported(tmp_path, base, adapter)
    exported(tmp_path, base, random_adapter(tmp_path / "adapter", base, rank=2))
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match="not written here"):
        exported(tmp_path, base, adapter)
