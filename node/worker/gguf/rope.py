"""Rotary position embeddings: which scaling keys and factor tensors say what the MLX model computes."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from node.errors import UserError
from node.worker.gguf.families import Shape

Tensors = dict[str, npt.NDArray[np.float32]]


def add_rope(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Write the base frequency, the rotated dimensions and the scaling of position embeddings.

    Raises:
        UserError: llama.cpp has no such scaling.
    """
    if shape.rope_dims % 2:
        raise UserError(f"--export-gguf: {shape.rope_dims} rotated dimensions per head; llama.cpp needs an even number")
    writer.add_rope_dimension_count(shape.rope_dims)
    writer.add_rope_freq_base(float(shape.get("rope_theta", 10000.0)))
    if (local := getattr(shape.args, "rope_local_base_freq", None)) is not None:
        writer.add_rope_freq_base_swa(float(local))
    scaling = _scaling(shape)
    kind = _kind(scaling)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    elif kind == "yarn":
        _add_yarn(writer, scaling)
    elif kind == "longrope":
        original = _original_context(shape, scaling)
        if shape.family.architecture == gguf.MODEL_ARCH.LLAMA:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        # Microsoft's LongRoPE (arXiv 2402.13753) scales attention by this when the context has grown.
        grown = shape.context / original
        factor = math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0
        writer.add_rope_scaling_attn_factors(factor)
    elif kind not in ("default", "llama3", "dynamic"):
        raise UserError(f"--export-gguf: llama.cpp has no {kind!r} scaling of position embeddings")


def rope_tensors(shape: Shape) -> Tensors:
    """Factor tensors by their GGUF names, each (rope_dims / 2,)."""
    scaling = _scaling(shape)
    kind = _kind(scaling)
    if kind == "llama3":
        if shape.family.architecture != gguf.MODEL_ARCH.LLAMA:
            raise UserError(f"--export-gguf: llama.cpp has no 'llama3' rope scaling for {shape.model_type} models")
        return {"rope_freqs.weight": _llama3_factors(shape, scaling)}
    if kind == "longrope":
        found = {
            f"rope_factors_{name}.weight": np.asarray(scaling[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
        if any(factors.shape != (shape.rope_dims // 2,) for factors in found.values()):
            raise UserError(f"rope_scaling: long_factor and short_factor must have {shape.rope_dims // 2} numbers each")
        return found
    return {}


def _scaling(shape: Shape) -> dict[str, Any]:
    """The scaling that MLX computes with; model types without such an argument ignore it."""
    return dict(getattr(shape.args, "rope_scaling", None) or {})


def _kind(scaling: dict[str, Any]) -> str:
    kind = str(scaling.get("type") or scaling.get("rope_type") or "default").lower()
    return {"su": "longrope", "deepseek_yarn": "yarn"}.get(kind, kind)


def _original_context(shape: Shape, scaling: dict[str, Any]) -> int:
    return int(scaling.get("original_max_position_embeddings") or shape.get("original_max_position_embeddings", 4096))


def _add_yarn(writer: gguf.GGUFWriter, scaling: dict[str, Any]) -> None:
    """YaRN (arXiv 2309.00071), with MLX's defaults where the configuration is silent."""
    factor = float(scaling["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings", 4096)))
    writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast", 32)))
    writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow", 1)))
    wanted = _mscale(factor, scaling.get("mscale", 1)) / _mscale(factor, scaling.get("mscale_all_dim", 0))
    # llama.cpp multiplies by _mscale(factor, 1) by itself.
    writer.add_rope_scaling_attn_factors(wanted / _mscale(factor, 1))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3_factors(shape: Shape, scaling: dict[str, Any]) -> npt.NDArray[np.float32]:
    """What each frequency is divided by: 1 for short waves, ``factor`` for long ones, a blend between."""
    factor = float(scaling["factor"])
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    original = float(scaling.get("original_max_position_embeddings", 8192))
    dims = shape.rope_dims
    periods = 2 * np.pi * float(shape.get("rope_theta", 10000.0)) ** (np.arange(0, dims, 2) / dims)
    blend = np.clip((original / periods - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - blend) / factor + blend)).astype(np.float32)
