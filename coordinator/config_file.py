"""YAML configuration: ``mlx_lm``'s files and our own, under the flags of the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from coordinator.config import MLX_LM_SCALE, TrainConfig, names, unknown_option
from node.errors import UserError
from node.jsons import MOST_CONFIG_BYTES
from node.sizes import show_size

# Other spellings, and keys of mlx_lm that mean nothing here.
ALIASES = {"lora_layers": "num_layers", "de_quantize": "dequantize"}
ACCEPTED = ("train", "config")
LORA_KEYS = {"rank": "lora_rank", "scale": "lora_scale", "alpha": "lora_alpha", "dropout": "lora_dropout"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text and 010 as 8; people mean numbers in tens."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    """A mapping; of two equal keys YAML would silently take the last."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        seen.add(str(key.value))
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value)
    except ValueError:
        return int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
# The first resolver that fits wins: whole numbers before the wider pattern of floats.
for _letter, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_letter] = sorted(_resolvers, key=lambda item: not item[0].endswith(":int"))


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that the loader would take for something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_mapping(text: str) -> dict[str, Any] | None:
    """A mapping in YAML or JSON; None when the text is none."""
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def read_yaml(path: Path, *, to_train: bool = False) -> dict[str, Any]:
    """The options in a YAML file, by our names.

    Args:
        path: the file.
        to_train: refuse a file that says ``train: false``, with which ``mlx_lm`` only evaluates.

    Raises:
        UserError: not readable, not YAML, or a key that is no option.
    """
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise UserError(f"--config {path}: more than {show_size(MOST_CONFIG_BYTES)}; that is no file of options")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except RecursionError as error:
        raise UserError(f"--config {path}: nested too deeply to be options") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected 'option: value' lines, found {type(content).__name__}")
    known = set(names())
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = ALIASES.get(name, name)
        if name == "train" and value is False and to_train:
            raise UserError(f"--config {path}: it says train: false; to evaluate only: coordinator test -c {path}")
        if name == "wandb":  # of older mlx_lm: the project's name
            options |= {"report_to": ("wandb",), "project_name": value} if value else {}
            continue
        if name in ACCEPTED:
            continue
        if name not in known:
            raise unknown_option(str(key), f"--config {path}")
        options[name] = _words(name, value) if _is_tuple(name) else value
    # mlx_lm writes `key: null` for "not set".
    return {name: value for name, value in options.items() if value is not None}


def merge(file_options: Mapping[str, Any], flag_options: Mapping[str, Any]) -> TrainConfig:
    """Flags over the file over the preset over the defaults.

    Raises:
        UserError: a value that cannot be.
    """
    flags = _spread({name: value for name, value in flag_options.items() if value is not None})
    options = {**_spread(file_options), **flags}
    for given, other in (("lora_alpha", "lora_scale"), ("iters", "epochs"), ("mask", "mask_prompt")):
        for name, twin in ((given, other), (other, given)):
            if name in flags and twin not in flags:
                options.pop(twin, None)
    if options.get("preset") == "mlx-lm":
        if "lr_schedule" not in options:
            options.setdefault("warmup", 0)
        if not {"lora_scale", "lora_alpha", "rslora"} & set(options):
            options["lora_scale"] = MLX_LM_SCALE
    try:
        return TrainConfig(**options)
    except TypeError as error:
        raise UserError(f"an option has a value of the wrong kind: {error}") from error


def write_yaml(config: TrainConfig) -> str:
    """A file that ``-c`` reads back as the same configuration."""
    values = {}
    for name, value in dataclasses.asdict(config).items():
        if value is not None and value not in ((), {}):
            values[name] = list(value) if isinstance(value, tuple) else value
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _spread(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with ``lora_parameters`` taken apart; what is said outside of it wins."""
    spread = dict(options)
    parameters = spread.pop("lora_parameters", None)
    if parameters is None:
        return spread
    if not isinstance(parameters, Mapping):
        raise UserError("lora_parameters must be a mapping with rank, scale, dropout, keys")
    for key, value in parameters.items():
        name = "lora_keys" if key == "keys" else LORA_KEYS.get(key)
        if name is None:
            raise UserError(f"lora_parameters: unknown key {key}; known are {', '.join([*LORA_KEYS, 'keys'])}")
        if value is not None:
            spread.setdefault(name, _words(name, value) if key == "keys" else value)
    return spread


def _words(name: str, value: Any) -> Any:
    """A list, or words with commas between them; a prompt may have commas of its own."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    return (value,) if name == "sample_prompt" else tuple(word.strip() for word in value.split(",") if word.strip())


def _is_tuple(name: str) -> bool:
    (item,) = (field for field in dataclasses.fields(TrainConfig) if field.name == name)
    return str(item.type).startswith("tuple")
