"""An adapter's folder: whether it is one, and the options of the run that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.config_file import read_yaml
from coordinator.runfolder import RunFolder
from node.adapter_files import SETTINGS as CONFIG
from node.adapter_files import WEIGHTS, read_settings
from node.errors import UserError
from node.tensors import check_numbers


@dataclass(frozen=True)
class Adapter:
    """An adapter in ``mlx_lm``'s form.

    Attributes:
        path: its folder.
        settings: options of the run that made it, by our names; what is not known is missing.
    """

    path: Path
    settings: dict[str, Any]


def read_adapter(folder: str) -> Adapter:
    """Check that a folder holds an adapter, and read what is known of its run.

    Raises:
        UserError: there is no such folder, or it holds something else.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise UserError(f"--adapter-path {folder}: no such folder")
    if path.is_file():
        raise UserError(f"--adapter-path {folder}: a file; pass the folder that holds it and {CONFIG}")
    config = _config(folder, path)
    if not (path / WEIGHTS).is_file():
        raise UserError(f"--adapter-path {folder}: no {WEIGHTS} in it; did training save anything yet?")
    check_numbers(path / WEIGHTS, floats_only=True)
    # Our own runs keep every option, with paths that hold from anywhere.
    run = RunFolder(path)
    ours = read_yaml(run.config) if run.run_id() is not None and run.config.exists() else {}
    known = {name: value for name, value in {**config, **ours}.items() if value is not None}
    # Whoever made the adapter cannot decide that code of theirs may run here.
    known.pop("trust_remote_code", None)
    return Adapter(path, known)


def model_of(given: str, adapter: Adapter | None) -> str:
    """The model to load: the one that was said, or the one that the adapter was trained on.

    Raises:
        UserError: neither is known.
    """
    if given:
        return given
    if adapter is None:
        raise UserError("--model: say which model, a Hugging Face repo or a local folder, or give an --adapter-path")
    recorded = adapter.settings.get("model")
    if not isinstance(recorded, str) or not recorded:
        raise UserError(f"--model: {adapter.path / CONFIG} does not say which model the adapter belongs to; say it")
    return recorded


def _config(folder: str, path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        if (path / "config.json").is_file():
            raise UserError(f"--adapter-path {folder}: a whole model, not an adapter; pass it as --model")
        raise UserError(f"--adapter-path {folder}: no {CONFIG} in it, so this is no adapter")
    config = read_settings(path)
    if "peft_type" in config:
        raise UserError(f"--adapter-path {folder}: an adapter in PEFT's layout; only mlx_lm's can be loaded here")
    if config.get("fine_tune_type", "lora") != "full" and not {"num_layers", "lora_parameters"} <= set(config):
        raise UserError(f"{file}: has no num_layers and lora_parameters; copy it again from where it was trained")
    return config
