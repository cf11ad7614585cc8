"""What can be found out before anything expensive starts."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

from coordinator.config import TrainConfig
from coordinator.data.tokenset import TokenSet
from coordinator.memory.architecture import Architecture, architecture, has_experts
from coordinator.models import ResolvedModel
from coordinator.update_rule import nearest
from coordinator.weight_files import weight_shapes
from node.errors import UserError
from node.exports.folders import check_free
from node.exports.kinds import COMPANIONS, GGUF_MODEL_TYPES, PEFT_FILES, PEFT_MODEL_TYPES, WEIGHTS
from node.tensors import check_numbers

# The path of a module inside its block, in the name of one of its tensors.
_IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(?P<block>\d+)\.(?P<module>.+)\.[^.]+$")


def check_options(config: TrainConfig, *, resume: bool) -> None:
    """Mistakes that need nothing but the options.

    Raises:
        UserError: with the option's name and how to mend it.
    """
    if not config.model:
        raise UserError("--model: say which model, a Hugging Face repo or a local folder")
    if config.nodes == "local":
        if config.min_nodes > 1:
            raise UserError(f"--min-nodes {config.min_nodes} and --nodes local exclude each other; give one of them")
        if not config.local:
            raise UserError("--no-local and --nodes local exclude each other; give one of them")
    # A resumed run began from these weights perhaps, but needs them no more.
    if config.resume_adapter_file and not resume and not Path(config.resume_adapter_file).is_file():
        folder = Path(config.resume_adapter_file).is_dir()
        what = "a folder; name the adapters.safetensors in it" if folder else "no such file"
        raise UserError(f"--resume-adapter-file {config.resume_adapter_file}: {what}")
    if config.val_batches == 0:
        for option, given in (("--early-stop", config.early_stop), ("--sample-prompt", config.sample_prompt)):
            if given:
                raise UserError(f"{option} needs validations; --val-batches 0 turns them off")
    if config.reuse_prefix == "on" and config.neftune_alpha:
        raise UserError("--reuse-prefix on: with --neftune-alpha no row is twice the same; leave one of them out")
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name}: not installed; {sys.executable} -m pip install {name}")
    if not config.fuse and (config.upload_repo or config.dequantize):
        option = "--upload-repo" if config.upload_repo else "--dequantize"
        raise UserError(f"{option} needs --fuse: it is the fused model that it is about")


def check_model(config: TrainConfig, model: ResolvedModel, *, resume: bool) -> list[str]:
    """Options that do not fit the model, as far as its configuration and the headers of its weights tell.

    Returns:
        Warnings, one line each.

    Raises:
        UserError: with the option's name and how to mend it.
    """
    kind = model.config.get("model_type")
    if config.export_gguf and kind not in GGUF_MODEL_TYPES:
        known = ", ".join(GGUF_MODEL_TYPES)
        raise UserError(f"--export-gguf: cannot write model type {kind!r}; leave it out (supported: {known})")
    _check_targets(config, model)
    if config.fuse:
        check_free(Path(config.save_path), (*WEIGHTS, *COMPANIONS))
    if config.export_peft:
        check_free(Path(config.export_peft), PEFT_FILES)
        if config.fine_tune_type == "full" or kind not in PEFT_MODEL_TYPES:
            what = "a full fine-tune" if config.fine_tune_type == "full" else f"adapters of model type {kind!r}"
            raise UserError(f"--export-peft: PEFT has no form for {what}; leave it out")
        if config.lora_keys is None and has_experts(model.config):
            raise UserError("--export-peft: PEFT has no form for adapters of experts; leave it out, or set --lora-keys")
    if config.fine_tune_type == "full":
        return []
    if config.fine_tune_type == "dora" and config.lora_keys is None and has_experts(model.config):
        raise UserError("--fine-tune-type dora: expert layers have no DoRA; use lora, or set --lora-keys to the others")
    shape = architecture(model.config)
    if config.lora_rank > shape.hidden:
        raise UserError(
            f"--lora-rank {config.lora_rank} is more than the model is wide ({shape.hidden}); 4 to 64 are usual"
        )
    if config.resume_adapter_file and not resume:
        _check_adapter_file(config, shape)
    return _check_keys(config, model, shape)


def _check_targets(config: TrainConfig, model: ResolvedModel) -> None:
    """Folders to write must not be one another, nor the model's."""
    taken = {model.path.resolve(): "the model", Path(config.adapter_path).resolve(): "--adapter-path"}
    wanted = (("--save-path", config.save_path if config.fuse else None), ("--export-peft", config.export_peft))
    for option, folder in wanted:
        if folder is None:
            continue
        if Path(folder).resolve() in taken:
            raise UserError(f"{option} {folder}: that is the folder of {taken[Path(folder).resolve()]}; name another")
        taken[Path(folder).resolve()] = option


