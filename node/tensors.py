"""Safetensors files, looked at without MLX: what their headers say, whether that can be, and whether all is numbers.

MLX believes a header. Whatever comes from elsewhere is checked here first.
"""

from __future__ import annotations

import itertools
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from node.errors import UserError
from node.sizes import show_size

HEADER_LIMIT_BYTES = 100_000_000
"""The format's own limit."""
LONGEST_AXIS = (1 << 31) - 1
"""MLX has no longer ones."""
MOST_AXES = 32
CHUNK_BYTES = 16 << 20
AGAIN = "copy or download it again"

_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# The bits of the exponent: all set in infinities and in what is no number, and in nothing else.
_EXPONENTS: dict[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
FLOATS = frozenset({"F16", "BF16", "F32"})
"""Types that weights of adapters and states may have."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file.

    Attributes:
        dtype: as safetensors calls it: ``F32``, ``BF16``, …
        shape: of it.
        begin, end: in bytes from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a file's header says, by name.

    Raises:
        UserError: the file is missing, is no whole safetensors file, or its header cannot be meant.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: no ordinary file; {AGAIN}")
        with path.open("rb") as file:
            return _read(path, file, found.st_size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _read(path: Path, file: BinaryIO, size: int) -> dict[str, Tensor]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise UserError(f"{path}: a Git LFS pointer, not the weights; fetch them with: git lfs pull")
    if len(start) < 8 or length > size - 8:
        raise UserError(f"{path}: not a whole safetensors file ({size} bytes); {AGAIN}")
    if length > HEADER_LIMIT_BYTES:
        limit = show_size(HEADER_LIMIT_BYTES)
        raise UserError(f"{path}: a header of {show_size(length)}; the format allows {limit}; {AGAIN}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the header is damaged; {AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is damaged; {AGAIN}")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _tensor(path: Path, name: str, entry: Any, data: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the header is damaged at {name[:80]}; {AGAIN}") from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UserError(f"{path}: the header is damaged at {name[:80]}; {AGAIN}")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise UserError(f"{path}: {name[:80]} is of an unknown type {str(dtype)[:20]!r}; {AGAIN}")
    if len(shape) > MOST_AXES or any(axis > LONGEST_AXIS for axis in shape):
        raise UserError(f"{path}: {name[:80]} has a shape that no tensor has; {AGAIN}")
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise UserError(f"{path}: {name[:80]} does not have as many bytes as its shape and type need; {AGAIN}")
    return Tensor(dtype, tuple(shape), data + begin, data + end)


def _check_places(path: Path, tensors: dict[str, Tensor], data: int, size: int) -> None:
    """Tensors follow one another, without gaps or overlaps, up to the end of the file."""
    placed = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    end = max((tensor.end for _, tensor in placed), default=data)
    if size < end:
        raise UserError(f"{path}: cut off at {size} of {end} bytes; {AGAIN}")
    starts = [*(tensor.begin for _, tensor in placed), size]
    for (name, tensor), following in zip([("", Tensor("", (), data, data)), *placed], starts, strict=True):
        if tensor.end != following:
            what = "overlaps what follows" if following < tensor.end else "is followed by bytes of no tensor"
            raise UserError(f"{path}: {name[:80] or 'the header'} {what}; {AGAIN}")


def check_numbers(path: Path, *, floats_only: bool = False) -> dict[str, Tensor]:
    """Check that all numbers of a file are numbers, neither infinite nor NaN.

    Args:
        path: the file; read from one end to the other.
        floats_only: refuse tensors of other types than ``FLOATS``.

    Returns:
        As ``read_tensors``.

    Raises:
        UserError: as ``read_tensors``, or for the first tensor that holds something else.
    """
    tensors = read_tensors(path)
    try:
        with path.open("rb") as file:
            for name, tensor in tensors.items():
                if floats_only and tensor.dtype not in FLOATS:
                    raise UserError(f"{path}: {name[:80]} is of type {tensor.dtype}; weights are {_or(FLOATS)}")
                if not _is_finite(file, tensor):
                    raise UserError(f"{path}: {name[:80]} holds what is no number (NaN or infinite)")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    return tensors


def _is_finite(file: BinaryIO, tensor: Tensor) -> bool:
    if tensor.dtype not in _EXPONENTS:
        return True
    kind, exponent = _EXPONENTS[tensor.dtype]
    file.seek(tensor.begin)
    for begin in itertools.count(tensor.begin, CHUNK_BYTES):
        if begin >= tensor.end:
            return True
        bits = np.frombuffer(file.read(min(CHUNK_BYTES, tensor.end - begin)), kind)
        if bool(((bits & bits.dtype.type(exponent)) == exponent).any()):
            return False
    raise AssertionError("counting ends")


def _or(names: frozenset[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} or {last}"
