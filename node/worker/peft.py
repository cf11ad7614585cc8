"""The adapter in the layout of Hugging Face's PEFT, for people who serve with other programs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from node.adapter_files import WEIGHTS, read_settings
from node.errors import UserError
from node.exports.card import name_of
from node.exports.kinds import PEFT_MODEL_TYPES
from node.tensors import check_numbers

PREFIX = "base_model.model."
# Routers too: transformers keeps their weights outside linear layers.
EXPERTS = re.compile(r"\.switch_mlp\.|\.block_sparse_moe\.|\.mlp\.gate$|\.shared_expert_gate$")
LAYER = re.compile(r"^(?P<stem>.*\blayers)\.(?P<number>\d+)\.(?P<inner>.+)$")


def check_peft(adapter: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter that PEFT has no form for.

    Raises:
        UserError: it is a full fine-tune, has experts or embeddings, or its model's names differ.
    """
    _parts(adapter, config)


def write_peft(folder: Path, adapter: Path, config: dict[str, Any], source: str) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        folder: an existing folder.
        adapter: folder of the adapter in ``mlx_lm``'s form.
        config: the base model's ``config.json``.
        source: the base model's name, as PEFT should load it.

    Raises:
        UserError: PEFT has no form for this adapter.
    """
    settings, modules = _parts(adapter, config)
    tensors: dict[str, mx.array] = {}
    for path, parts in modules.items():
        # MLX holds x @ A @ B; PEFT holds the transposes, as weights of linear layers.
        tensors[f"{PREFIX}{path}.lora_A.weight"] = mx.contiguous(parts["lora_a"].T)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = mx.contiguous(parts["lora_b"].T)
        if "m" in parts:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = parts["m"]
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
    parameters = settings["lora_parameters"]
    rank = int(next(iter(modules.values()))["lora_a"].shape[1])
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": rank,
        "lora_alpha": parameters["scale"] * rank,
        "lora_dropout": parameters.get("dropout", 0.0),
        "use_dora": settings.get("fine_tune_type") == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        **_targets(list(modules), int(config.get("num_hidden_layers", 0)), experts="moe" in config["model_type"]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card = f"---\nlibrary_name: peft\ntags:\n- mlx-tandem\n---\n\n# Adapter for {name_of(source) or 'a model'}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def _parts(adapter: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, mx.array]]]:
    """The adapter's settings, and its tensors by module path and name."""
    try:
        settings = read_settings(adapter)
        check_numbers(adapter / WEIGHTS, floats_only=True)
        weights: Any = mx.load(str(adapter / WEIGHTS))
    except (UserError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--export-peft: cannot read the adapter in {adapter}: {error}") from error
    if settings.get("fine_tune_type", "lora") == "full":
        raise UserError("--export-peft: this is a full fine-tune, not an adapter; export the fused model instead")
    model_type = str(config.get("model_type", ""))
    if model_type not in PEFT_MODEL_TYPES:
        raise UserError(f"--export-peft: the names of {model_type!r} modules are not known to agree with transformers'")
    modules: dict[str, dict[str, mx.array]] = {}
    for name, value in weights.items():
        path, _, part = name.rpartition(".")
        if value.ndim > 2 or EXPERTS.search(path):
            raise UserError(
                f"--export-peft: {path} belongs to a mixture of experts, and PEFT has no adapters for those"
            )
        if "embed" in path:
            raise UserError(f"--export-peft: {path} is an embedding; only linear layers can be exported")
        modules.setdefault(path, {})[part] = value
    broken = [path for path, parts in modules.items() if not {"lora_a", "lora_b"} <= set(parts)]
    if broken or not modules:
        raise UserError(
            f"--export-peft: {adapter} does not hold LoRA weights for {broken[0] if broken else 'anything'}"
        )
    return settings, modules


def _targets(paths: list[str], layers: int, *, experts: bool) -> dict[str, Any]:
    """Which modules PEFT wraps: names and layer numbers where they say exactly that, else whole paths."""
    matches = [LAYER.match(path) for path in paths]
    if any(match is None for match in matches):
        return {"target_modules": sorted(paths), "layers_to_transform": None, "layers_pattern": None}
    by_layer: dict[int, set[str]] = {}
    for match in matches:
        assert match is not None
        by_layer.setdefault(int(match["number"]), set()).add(match["inner"])
    names = next(iter(by_layer.values()))
    if any(other != names for other in by_layer.values()):
        return {"target_modules": sorted(paths), "layers_to_transform": None, "layers_pattern": None}
    # Models with experts have modules of the same last name elsewhere in a block.
    short = sorted(names if experts else {name.rpartition(".")[2] for name in names})
    numbers = None if len(by_layer) == layers else sorted(by_layer)
    return {"target_modules": short, "layers_to_transform": numbers, "layers_pattern": "layers" if numbers else None}