def _check_keys(config: TrainConfig, model: ResolvedModel, shape: Architecture) -> list[str]:
    """Compare ``--lora-keys`` with the names of the weights. Loading may rename modules, so doubt is no mistake."""
    if config.lora_keys is None:
        return []
    stored: dict[str, int] = {}
    for name, (_, size) in weight_shapes(model.path).items():
        if found := _IN_BLOCK.search(name):
            stored[found["module"]] = max(len(size), stored.get(found["module"], 0))
    for key in config.lora_keys:
        if stored.get(key) == 1:
            raise UserError(f"--lora-keys: {key} is no linear layer; leave it out")
    known = sorted({*(name for name, axes in stored.items() if axes > 1), *(linear.name for linear in shape.block)})
    missing = [key for key in config.lora_keys if key not in known]
    parts = {name.rpartition(".")[2] for name in known}
    # Named by its last part only, or by a part that occurs nowhere: no renaming makes a layer of that.
    wrong = [key for key in missing if "." not in key or key.rpartition(".")[2] not in parts]
    hints = [f"{key}{_near_key(key, known)}" for key in missing]
    if len(wrong) == len(config.lora_keys):
        raise UserError(f"--lora-keys: the model has no layer {hints[0]}")
    return [f"--lora-keys: the model may have no layer {hint}" for hint in hints]


def _near_key(key: str, known: list[str]) -> str:
    same_end = [name for name in known if name.endswith(f".{key}")]
    return f"; did you mean {same_end[0]}?" if same_end else nearest(key, known)


def _check_adapter_file(config: TrainConfig, shape: Architecture) -> None:
    """Compare ``--resume-adapter-file`` with the rank and the number of layers that are trained."""
    path = Path(str(config.resume_adapter_file))
    tensors = check_numbers(path, floats_only=True)
    adapters = {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".lora_a")}
    if not adapters:
        raise UserError(f"--resume-adapter-file {path}: holds no adapter weights; give an adapters.safetensors")
    first = 0 if config.num_layers < 0 else max(0, shape.layers - config.num_layers)
    for name, size in adapters.items():
        found = _IN_BLOCK.search(name)
        if found and int(found["block"]) < first:
            raise UserError(
                f"--resume-adapter-file {path}: holds layer {found['block']}, which --num-layers {config.num_layers}"
                f" of {shape.layers} does not train; say --num-layers {shape.layers - int(found['block'])}"
            )
        if found and int(found["block"]) >= shape.layers:
            raise UserError(
                f"--resume-adapter-file {path}: holds layer {found['block']}, the model has {shape.layers};"
                " it belongs to another model"
            )
        if len(size) == 2 and size[1] != config.lora_rank:
            raise UserError(f"--resume-adapter-file {path}: its rank is {size[1]}; say --lora-rank {size[1]}")


def data_warnings(split: str, tokens: TokenSet) -> list[str]:
    """What a person should know of a tokenised set, one line each."""
    lines = []
    if tokens.truncated:
        count, limit = f"{tokens.truncated:,} of {len(tokens):,}", tokens.max_seq_length
        lines.append(f"{split}: {count} rows are longer than --max-seq-length {limit} and were cut")
    if tokens.dropped:
        lines.append(f"{split}: {tokens.dropped:,} rows were left out: nothing in them is trained on")
    return lines
