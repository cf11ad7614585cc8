"""MLX arrays as the bytes of GGUF tensors, a few rows at a time so that memory stays small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from node.errors import UserError

TYPES: dict[str, Type] = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
CHUNK_ELEMENTS = 1 << 24
Q8_0_BLOCK = 32


def stored_type(value: mx.array, wanted: Type, *, exact: bool) -> Type:
    """The type a tensor is written in: fp32 where exactness matters, f16 where q8_0 blocks do not divide its rows."""
    if exact:
        return Type.F32
    if wanted == Type.Q8_0 and value.shape[-1] % Q8_0_BLOCK:
        return Type.F16
    return wanted


def nbytes(value: mx.array, kind: Type) -> int:
    """Bytes of a tensor in a file."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(value.size) // block * size


def encode(name: str, value: mx.array, kind: Type) -> Iterator[npt.NDArray[Any]]:
    """Yield a tensor's bytes in order, a few rows at a time.

    Args:
        name: for messages.
        value: any shape; rows are its last dimension.
        kind: what to write.

    Raises:
        UserError: it holds a number that f16 cannot.
    """
    rows = value.reshape(-1, value.shape[-1])
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    mx.eval(rows)
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        if kind == Type.BF16:
            yield np.array(part.astype(mx.bfloat16).view(mx.uint16))
        elif kind == Type.F16:
            yield _half(name, part)
        else:
            full = np.array(part.astype(mx.float32))
            yield full if kind == Type.F32 else gguf.quants.quantize(full, kind)


def _half(name: str, part: mx.array) -> npt.NDArray[np.float16]:
    largest = float(np.array(mx.abs(part).max().astype(mx.float32)))
    if math.isfinite(largest) and largest > float(np.finfo(np.float16).max):
        raise UserError(f"--export-gguf: {name} holds {largest:.3g}, too large for f16; use --gguf-type bf16 or f32")
    return np.array(part.astype(mx.float16))
