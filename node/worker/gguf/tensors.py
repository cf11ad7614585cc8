"""MLX parameters as llama.cpp's tensors: names, order of rows, offsets and scales. Everything stays lazy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import mlx.core as mx

from node.errors import UserError
from node.worker.gguf.families import Shape
from node.worker.gguf.rope import rope_tensors

# Where llama.cpp's own scale of the attention scores is 1 / sqrt(hidden / heads), by number of layers; see its
# load_arch_hparams of both models. Everywhere else it is 1 / sqrt(head_dim).
_BY_HIDDEN_SIZE = {gguf.MODEL_ARCH.GEMMA2: 46, gguf.MODEL_ARCH.GEMMA3: 62}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        name: in the GGUF file.
        value: lazy; evaluated when it is written.
        exact: kept in fp32 whatever the file's type: vectors, routers and factors.
    """

    name: str
    value: mx.array
    exact: bool


def tensors(parameters: dict[str, mx.array], shape: Shape) -> Iterator[Tensor]:
    """Turn a model's de-quantized parameters into GGUF tensors.

    Args:
        parameters: by their MLX names; each is taken out as it is passed on, so that memory can be freed.
        shape: of the model.

    Raises:
        UserError: the model has a parameter that its family has no place for.
    """
    names = gguf.get_tensor_name_map(shape.family.architecture, shape.layers)
    for name, factors in rope_tensors(shape).items():
        yield Tensor(name, mx.array(factors), exact=True)
    for path in sorted(parameters, key=_natural):
        value = parameters.pop(path)
        known = path.removeprefix(shape.family.prefix)
        for old, new in shape.family.renames:
            known = known.replace(old, new)
        name = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"--export-gguf: llama.cpp has no place for {path} in {shape.model_type} models")
        value = _transformed(known, value, shape)
        yield Tensor(name, value, exact=value.ndim == 1 or ".ffn_gate_inp" in name)


def parameters_of(model: Any, shape: Shape) -> dict[str, mx.array]:
    """The text model's parameters by name, taken out of the model so that only the result holds them."""
    from mlx.utils import tree_flatten, tree_map

    parameters = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    return {name: value for name, value in parameters.items() if name.startswith(shape.family.prefix)}


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _transformed(path: str, value: mx.array, shape: Shape) -> mx.array:
    query, key = ".self_attn.q_proj." in path, ".self_attn.k_proj." in path
    if shape.family.norm_offset and "norm" in path:
        value = value.astype(mx.float32) + shape.family.norm_offset
    if shape.family.interleaved_rope and (query or key) and not getattr(shape.args, "rope_traditional", False):
        value = _interleave(value, shape.heads if query else shape.kv_heads)
    scale = _query_scale(shape)
    if scale != 1.0:
        # With a norm on the query, the norm's weight is what comes after.
        scaled = ".self_attn.q_norm." if shape.family.architecture == gguf.MODEL_ARCH.GEMMA3 else ".self_attn.q_proj."
        if scaled in path:
            value = value * scale
    if path.endswith(".shared_expert_gate.weight"):
        value = value.squeeze(0)
    return value


def _interleave(value: mx.array, heads: int) -> mx.array:
    """Reorder the rows of each head from halves (first half, second half) to neighbouring pairs."""
    rows = value.shape[0]
    return value.reshape(heads, 2, rows // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _query_scale(shape: Shape) -> float:
    """What queries are multiplied by, so that llama.cpp's scale of the scores has the effect of the model's own."""
    own = getattr(shape.args, "query_pre_attn_scalar", None)
    if own is None:
        return 1.0
    hidden_size = _BY_HIDDEN_SIZE.get(shape.family.architecture) == shape.layers
    expected = shape.args.hidden_size // shape.heads if hidden_size else shape.head_dim
    return math.sqrt(expected / own)
