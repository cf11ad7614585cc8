"""After training: merge the adapter into the model and write what was asked for."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import dequantize_model, load_tokenizer, save_config, save_model

from node.errors import TandemError, UserError, one_line
from node.exports.card import model_card, name_of
from node.exports.folders import check_free, new_folder
from node.exports.kinds import COMPANIONS, PEFT_FILES, WEIGHTS
from node.files import write_text_atomically
from node.jsons import read_json
from node.manifest import tokenizer_needs_own_code
from node.spec import Fuse, ModelSpec
from node.worker import tuning
from node.worker.gguf import check_supported, write_gguf
from node.worker.imports import with_tokenizers
from node.worker.modelfile import modelfile
from node.worker.peft import check_peft, write_peft

Progress = Callable[[str, int, int], None]


def fuse(model: ModelSpec, request: Fuse, progress: Progress) -> tuple[str, ...]:
    """Merge an adapter into its base model and write the model, a GGUF file, and the adapter in PEFT's layout.

    Nothing touches the network, and everything is written whole or not at all.

    Args:
        model: base model folder and, unless the model was trained in full and saved, its adapter.
        request: what to write; a relative ``gguf_path`` lies in ``save_path``.
        progress: told the task, the parts done and their total.

    Returns:
        The paths that were written.

    Raises:
        UserError: the request cannot be met; nothing was written.
    """
    target = Path(request.save_path)
    gguf_path = target / request.gguf_path if request.gguf_path else None
    _check(model, request, target)
    written: list[Path] = []
    try:
        if request.peft_path:
            with new_folder(Path(request.peft_path), PEFT_FILES) as partial:
                write_peft(partial, Path(model.adapter_path), _config(model), request.source)
            written.append(Path(request.peft_path))
        if request.fused_model:
            with new_folder(target, (*WEIGHTS, *COMPANIONS)) as partial:
                if gguf_path is not None:
                    # First, because it is the one that a model or tokenizer may turn out not to fit.
                    inside = target.absolute() in gguf_path.absolute().parents
                    place = partial / os.path.relpath(gguf_path, target) if inside else gguf_path
                    _write_gguf(place, model, request, progress)
                _write_model(partial, model, request, progress)
            written.append(target)
        elif gguf_path is not None:
            _write_gguf(gguf_path, model, request, progress)
        if gguf_path is not None:
            written += [gguf_path, gguf_path.with_name("Modelfile")]
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(target) from error
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
    except RuntimeError as error:
        # MLX's writer does not say why it could not write.
        if "Unable to write" in str(error):
            raise _disk_full(target) from error
        raise
    return tuple(str(path) for path in written)


def _disk_full(target: Path) -> TandemError:
    return TandemError(f"the disk is full: {target} was not written; free some space and fuse again")


def _check(model: ModelSpec, request: Fuse, target: Path) -> None:
    """Find a person's mistakes before anything expensive starts."""
    if not (request.fused_model or request.gguf_path or request.peft_path):
        raise UserError("nothing to write: ask for the fused model, --export-gguf or --export-peft")
    if request.fused_model:
        check_free(target, (*WEIGHTS, *COMPANIONS))
        if target.absolute() in (Path(model.path).absolute(), Path(model.adapter_path or model.path).absolute()):
            raise UserError(f"--save-path {target} is the folder of the base model or the adapter; name another")
    config = _config(model)
    if request.gguf_path:
        check_supported(str(config.get("model_type", "")))
        if (target / request.gguf_path).is_dir():
            raise UserError(f"--gguf-path {target / request.gguf_path} is a folder; name a file")
    if request.peft_path:
        check_peft(Path(model.adapter_path), config)
        # The adapter is written without the model: whether it belongs to it must be found out here.
        tuning.load(model, lazy=True)
    _check_space(model, request, target)


def _config(model: ModelSpec) -> dict[str, Any]:
    return read_json(Path(model.path) / "config.json")


def _check_space(model: ModelSpec, request: Fuse, target: Path) -> None:
    """Refuse what surely does not fit: the weights as they are, once for each output of that size."""
    weights = sum(file.stat().st_size for file in Path(model.path).glob("model*.safetensors"))
    needed = weights * request.fused_model
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"{target} needs about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on that disk")


def _merged(spec: ModelSpec, *, dequantize: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its adapter merged, lazy: nothing is computed before it is saved."""
    model, config = tuning.load(spec, lazy=True)
    fused = []
    for path, module in model.named_modules():
        if hasattr(module, "fuse"):
            fused.append((path, _in_type_of(_base_layer(module), module.fuse(dequantize=dequantize))))
    if fused:
        model.update_modules(tree_unflatten(fused))
    if dequantize:
        model = dequantize_model(model)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    return model, config


def _base_layer(module: nn.Module) -> nn.Module:
    return module["linear"] if "linear" in module else module["embedding"]


def _in_type_of(base: nn.Module, fused: nn.Module) -> nn.Module:
    """DoRA's magnitudes are fp32 and would make the fused layer so; give it the base layer's type again."""
    dtype = base.scales.dtype if "scales" in base else base.weight.dtype
    if not mx.issubdtype(dtype, mx.floating):
        return fused
    fused.update(tree_map(lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, fused.parameters()))
    return fused


def _write_model(folder: Path, spec: ModelSpec, request: Fuse, progress: Progress) -> None:
    progress("fusing", 0, 1)
    model, config = _merged(spec, dequantize=request.dequantize)
    expected = len(tree_flatten(model.parameters()))
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    if len(index["weight_map"]) != expected:
        raise TandemError(f"the fused model was written with {len(index['weight_map'])} of {expected} tensors")
    # The tokenizer's files are copied as they are: saving a loaded one can change them.
    for pattern in COMPANIONS:
        for file in Path(spec.path).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(model_card(Path(spec.path), request.source), encoding="utf-8")
    progress("fusing", 1, 1)


def _write_gguf(path: Path, spec: ModelSpec, request: Fuse, progress: Progress) -> None:
    """Always from full-precision weights: a quantized base is not quantized a second time on the way."""
    model, config = _merged(spec, dequantize=True)
    tokenizer = _tokenizer(spec, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = name_of(request.source or spec.path)
    write_gguf(path, model, tokenizer, config, gguf_type=request.gguf_type, name=name, progress=progress)
    write_text_atomically(path.with_name("Modelfile"), modelfile(path.name, tokenizer))


def _tokenizer(spec: ModelSpec, config: dict[str, Any]) -> Any:
    extra = {"trust_remote_code": spec.trust_remote_code}
    try:
        with_tokenizers()
        return load_tokenizer(Path(spec.path), extra, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # tokenizer code of any origin may raise anything
        if not spec.trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(tokenizer_needs_own_code(spec.path)) from error
        raise UserError(f"cannot load the tokenizer in {spec.path}: {one_line(error)}") from error
