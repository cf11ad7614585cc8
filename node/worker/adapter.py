"""Put a trained adapter on a model, and refuse one that belongs to another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from node.adapter_files import WEIGHTS, read_settings
from node.errors import UserError
from node.tensors import check_numbers


def apply_adapter(model: nn.Module, folder: str) -> None:
    """Load an adapter in ``mlx_lm``'s form onto a model, in place.

    Raises:
        UserError: it cannot be read, or its names or shapes are not those of this model.
    """
    try:
        read_settings(Path(folder))
        check_numbers(Path(folder) / WEIGHTS, floats_only=True)
    except UserError as error:
        raise UserError(f"cannot use the adapter in {folder}: {str(error).removeprefix(f'{folder}/')}") from error
    try:
        load_adapters(model, folder)
        held: Any = mx.load(str(Path(folder) / WEIGHTS))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(_reason(error, folder)) from error
    names = [name for name, _ in tree_flatten(model.parameters()) if name.endswith((".lora_a", ".lora_b"))]
    # What is missing would silently stay at its random start, without effect.
    missing = [name for name in names if name not in held]
    if missing:
        raise UserError(
            f"the adapter in {folder} does not belong to this model: it has no {missing[0]}"
            f" ({len(missing)} of {len(names)} tensors are missing); --model must be the one it was trained on"
        )


def _reason(error: Exception, folder: str) -> str:
    """One line of what may be a list of every tensor."""
    heading, *tensors = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if tensors:
        more = f" ({len(tensors)} tensors do not fit)" if len(tensors) > 1 else ""
        return (
            f"the adapter in {folder} does not belong to this model: {tensors[0]}{more};"
            " --model must be the one it was trained on"
        )
    return f"cannot use the adapter in {folder}: {heading}"
