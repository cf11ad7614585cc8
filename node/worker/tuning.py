"""Make a loaded model trainable: LoRA, DoRA or full, by ``mlx_lm``'s own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from node.adapter_files import MOST_RANK
from node.errors import UserError, mentions_memory, one_line
from node.jsons import read_json
from node.manifest import needs_own_code
from node.spec import ModelSpec, TuningSpec
from node.tensors import check_numbers, read_tensors
from node.worker.adapter import apply_adapter
from node.worker.attention import attend_in_parts
from node.worker.lora import join_adapters
from node.worker.randomness import RowContext, add_embedding_noise, key_dropout


def load(spec: ModelSpec, *, lazy: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model, and its adapter where one is named.

    Returns:
        The model and its configuration.

    Raises:
        UserError: the model or the adapter cannot be read, or they do not belong together.
    """
    try:
        _check_files(spec)
    except UserError as error:
        raise UserError(f"cannot load the model in {spec.path}: {str(error).removeprefix(f'{spec.path}/')}") from error
    try:
        model, config = load_model(Path(spec.path), lazy=lazy, trust_remote_code=spec.trust_remote_code)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the model in {spec.path}: {one_line(error)}") from error
    except RuntimeError as error:
        if is_memory_error(error):
            raise
        raise UserError(f"cannot load the model in {spec.path}: {one_line(error)}") from error
    if spec.adapter_path:
        apply_adapter(model, spec.adapter_path)
    return model, config


def _check_files(spec: ModelSpec) -> None:
    """Refuse a model whose files cannot be meant, or that needs its own Python file without leave to run it."""
    file = Path(spec.path) / "config.json"
    named = read_json(file).get("model_file") if file.is_file() else None
    if named is not None and not spec.trust_remote_code:
        raise UserError(needs_own_code(file, str(named)))
    for weights in sorted(Path(spec.path).glob("model*.safetensors")):
        read_tensors(weights)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model holds quantized weights."""
    return any(isinstance(m, nn.QuantizedLinear) or "scales" in m for _, m in model.named_modules())


def make_trainable(model: nn.Module, spec: TuningSpec, seed: int, context: RowContext) -> list[str]:
    """Freeze the model, put in what is trained, and key its randomness, in place.

    Initial adapter weights are drawn exactly as ``mlx_lm.lora`` with this seed draws them.

    Returns:
        Things a person should be told, one line each.

    Raises:
        UserError: the model has nothing of the kind that was asked for.
    """
    notes = []
    layers = len(model.layers)
    if spec.fine_tune_type != "full" and not 1 <= spec.rank <= MOST_RANK:
        raise UserError(f"--lora-rank {spec.rank}: a rank is a whole number from 1 to {MOST_RANK}")
    if spec.num_layers > layers:
        notes.append(f"the model has {layers} layers, fewer than --num-layers {spec.num_layers}: training them all")
    num_layers = -1 if spec.num_layers > layers else spec.num_layers
    mx.random.seed(seed)
    model.freeze()
    if spec.fine_tune_type == "full":
        if is_quantized(model):
            raise UserError("--fine-tune-type full: a quantized model cannot be trained in full; use lora or dora")
        for layer in model.layers[-max(num_layers, 0) :]:
            layer.unfreeze()
    else:
        parameters = {"rank": spec.rank, "scale": spec.scale, "dropout": 0.0}
        if spec.keys is not None:
            parameters["keys"] = set(spec.keys)  # type: ignore[assignment]
        try:
            linear_to_lora_layers(model, num_layers, parameters, use_dora=spec.fine_tune_type == "dora")
        except ValueError as error:
            raise UserError(f"--fine-tune-type {spec.fine_tune_type}: {one_line(error)}") from error
        join_adapters(model)
        unkeyed = key_dropout(model, context, spec.dropout)
        if unkeyed and spec.dropout > 0:
            notes.append(f"--lora-dropout is not applied to the {len(unkeyed)} expert layers: their rows are mixed")
    attend_in_parts(model)
    if not tree_flatten(model.trainable_parameters()):
        names = ", ".join(spec.keys or ()) or "any linear layer"
        raise UserError(f"nothing to train: the last {spec.num_layers} layers hold no {names}; check --lora-keys")
    if spec.initial_weights:
        load_initial_weights(model, spec.initial_weights)
    if spec.neftune_alpha > 0:
        add_embedding_noise(model, context, spec.neftune_alpha)
    if spec.grad_checkpoint:
        for layer in model.layers:
            _checkpoint(layer)
    return notes


def load_initial_weights(model: nn.Module, path: str) -> None:
    """Start from the weights of an adapter file (``--resume-adapter-file``).

    Raises:
        UserError: the file cannot be read, or names or shapes differ from what is trained.
    """
    try:
        stored = check_numbers(Path(path), floats_only=True)
        weights: Any = mx.load(path)
    except UserError as error:
        raise UserError(f"--resume-adapter-file {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--resume-adapter-file {path}: {one_line(error)}") from error
    trained = dict(tree_flatten(model.trainable_parameters()))
    foreign = [name for name in weights if name not in trained]
    if foreign:
        raise UserError(
            f"--resume-adapter-file {path}: {foreign[0]} is not trained here;"
            " --fine-tune-type, --num-layers and --lora-keys must be those it was trained with"
        )
    halves = {name for name in stored if name.endswith((".lora_a", ".lora_b")) and _twin(name) not in stored}
    if halves:
        raise UserError(f"--resume-adapter-file {path}: it has no {_twin(min(halves))}; copy it again")
    for name, array in weights.items():
        if array.shape != trained[name].shape:
            raise UserError(
                f"--resume-adapter-file {path}: {name} has shape {array.shape}, here it is {trained[name].shape};"
                " --lora-rank must be the one it was trained with"
            )
    model.load_weights(list(weights.items()), strict=False)


def _twin(name: str) -> str:
    """The other half of a LoRA pair."""
    return name[:-1] + ("b" if name.endswith("a") else "a")


def _checkpoint(layer: nn.Module) -> None:
    """Recompute this layer's activations in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""
    plain = type(layer)

    def call(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        def inner(parameters: Any, *inputs: Any, **kept: Any) -> Any:
            self.update(parameters)
            return plain.__call__(self, *inputs, **kept)

        return mx.checkpoint(inner)(self.trainable_parameters(), *arguments, **options)

    layer.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def is_memory_error(error: BaseException) -> bool:
    """Whether MLX or the system says that memory ran out."""
    return isinstance(error, MemoryError) or mentions_memory(str(error))
