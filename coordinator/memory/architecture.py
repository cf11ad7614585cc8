"""What a model's configuration says about its size: widths, blocks, and the linear layers of a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.attention import query_parts
from node.errors import UserError

# What the same number is called in configurations of different ages.
_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "mlp_hidden_size", "ffn_hidden_size"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "embedding_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k"),
    "expert_size": ("moe_intermediate_size", "expert_ffn_size"),
    "shared_size": ("shared_expert_intermediate_size",),
    "window": ("sliding_window", "sliding_window_size"),
}
# One wide and one narrow matrix instead of gate, up and down.
_UNGATED = {"phi", "gpt2", "gpt_neox", "gpt_bigcode", "starcoder2", "stablelm_epoch", "phixtral", "nemotron", "opt"}
_GELU = {"gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neox", "phi", "starcoder2"}
_POST_NORMS = {"gemma2", "gemma3", "gemma3_text", "olmo2"}
_TIED_UNLESS_SAID = {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "cohere", "cohere2", "llama", "gpt2"}


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block.

    Attributes:
        name: its path inside the block, for example ``self_attn.q_proj``.
        inputs, outputs: its widths.
        copies: how many there are: the experts of a mixture, else 1.
    """

    name: str
    inputs: int
    outputs: int
    copies: int = 1

    @property
    def parameters(self) -> int:
        """Elements of its weight matrix, or matrices."""
        return self.inputs * self.outputs * self.copies


def has_experts(config: dict[str, Any]) -> bool:
    """Whether the model is a mixture of experts."""
    return bool(_number(config, "experts"))


