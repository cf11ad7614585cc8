"""Random adapters in the form that ``mlx_lm`` writes, for the export tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

TEXT = list(range(5, 45))


def random_adapter(
    folder: Path,
    base: Path,
    *,
    kind: str = "lora",
    layers: int = -1,
    rank: int = 4,
    scale: float = 3.0,
    keys: list[str] | None = None,
) -> Path:
    """Write an adapter with weights large enough to change every answer."""
    model, _ = load_model(base)
    mx.random.seed(1)  # LoRA's first weights are drawn: the same ones each time
    parameters: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    names: tuple[str, ...] = ("lora_a", "lora_b", "m")
    if kind == "full":
        names = ("weight",)
    else:
        linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    random = np.random.default_rng(1)
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        if name.rsplit(".", 1)[-1] not in names or "norm" in name:
            continue
        noise = mx.array(random.standard_normal(value.shape, dtype=np.float32) * 0.05).astype(value.dtype)
        weights[name] = value * (1 + noise) if name.endswith(".m") else value + noise
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def logits(model: nn.Module, tokens: list[int] | None = None) -> np.ndarray:
    """(tokens, vocabulary) in fp32."""
    return np.array(model(mx.array([tokens or TEXT]))[0].astype(mx.float32))


def as_float32(folder: Path) -> nn.Module:
    """A model folder's model, de-quantized nowhere, computing in fp32."""
    model, _ = load_model(folder)
    pairs = [
        (n, v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v)
        for n, v in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(pairs))
    return model
