"""Safetensors files, read by their headers alone: what they hold, and whether they are whole."""

from __future__ import annotations

import re
from pathlib import Path

from node.errors import TandemError, UserError
from node.jsons import MOST_INDEX_BYTES, read_json
from node.spec import FileRef
from node.tensors import read_tensors

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Of each tensor by name: safetensors dtype (``F32``, ``BF16``, …) and shape."""


def read_header(path: Path) -> Shapes:
    """Names, types and shapes of a file's tensors.

    Raises:
        UserError: the file is missing, is no whole safetensors file, or its header cannot be meant.
    """
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_tensors(path).items()}


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


def _named_in_index(index: Path) -> set[str]:
    try:
        files = {str(name) for name in read_json(index, MOST_INDEX_BYTES)["weight_map"].values()}
        for name in files:
            FileRef(name, "", 0)  # bare: no weights are looked for elsewhere
        return files
    except (TandemError, KeyError, TypeError, AttributeError) as error:
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