@dataclass(frozen=True)
class Architecture:
    """The widths that memory depends on.

    Attributes:
        model_type: from the configuration.
        hidden: width of the residual stream.
        layers: number of blocks.
        heads, kv_heads, head_dim: of attention.
        inner: width of the feed-forward part that one token sees: all its experts together.
        gated: whether the feed-forward part has a gate beside the up projection.
        vocab: rows of the embedding.
        tied: whether the head is the embedding.
        block: the linear layers of one block.
        gelu: whether the feed-forward part's activation is a GELU, which keeps more than SiLU for its gradient.
        post_norms: whether a block normalises its outputs as well as its inputs.
        capped: whether the attention scores are soft-capped.
        window: positions that some blocks' attention is confined to; 0 where it is not.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    gated: bool
    vocab: int
    tied: bool
    block: tuple[Linear, ...]
    gelu: bool = False
    post_norms: bool = False
    capped: bool = False
    window: int = 0

    def attention_parts(self, length: int, *, gpu: bool) -> list[tuple[int, int]]:
        """The queries that attend at once, as the worker cuts them; whole where a model attends in a way of its own."""
        own = self.capped or 0 < self.window < length
        return [(0, length)] if own else query_parts(length, gpu=gpu)

    def kept_elements(self, length: int, *, gpu: bool) -> int:
        """Elements per token that one block keeps for its backward pass.

        Residual stream and its normed copies, queries, keys, values and attention's output, projections that are split
        afterwards, the feed-forward part's gate, up projection and their products, and the attention weights.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        fused = sum(
            linear.outputs for linear in self.block if linear.name.endswith(("qkv_proj", "wqkv", "gate_up_proj"))
        )
        stream = (8 if self.post_norms else 4) * self.hidden
        inner = (5 if self.gated else 3) + ((3 if self.gated else 2) if self.gelu else 0)
        seen = sum((end - start) * end for start, end in self.attention_parts(length, gpu=gpu)) // max(length, 1)
        scores = (3 if self.capped else 1) * self.heads * seen
        return stream + 3 * queries + 2 * keys + fused + inner * self.inner + scores

    @property
    def parameters(self) -> int:
        """Elements of embedding, blocks and head; norms and biases, far below one per cent, are left out."""
        blocks = self.layers * sum(linear.parameters for linear in self.block)
        return blocks + self.vocab * self.hidden * (1 if self.tied else 2)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a ``config.json``.

    Raises:
        UserError: it does not say how wide or deep the model is.
    """
    outer, text = config, config.get("text_config")
    if isinstance(text, Mapping):
        config = {**{key: outer[key] for key in ("tie_word_embeddings", "model_type") if key in outer}, **text}
    model_type = str(config.get("model_type", outer.get("model_type", "unknown")))
    hidden, layers = _needed(config, "hidden_size"), _needed(config, "num_hidden_layers")
    vocab = _needed(config, "vocab_size")
    heads = _number(config, "num_attention_heads") or max(hidden // 128, 1)
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_dim = int(config.get("head_dim") or hidden // heads)
    dense = _number(config, "intermediate_size") or 4 * hidden
    experts = _number(config, "experts") or 0
    per_token = min(_number(config, "experts_per_token") or 1, max(experts, 1))
    gated = model_type not in _UNGATED
    expert_size = _number(config, "expert_size") or dense
    shared = _number(config, "shared_size") or expert_size * int(config.get("n_shared_experts") or 0)
    attention = _attention(model_type, hidden, heads * head_dim, kv_heads * head_dim)
    if experts > 1:
        feed = (Linear("mlp.gate", hidden, experts), *_experts(hidden, expert_size, experts))
        feed += _feed_forward("llama", hidden, shared, gated=gated, prefix="mlp.shared_expert") if shared else ()
        inner = expert_size * per_token + shared
    else:
        feed, inner = _feed_forward(model_type, hidden, dense, gated=gated), dense
    tied = config.get("tie_word_embeddings")
    return Architecture(
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        gated=gated,
        vocab=vocab,
        tied=bool(tied) if tied is not None else model_type in _TIED_UNLESS_SAID,
        block=(*attention, *feed),
        gelu="gelu" in str(config.get("hidden_activation") or config.get("hidden_act") or "") or model_type in _GELU,
        post_norms=model_type in _POST_NORMS,
        capped=bool(config.get("attn_logit_softcapping")),
        window=_number(config, "window") or 0,
    )


def _number(config: Mapping[str, Any], name: str) -> int | None:
    """A positive number under any of its names; lists (one entry per layer) count with their largest."""
    for alias in _ALIASES[name]:
        value = config.get(alias)
        if isinstance(value, list):
            value = max((item for item in value if isinstance(item, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _needed(config: Mapping[str, Any], name: str) -> int:
    value = _number(config, name)
    if value is None:
        kind = config.get("model_type", "unknown")
        raise UserError(f"config.json (model_type {kind}) has no {name}, so its memory cannot be estimated")
    return value


def _attention(model_type: str, hidden: int, queries: int, keys: int) -> tuple[Linear, ...]:
    """Projections of attention, named as ``mlx_lm`` names them."""
    if model_type == "phi3":
        return Linear("self_attn.qkv_proj", hidden, queries + 2 * keys), Linear("self_attn.o_proj", queries, hidden)
    if model_type == "internlm2":
        return Linear("attention.wqkv", hidden, queries + 2 * keys), Linear("attention.wo", queries, hidden)
    return (
        Linear("self_attn.q_proj", hidden, queries),
        Linear("self_attn.k_proj", hidden, keys),
        Linear("self_attn.v_proj", hidden, keys),
        Linear("self_attn.dense" if model_type == "phi" else "self_attn.o_proj", queries, hidden),
    )


def _feed_forward(model_type: str, hidden: int, inner: int, *, gated: bool, prefix: str = "mlp") -> tuple[Linear, ...]:
    """The feed-forward part of a block without experts."""
    if not gated:
        return Linear(f"{prefix}.fc1", hidden, inner), Linear(f"{prefix}.fc2", inner, hidden)
    if model_type == "phi3":
        return Linear(f"{prefix}.gate_up_proj", hidden, 2 * inner), Linear(f"{prefix}.down_proj", inner, hidden)
    if model_type == "internlm2":
        names = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    else:
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj")
    return Linear(names[0], hidden, inner), Linear(names[1], hidden, inner), Linear(names[2], inner, hidden)


def _experts(hidden: int, inner: int, copies: int) -> tuple[Linear, ...]:
    return (
        Linear("mlp.switch_mlp.gate_proj", hidden, inner, copies),
        Linear("mlp.switch_mlp.up_proj", hidden, inner, copies),
        Linear("mlp.switch_mlp.down_proj", inner, hidden, copies),
    )
