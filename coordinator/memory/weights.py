"""How large a model's weights are: exactly, from the headers of its files, or else from its configuration."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.memory.architecture import Architecture, Linear

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Of each tensor by name: safetensors dtype (``F32``, ``BF16``, …) and shape."""

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
}
_CONFIG_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.+)$")
_NOT_LANGUAGE = re.compile(r"vision|visual|audio|multi_modal|image_newline|rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Weights:
    """What is loaded.

    Attributes:
        total_bytes: of all weights, as they lie in memory.
        compute_bytes: size of one activation, which has the type of the unquantized weights.
        bits: of a quantized base, 0 when it is not quantized.
        layers: the linear layers of each block, first block first.
        embedding_bytes: of embedding and head together.
        exact: whether this was read from the weights' files.
    """

    total_bytes: int
    compute_bytes: int
    bits: int
    layers: tuple[tuple[Linear, ...], ...]
    embedding_bytes: int
    exact: bool


def quantization(config: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size of a quantized base; (0, 0) when it is not quantized."""
    for key in ("quantization", "quantization_config"):
        found = config.get(key)
        if isinstance(found, Mapping):
            bits = found.get("bits", 8 if found.get("quant_method") == "fp8" else 4)
            group = found.get("group_size", 64)
            return (bits if isinstance(bits, int) else 4), (group if isinstance(group, int) and group > 0 else 64)
    return 0, 0


def compute_bytes(config: Mapping[str, Any]) -> int:
    """Size of the unquantized type that the configuration names; half precision where it names none."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    for source in (config, inner):
        for key in ("torch_dtype", "dtype"):
            size = _CONFIG_BYTES.get(str(source.get(key)))
            if size is not None:
                return size
    return 2


def bytes_per_parameter(bits: int, group: int, width: int) -> float:
    """Bytes of one parameter; a quantized one has its part of its group's scale and bias, of ``width`` bytes each."""
    return bits / 8 + 2 * width / group if bits else float(width)


def expected_weights(config: Mapping[str, Any], model: Architecture, bits: int | None = None) -> Weights:
    """Weights of a model that is not here yet.

    Args:
        config: of the model.
        model: what ``architecture`` made of it.
        bits: as if it were quantized to so many in groups of 64; None takes what the configuration says.
    """
    own_bits, group = quantization(config)
    bits, group = (own_bits, group) if bits is None else (bits, 64)
    width = compute_bytes(config)
    each = bytes_per_parameter(bits, group, width)
    embedding = int(model.vocab * model.hidden * (1 if model.tied else 2) * each)
    return Weights(
        total_bytes=int(model.parameters * each),
        compute_bytes=width,
        bits=bits,
        layers=(model.block,) * model.layers,
        embedding_bytes=embedding,
        exact=False,
    )


def read_weights(config: Mapping[str, Any], model: Architecture, shapes: Shapes) -> Weights:
    """Weights as their files hold them."""
    kept = {name: entry for name, entry in shapes.items() if not _NOT_LANGUAGE.search(name)}
    bits, group = quantization(config)
    floats: dict[str, int] = defaultdict(int)
    for dtype, shape in kept.values():
        if dtype in {"F32", "F16", "BF16", "F64"}:
            floats[dtype] += math.prod(shape)
    width = DTYPE_BITS[max(floats, key=lambda name: floats[name])] // 8 if floats else compute_bytes(config)
    layers = _linear_layers(kept, bits, group)
    outside = {name: entry for name, entry in kept.items() if not _LAYER.search(name)}
    return Weights(
        total_bytes=tensor_bytes(kept.values()),
        compute_bytes=width,
        bits=bits if any(name.endswith((".scales", ".qweight")) for name in kept) else 0,
        layers=layers or (model.block,) * model.layers,
        embedding_bytes=tensor_bytes(outside.values()),
        exact=True,
    )


def tensor_bytes(entries: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of tensors; types that are not known count as two bytes per element."""
    return sum(DTYPE_BITS.get(dtype, 16) * math.prod(shape) // 8 for dtype, shape in entries)


def _linear_layers(shapes: Shapes, bits: int, group: int) -> tuple[tuple[Linear, ...], ...]:
    """The matrices of each block; experts that lie in files of their own are counted as they are."""
    found: dict[int, list[Linear]] = defaultdict(list)
    for name, (dtype, shape) in shapes.items():
        match = _LAYER.search(name)
        if match is None or not match[2].endswith((".weight", ".qweight")) or len(shape) < 2:
            continue
        inside, kind = match[2].rsplit(".", 1)
        copies = math.prod(shape[:-2])
        outputs, inputs = shape[-2:]
        if len(shape) > 2 and not re.search(r"expert|switch|moe", inside):
            continue  # a convolution
        if kind == "qweight":  # AWQ and GPTQ: packed along the outputs, transposed
            inputs, outputs = outputs, inputs * 32 // (bits or 4)
        elif dtype == "U32":
            scales = shapes.get(name.removesuffix("weight") + "scales")
            inputs = scales[1][-1] * group if scales is not None else inputs * 32 // (bits or 4)
        found[int(match[1])].append(Linear(inside, inputs, outputs, copies))
    return tuple(tuple(found[index]) for index in sorted(found))
