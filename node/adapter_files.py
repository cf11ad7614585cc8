"""The settings of an adapter in ``mlx_lm``'s form, as far as they decide what is built from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

from node.errors import UserError
from node.jsons import read_json
from node.spec import FineTuneType

SETTINGS = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
MOST_RANK = 1 << 16
MOST_LAYERS = 1 << 16
LARGEST_SCALE = 1e6


def read_settings(folder: Path) -> dict[str, Any]:
    """An adapter's settings.

    Raises:
        UserError: they cannot be read, or a value cannot be meant.
    """
    file = folder / SETTINGS
    settings = read_json(file)
    kind = settings.get("fine_tune_type", "lora")
    if kind not in get_args(FineTuneType):
        raise _refusal(file, "fine_tune_type", kind, ", ".join(get_args(FineTuneType)))
    if kind == "full":
        return settings
    layers = settings.get("num_layers", 16)
    if type(layers) is not int or not -1 <= layers <= MOST_LAYERS:
        raise _refusal(file, "num_layers", layers, f"a whole number from -1 (all) to {MOST_LAYERS}")
    parameters = settings.get("lora_parameters", {})
    if not isinstance(parameters, dict):
        raise _refusal(file, "lora_parameters", parameters, "an object")
    _check_parameters(file, parameters)
    return settings


def _check_parameters(file: Path, parameters: dict[str, Any]) -> None:
    rank, keys = parameters.get("rank", 8), parameters.get("keys")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise _refusal(file, "rank", rank, f"a whole number from 1 to {MOST_RANK}")
    for name, lowest, highest in (("scale", -LARGEST_SCALE, LARGEST_SCALE), ("dropout", 0.0, 1.0)):
        value = parameters.get(name, 0.0)
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not known or not lowest <= value <= highest:
            raise _refusal(file, name, value, f"a number from {lowest:g} to {highest:g}")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise _refusal(file, "keys", keys, "a list of names")


def _refusal(file: Path, name: str, value: object, wanted: str) -> UserError:
    return UserError(
        f"{file}: {name} is {repr(value)[:60]}; it must be {wanted}; copy it again from where it was trained"
    )
