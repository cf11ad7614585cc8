"""What llama.cpp expects of each model family, where that differs from what MLX computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf

from node.errors import UserError

_EXPERTS = ((".switch_mlp.", ".experts."),)
_MIXTRAL_EXPERTS = (
    (".switch_mlp.gate_proj", ".experts.w1"),
    (".switch_mlp.down_proj", ".experts.w2"),
    (".switch_mlp.up_proj", ".experts.w3"),
)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        architecture: llama.cpp's name for it.
        interleaved_rope: llama.cpp rotates neighbouring pairs (x0, x1) instead of halves (x0, x_half), so the rows of
            the query and key projections change places.
        norm_offset: added to norm weights, for models that compute with ``1 + weight``.
        renames: parts of MLX parameter names, and what ``gguf``'s tensor-name maps call them.
        prefix: of the text model's parameters inside a larger model.
    """

    architecture: gguf.MODEL_ARCH
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    renames: tuple[tuple[str, str], ...] = ()
    prefix: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, interleaved_rope=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, interleaved_rope=True),
    "mixtral": Family(gguf.MODEL_ARCH.LLAMA, interleaved_rope=True, renames=_MIXTRAL_EXPERTS),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen2_moe": Family(gguf.MODEL_ARCH.QWEN2MOE, renames=_EXPERTS),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "qwen3_moe": Family(gguf.MODEL_ARCH.QWEN3MOE, renames=_EXPERTS),
    "gemma": Family(gguf.MODEL_ARCH.GEMMA, norm_offset=1.0),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, norm_offset=1.0),
    "gemma3_text": Family(gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0),
    "gemma3": Family(gguf.MODEL_ARCH.GEMMA3, norm_offset=1.0, prefix="language_model."),
    "phi": Family(gguf.MODEL_ARCH.PHI2),
    "phi3": Family(gguf.MODEL_ARCH.PHI3),
}
SUPPORTED: tuple[str, ...] = tuple(FAMILIES)


def check_supported(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        UserError: there is none; the message names those that there are.
    """
    if model_type not in FAMILIES:
        raise UserError(f"--export-gguf: cannot write model type {model_type!r}; supported: {', '.join(SUPPORTED)}")
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Shape:
    """The numbers of a model, as MLX uses them: its arguments with their defaults, then ``config.json``.

    Attributes:
        model_type: from ``config.json``.
        args: the MLX text model's arguments.
        config: ``config.json``, or its text part.
    """

    model_type: str
    args: Any
    config: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its name in ``config.json``."""
        value = getattr(self.args, name, None)
        if value is None:
            value = self.config.get(name)
        return default if value is None else value

    @property
    def family(self) -> Family:
        """The family of this model type."""
        return check_supported(self.model_type)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return int(self.args.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return int(self.args.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return int(getattr(self.args, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        """Size of a head, where the MLX model has its own or divides the hidden size."""
        return int(getattr(self.args, "head_dim", None) or self.args.hidden_size // self.heads)

    @property
    def rope_dims(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * getattr(self.args, "partial_rotary_factor", 1.0))

    @property
    def context(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        return int(self.get("max_position_embeddings", 4096))


def shape_of(model: Any, config: dict[str, Any]) -> Shape:
    """Read a loaded model's numbers, and refuse what its family cannot say in GGUF.

    Raises:
        UserError: GGUF or llama.cpp has no way to express this model.
    """
    model_type = str(config.get("model_type", ""))
    family = check_supported(model_type)
    inner = model.language_model if family.prefix else model
    text_config = config.get("text_config") if family.prefix else None
    shape = Shape(model_type, inner.args, text_config or config)
    _check_attention(shape)
    _check_experts(shape)
    return shape


def _check_attention(shape: Shape) -> None:
    if not shape.family.interleaved_rope and getattr(shape.args, "rope_traditional", False):
        raise UserError(f"--export-gguf: llama.cpp cannot compute {shape.model_type} with rope_traditional")
    kinds = set(getattr(shape.args, "layer_types", None) or ())
    if shape.family.architecture == gguf.MODEL_ARCH.LLAMA and "sliding_attention" in kinds:
        raise UserError(f"--export-gguf: llama.cpp has no sliding-window layers in {shape.model_type} models")


def _check_experts(shape: Shape) -> None:
    if shape.model_type != "qwen3_moe":
        return
    if not shape.args.norm_topk_prob:
        raise UserError("--export-gguf: llama.cpp cannot compute qwen3_moe with norm_topk_prob off")
    if shape.args.mlp_only_layers or shape.args.decoder_sparse_step != 1:
        raise UserError("--export-gguf: llama.cpp cannot compute qwen3_moe with some layers that have no experts")
