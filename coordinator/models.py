"""Find the model that a person names: a folder here, or a repository on the Hugging Face Hub. Nothing is loaded."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator import hub
from coordinator.home import home
from coordinator.weight_files import Shapes, read_header, weight_files, weight_shapes
from node.errors import UserError
from node.jsons import read_json
from node.manifest import needs_own_code

__all__ = ["Peek", "ResolvedModel", "check_folder", "looks_like_path", "peek", "resolve", "weight_shapes"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is here and whole.

    Attributes:
        path: its folder.
        name: what people call it: the repository, or the folder as it was given.
        config: its ``config.json``.
        revision: commit of the repository, None for a folder.
    """

    path: Path
    name: str
    config: dict[str, Any]
    revision: str | None


@dataclass(frozen=True)
class Peek:
    """What can be known of a model without having its weights.

    Attributes:
        name: what people call it.
        config: its ``config.json``.
        shapes: type and shape of every tensor, None where they could not be learnt.
    """

    name: str
    config: dict[str, Any]
    shapes: Shapes | None


def resolve(
    model: str,
    *,
    progress: hub.Progress | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """Find a model and check that it can be loaded; a repository is downloaded, or used from the cache where offline.

    Args:
        model: a folder, or a repository id of the Hub such as ``mlx-community/Llama-3.2-1B-Instruct-4bit``.
        progress: is told of a download: task, bytes done, bytes in all.
        revision: branch, tag or commit of the repository.
        trust_remote_code: whether the model's own Python files may run.

    Raises:
        UserError: there is no such model, it is not whole, ``mlx_lm`` does not know its kind, or it needs leave to run
            its own files.
    """
    named = looks_like_path(model)
    path = _folder(model) if named else _download(model, revision, progress)
    config = check_folder(path)
    if config.get("model_file") is not None and not trust_remote_code:
        raise UserError(needs_own_code(f"--model {model}", str(config["model_file"])))
    return ResolvedModel(path, model, config, None if named else hub.revision_of(path))


def peek(model: str, revision: str | None = None) -> Peek:
    """Learn a model's configuration and, where possible, the shapes of its tensors; weights are not downloaded.

    Raises:
        UserError: there is no such model, or its configuration cannot be read.
    """
    if looks_like_path(model):
        path = _folder(model)
        return Peek(model, _checked_config(path), weight_shapes(path))
    cached = hub.cached_snapshot(model, revision) if _is_repository(model) else None
    if cached is not None and any(cached.glob("model*.safetensors")):
        return Peek(model, _checked_config(cached), weight_shapes(cached))
    folder = _download(model, revision, None, ["config.json"])
    return Peek(model, _checked_config(folder), hub.remote_shapes(model, revision))


def looks_like_path(model: str) -> bool:
    """Whether a model's name means a folder: it is written as a path, or there is something of that name."""
    written = model.startswith((".", "/", "~", "\\")) or "\\" in model or model.endswith("/") or model.count("/") > 1
    return written or Path(model).exists()


def check_folder(path: Path) -> dict[str, Any]:
    """Check that a folder holds a whole model that ``mlx_lm`` can load.

    Returns:
        Its configuration.

    Raises:
        UserError: what is missing or damaged.
    """
    _check_links(path)
    config = _checked_config(path)
    for file in weight_files(path):
        read_header(file)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES) and not any(path.glob("*.tiktoken")):
        raise UserError(f"{path}: no tokenizer (tokenizer.json or tokenizer.model); copy it from the original model")
    return config


def _check_links(path: Path) -> None:
    """Refuse a folder whose files lead elsewhere: they would be sent to other machines, or fused and uploaded.

    The Hub's cache and our store consist of links; and people link large weights, which are checked to be some.
    """
    real = path.resolve()
    allowed = (real, (home() / "store").resolve(), *((real.parent.parent,) if real.parent.name == "snapshots" else ()))
    if allowed[1] in real.parents:
        return
    for file in sorted(path.iterdir()):
        target = file.resolve()
        weights = file.suffix == target.suffix == ".safetensors"
        if file.is_symlink() and not weights and not any(target.is_relative_to(folder) for folder in allowed):
            raise UserError(f"{file}: a link that leads out of the model's folder (to {target}); put the file there")


def known_model_types() -> set[str]:
    """Every ``model_type`` that the installed ``mlx_lm`` has a file for, remapped ones included; imports nothing."""
    folder = _mlx_lm_folder()
    if folder is None:
        return set()
    return {file.stem for file in (folder / "models").glob("*.py")} | set(remapped_model_types())


def remapped_model_types() -> dict[str, str]:
    """``mlx_lm``'s table of model types that load as another type, read from its source."""
    folder = _mlx_lm_folder()
    if folder is None:
        return {}
    for statement in ast.parse((folder / "utils.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "MODEL_REMAPPING" for target in statement.targets
        ):
            return dict(ast.literal_eval(statement.value))
    return {}


def _mlx_lm_folder() -> Path | None:
    found = importlib.util.find_spec("mlx_lm")
    locations = list(found.submodule_search_locations or []) if found is not None else []
    return Path(locations[0]) if locations else None


def _folder(model: str) -> Path:
    """The folder that was named, or an error with the nearest names beside it."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"--model {model}: a file; pass the folder that holds config.json and the weights")
    parent = path.parent
    if not parent.is_dir():
        raise UserError(f"--model {model}: no such folder ({parent} does not exist either)")
    raise UserError(f"--model {model}: no such folder{_near(path.name, parent)}")


def _near(name: str, parent: Path) -> str:
    """Words that suggest a folder of a similar name, or nothing."""
    try:
        names = {entry.name.lower(): entry.name for entry in parent.iterdir() if entry.is_dir()}
    except OSError:
        return ""
    close = [str(parent / names[found]) for found in difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _is_repository(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model, re.ASCII) is not None


def _download(
    model: str, revision: str | None, progress: hub.Progress | None, patterns: Sequence[str] = hub.ALLOW_PATTERNS
) -> Path:
    if not _is_repository(model):
        raise UserError(f"--model {model!r}: neither a folder nor a repository id such as org/name")
    try:
        return hub.download(model, revision, progress, patterns)
    except hub.NotFound as error:
        first, *rest = Path(model).parts
        parent = Path(first) if rest else Path()
        near = _near(rest[0] if rest else first, parent) if parent.is_dir() else ""
        raise UserError(f"{error}{near}") from error


def _checked_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a folder, of a kind that can be loaded."""
    file = path / "config.json"
    if not file.is_file():
        adapter = (path / "adapter_config.json").exists()
        hint = "; it is an adapter: pass it as --adapter-path and its base model as --model" if adapter else ""
        raise UserError(f"{path}: no config.json, so this is no model folder{hint}")
    config = read_json(file)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{file}: has no model_type, so it is unknown how to load this model")
    known = known_model_types()
    if known and "model_file" not in config and kind not in known:
        near = difflib.get_close_matches(kind, known, n=2)
        hint = f" (known and similar: {', '.join(near)})" if near else ""
        raise UserError(f"{file}: the installed mlx_lm does not know model_type {kind!r}{hint}")
    return config
