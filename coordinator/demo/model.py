"""The demo's model: a small Llama with random weights, written without any help from MLX."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from coordinator.demo.tokenizer import TURN_END


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Attributes:
        vocab_size, hidden, layers, heads, intermediate: as in ``config.json``.
        embedding_scale: standard deviation of the embedding's entries; it is the output head too.
    """

    vocab_size: int
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    embedding_scale: float = 0.15

    @property
    def parameters(self) -> int:
        """Number of weights."""
        block = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocab_size * self.hidden + self.layers * block + self.hidden


def write_model(folder: Path, shape: Shape, seed: int) -> None:
    """Write ``config.json`` and ``model.safetensors`` with random float32 weights; the tokenizer is there already."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)

    hidden, wide = shape.hidden, shape.intermediate
    ones = np.ones(hidden, np.float32)
    # Residual branches start small, as in GPT-2, so that depth does not blow up the first steps.
    branch = (2 * shape.layers) ** -0.5
    weights = {
        "model.embed_tokens.weight": matrix(shape.vocab_size, hidden, shape.embedding_scale),
        "model.norm.weight": ones.copy(),
    }
    for number in range(shape.layers):
        prefix = f"model.layers.{number}."
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = matrix(hidden, hidden, hidden**-0.5)
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(hidden, hidden, branch * hidden**-0.5)
        weights[f"{prefix}mlp.gate_proj.weight"] = matrix(wide, hidden, hidden**-0.5)
        weights[f"{prefix}mlp.up_proj.weight"] = matrix(wide, hidden, hidden**-0.5)
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(hidden, wide, branch * wide**-0.5)
        weights[f"{prefix}input_layernorm.weight"] = ones.copy()
        weights[f"{prefix}post_attention_layernorm.weight"] = ones.copy()
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": wide,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": hidden // shape.heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": True,
        "eos_token_id": _token_id(folder, TURN_END),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _token_id(folder: Path, token: str) -> int:
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return next(int(entry["id"]) for entry in added if entry["content"] == token)
