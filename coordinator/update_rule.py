"""Learning-rate schedules and optimizer arguments, checked by name and kind before a model is loaded.

The tables stand for ``mlx.optimizers``, which the coordinator does not import; a test compares them with it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from node.errors import UserError

# Arguments of each schedule in order, and how many of them must be given.
SCHEDULES: dict[str, tuple[tuple[str, ...], int]] = {
    "exponential_decay": (("init", "decay_rate"), 2),
    "step_decay": (("init", "decay_rate", "step_size"), 3),
    "cosine_decay": (("init", "decay_steps", "end"), 2),
    "linear_schedule": (("init", "end", "steps"), 3),
}
COUNTS = ("step_size", "decay_steps", "steps")
SCHEDULE_KEYS = ("name", "arguments", "warmup", "warmup_init")

# Arguments of each optimizer beside the learning rate, and what each of them is.
ARGUMENTS: dict[str, dict[str, str]] = {
    "adam": {"betas": "betas", "eps": "positive", "bias_correction": "switch"},
    "adamw": {"betas": "betas", "eps": "positive", "weight_decay": "number", "bias_correction": "switch"},
    "muon": {"momentum": "number", "weight_decay": "number", "nesterov": "switch", "ns_steps": "count"},
    "sgd": {"momentum": "number", "weight_decay": "number", "dampening": "number", "nesterov": "switch"},
    "adafactor": {
        "eps": "pair",
        "clip_threshold": "positive",
        "decay_rate": "number",
        "beta_1": "fraction",
        "weight_decay": "number",
        "scale_parameter": "switch",
        "relative_step": "switch",
        "warmup_init": "switch",
    },
}
KINDS = {
    "betas": "two numbers from 0 to below 1, as [0.9, 0.95]",
    "pair": "two numbers, as [1.0e-30, 1.0e-3]",
    "number": "a number",
    "positive": "a number above 0",
    "fraction": "a number from 0 to below 1",
    "count": "a whole number of at least 1",
    "switch": "true or false",
}


def check_schedule(schedule: Mapping[str, Any]) -> None:
    """Check an ``lr_schedule`` as ``mlx_lm``'s YAML writes it.

    Raises:
        UserError: a name or key that is unknown, or arguments that do not fit.
    """
    for key in schedule:
        if key not in SCHEDULE_KEYS:
            raise UserError(f"lr_schedule: unknown key {key}{nearest(str(key), SCHEDULE_KEYS)}")
    name = schedule.get("name")
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UserError(f"lr_schedule: unknown name {name}{nearest(str(name), SCHEDULES)}")
    names, needed = SCHEDULES[name]
    arguments = schedule.get("arguments")
    form = f"[{', '.join([*names[:needed], *(f'{extra} (optional)' for extra in names[needed:])])}]"
    if not isinstance(arguments, list | tuple) or not needed <= len(arguments) <= len(names):
        raise UserError(f"lr_schedule: {name} takes arguments: {form}, not {arguments}")
    for argument, value in zip(names, arguments, strict=False):
        kind = "count" if argument in COUNTS else "number"
        if not _fits(kind, value):
            raise UserError(f"lr_schedule: {argument} of {name} must be {KINDS[kind]}, not {value!r}")
    warmup = schedule.get("warmup")
    if warmup not in (None, 0) and not _fits("count", warmup):
        raise UserError(f"lr_schedule: warmup must be a whole number of steps, not {warmup!r}")
    if not _fits("number", schedule.get("warmup_init", 0)):
        raise UserError(f"lr_schedule: warmup_init must be a number, not {schedule['warmup_init']!r}")


def check_arguments(optimizer_config: Mapping[str, Any]) -> None:
    """Check ``optimizer_config``: arguments by optimizer name.

    Raises:
        UserError: an optimizer or an argument that is unknown, or a value of the wrong kind.
    """
    for name, arguments in optimizer_config.items():
        if name not in ARGUMENTS:
            raise UserError(f"optimizer_config: unknown optimizer {name}{nearest(str(name), ARGUMENTS)}")
        known = ARGUMENTS[name]
        if not isinstance(arguments, Mapping | None):
            raise UserError(f"optimizer_config: {name} must hold 'argument: value' lines, not {arguments!r}")
        for argument, value in (arguments or {}).items():
            if argument == "learning_rate":
                raise UserError(f"optimizer_config: {name}: the learning rate is set by learning_rate, outside of it")
            if argument not in known:
                near = nearest(str(argument), known)
                raise UserError(f"optimizer_config: {name} has no argument {argument}{near}")
            if not _fits(known[argument], value) and not (argument == "beta_1" and value is None):
                kind = KINDS[known[argument]]
                raise UserError(f"optimizer_config: {argument} of {name} must be {kind}, not {value!r}")
    sgd = optimizer_config.get("sgd") or {}
    if sgd.get("nesterov") and (sgd.get("momentum", 0) <= 0 or sgd.get("dampening", 0) != 0):
        raise UserError("optimizer_config: nesterov of sgd needs a momentum above 0 and no dampening")


def nearest(word: str, known: Iterable[str]) -> str:
    """Words that name the nearest of the known ones, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(names)}"


def _fits(kind: str, value: Any) -> bool:
    if kind == "switch":
        return isinstance(value, bool)
    if kind in ("betas", "pair"):
        part = "fraction" if kind == "betas" else "number"
        return isinstance(value, list | tuple) and len(value) == 2 and all(_fits(part, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if kind == "count":
        return isinstance(value, int) and value >= 1
    return kind == "number" or (value > 0 if kind == "positive" else 0 <= value < 1)
