"""The model's numbers as GGUF keys."""

from __future__ import annotations

import gguf

from node.worker.gguf.families import Shape
from node.worker.gguf.rope import add_rope

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def add_metadata(writer: gguf.GGUFWriter, shape: Shape, *, name: str, rows: int, gguf_type: str) -> None:
    """Write everything that describes the model, its vocabulary apart.

    Args:
        writer: whose file is not open yet.
        shape: of the model.
        name: what people call the model.
        rows: of its embedding.
        gguf_type: one of ``FILE_TYPES``.
    """
    args = shape.args
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[gguf_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(shape.context)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(args.hidden_size)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    if (eps := getattr(args, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    if (eps := getattr(args, "layer_norm_eps", None)) is not None:
        writer.add_layer_norm_eps(eps)
    add_rope(writer, shape)
    _add_window(writer, shape)
    _add_experts(writer, shape)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (cap := getattr(args, key, None)) is not None:
            add(float(cap))


def _add_window(writer: gguf.GGUFWriter, shape: Shape) -> None:
    architecture = shape.family.architecture
    if architecture == gguf.MODEL_ARCH.GEMMA2:
        writer.add_sliding_window(int(shape.get("sliding_window", 4096)))
    elif architecture == gguf.MODEL_ARCH.GEMMA3:
        pattern = int(shape.args.sliding_window_pattern)
        if pattern > 1:
            writer.add_sliding_window(int(shape.args.sliding_window))
            writer.add_sliding_window_pattern(pattern)
    elif architecture == gguf.MODEL_ARCH.PHI3:
        writer.add_sliding_window(int(shape.get("sliding_window", 0)))


def _add_experts(writer: gguf.GGUFWriter, shape: Shape) -> None:
    experts = getattr(shape.args, "num_local_experts", None) or getattr(shape.args, "num_experts", None)
    if not experts:
        return
    writer.add_expert_count(int(experts))
    writer.add_expert_used_count(int(shape.args.num_experts_per_tok))
    if (length := getattr(shape.args, "moe_intermediate_size", None)) is not None:
        writer.add_expert_feed_forward_length(int(length))
    if (length := getattr(shape.args, "shared_expert_intermediate_size", None)) is not None:
        writer.add_expert_shared_feed_forward_length(int(length))
