"""``--resume``: the options of the interrupted run, with what may change changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.config import TrainConfig, flag
from coordinator.config_file import merge, read_yaml
from coordinator.runfolder import RunFolder
from node.errors import UserError

# The rest decides what is computed: with any of it changed, the run would not be the same run.
MAY_CHANGE = frozenset(
    {
        "iters", "epochs", "save_every", "keep_last", "val_batches", "steps_per_report", "steps_per_eval",
        "early_stop", "sample_prompt", "sample_tokens", "test", "test_batches", "report_to", "project_name",
        "fuse", "save_path", "dequantize", "export_gguf", "gguf_path", "gguf_type", "export_peft", "upload_repo",
        "hf_path", "nodes", "local", "min_nodes", "force_all", "reduce", "ring_encryption", "wait", "force",
        "clear_cache_threshold", "reuse_prefix", "trust_remote_code", "adapter_path",
    }
)  # fmt: skip


def resumed_config(folder: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The options to go on with.

    Args:
        folder: of the run.
        given: options said now, on the command line or in a file.

    Raises:
        UserError: there is no run to resume, or an option is said that would make it another run.
    """
    run = RunFolder(folder)
    if not run.config.exists() or (run.run_id() is None and not run.checkpoints.exists()):
        raise UserError(f"--resume: {folder} holds no run; give its folder with --adapter-path, or leave --resume out")
    before = read_yaml(run.config)
    said = {name: value for name, value in given.items() if value is not None}
    if said.get("gradient_dtype") == "auto":
        del said["gradient_dtype"]  # the plan has chosen once
    then, now = _decisive(merge(before, {})), _decisive(merge(before, said))
    for name, value in now.items():
        if value != then[name] and not _same_path(value, then[name]):
            raise UserError(
                f"--resume: {flag(name)} was {then[name]} in this run and cannot become {value};"
                " start a new run, with --resume-adapter-file to begin from these weights"
            )
    values = {**before, **{name: said[name] for name in said if name in MAY_CHANGE}}
    # A folder may come from somebody else: whether Python files may run is said by who runs the command, each time.
    values["trust_remote_code"] = said.get("trust_remote_code", False)
    if "epochs" in said:
        values.pop("iters", None)
    values["adapter_path"] = str(folder)
    return merge(values, {})


def taken_up(config: TrainConfig) -> TrainConfig:
    """The options to go on with the run in ``config.adapter_path``: its own, but for those that differ from defaults.

    Raises:
        UserError: see ``resumed_config``.
    """
    given = {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != _default(field)
    }
    return resumed_config(Path(config.adapter_path), given)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """What decides what is computed; of options that say the same in two ways, what they come to."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    for name in ("mask_prompt", "lora_alpha", "rslora"):
        del values[name]
    return {**values, "mask": config.target_mask, "lora_scale": config.scale}


def _same_path(now: Any, then: Any) -> bool:
    if not isinstance(now, str) or not isinstance(then, str):
        return False
    return Path(now).expanduser().resolve() == Path(then).expanduser().resolve()
