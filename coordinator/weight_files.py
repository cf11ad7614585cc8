"""Safetensors files, read by their headers alone: what they hold, and whether they are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from node.errors import UserError

HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor by name: safetensors dtype (``F32``, ``BF16``, …) and shape."""


def read_header(path: Path) -> Shapes:
    """Names, types and shapes of a file's tensors.

    Raises:
        UserError: the file is missing, is no safetensors file, or is cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise UserError(f"{path}: a Git LFS pointer, not the weights; fetch them with: git lfs pull")
            if len(start) < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
                raise UserError(f"{path}: not a whole safetensors file ({size} bytes); copy or download it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: the header is damaged; copy or download the file again") from error
    shapes, end = _entries(path, header)
    if size < 8 + length + end:
        raise UserError(f"{path}: cut off at {size} of {8 + length + end} bytes; copy or download it again")
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, as ``mlx_lm`` picks them; every file that should be there is.

    Raises:
        UserError: there are none, or some are missing.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(_what_else(folder))
    index = folder / "model.safetensors.index.json"
    expected = _named_in_index(index) if index.exists() else _named_by_shards(files)
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} weight files are)")
    return files


def weight_shapes(path: Path | str) -> Shapes:
    """Type and shape of every tensor of a model folder, from the headers of its weight files.

    Raises:
        UserError: the files are missing, incomplete or damaged.
    """
    shapes: Shapes = {}
    for file in weight_files(Path(path)):
        shapes.update(read_header(file))
    return shapes


def _entries(path: Path, header: Any) -> tuple[Shapes, int]:
    """What a parsed header lists, and where the last tensor ends."""
    shapes: Shapes = {}
    end = 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                shapes[name] = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
                end = max(end, int(entry["data_offsets"][1]))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: the header is damaged; copy or download the file again") from error
    return shapes, end


def _named_in_index(index: Path) -> set[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {str(name) for name in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read as an index of weights; copy or download it again") from error


def _named_by_shards(files: list[Path]) -> set[str]:
    """Names of all shards of the sets that these files belong to."""
    names = {file.name for file in files}
    for match in filter(None, map(_SHARD.match, sorted(names))):
        names |= {
            f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            for number in range(1, int(match["count"]) + 1)
        }
    return names


def _what_else(folder: Path) -> str:
    """Say what a folder without weights holds instead."""
    if (folder / "adapter_config.json").exists():
        return f"{folder}: an adapter, not a model; pass its base model as --model and this folder as --adapter-path"
    for pattern in ("*.gguf", "pytorch_model*.bin", "*.pth", "*.npz"):
        if found := sorted(folder.glob(pattern)):
            name = found[0].name
            return f"{folder}: weights only as {name}; convert the original with: mlx_lm.convert --hf-path MODEL"
    return f"{folder}: no weights (model*.safetensors) in it"
