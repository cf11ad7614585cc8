"""Write one GGUF file: header and keys first, then each tensor as it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from node.errors import UserError
from node.files import replacing
from node.worker.gguf import encode, tensors
from node.worker.gguf.families import shape_of
from node.worker.gguf.metadata import add_metadata
from node.worker.gguf.vocabulary import add_vocabulary, read_vocabulary

Progress = Callable[[str, int, int], None]


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    config: dict[str, Any],
    *,
    gguf_type: str = "f16",
    name: str = "",
    progress: Progress = lambda _task, _done, _total: None,
) -> None:
    """Write a model for llama.cpp, whole or not at all.

    Args:
        path: of the file.
        model: from ``mlx_lm``, with nothing quantized and no adapter layers left. Its parameters are used up.
        tokenizer: Hugging Face tokenizer, or ``mlx_lm``'s wrapper of one.
        config: the model's configuration.
        gguf_type: ``f16``, ``f32``, ``bf16`` or ``q8_0``; vectors and routers are always fp32.
        name: what people call the model.
        progress: told the task, the tensors done and their total.

    Raises:
        UserError: the model or its tokenizer cannot be expressed.
    """
    if gguf_type not in encode.TYPES:
        raise UserError(f"--gguf-type {gguf_type!r}: choose one of {', '.join(encode.TYPES)}")
    shape = shape_of(model, config)
    parameters = tensors.parameters_of(model, shape)
    rows = int(parameters[f"{shape.family.prefix}model.embed_tokens.weight"].shape[0])
    vocabulary = read_vocabulary(tokenizer, config, rows)
    planned = [
        (tensor, encode.stored_type(tensor.value, encode.TYPES[gguf_type], exact=tensor.exact))
        for tensor in tensors.tensors(parameters, shape)
    ]
    with (
        replacing(path) as partial,
        contextlib.closing(gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[shape.family.architecture])) as writer,
    ):
        add_metadata(writer, shape, name=vocabulary.model_name(name), rows=rows, gguf_type=gguf_type)
        add_vocabulary(writer, vocabulary)
        for tensor, kind in planned:
            size = encode.nbytes(tensor.value, kind)
            writer.add_tensor_info(tensor.name, tensor.value.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, planned, progress)


def _write_tensors(writer: gguf.GGUFWriter, planned: list[tuple[tensors.Tensor, Any]], progress: Progress) -> None:
    """Stream the data behind the header, giving up each tensor's memory once it is written."""
    assert writer.fout is not None
    file, total = writer.fout[0], len(planned)
    writer.write_padding(file, file.tell())
    for done in range(total):
        tensor, kind = planned[done]
        planned[done] = (tensors.Tensor(tensor.name, mx.array(0), exact=True), kind)
        for part in encode.encode(tensor.name, tensor.value, kind):
            file.write(np.ascontiguousarray(part).data)
        writer.write_padding(file, encode.nbytes(tensor.value, kind))
        progress("writing GGUF", done + 1, total)
