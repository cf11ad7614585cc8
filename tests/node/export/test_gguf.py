from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from node.errors import UserError
from node.spec import Fuse, ModelSpec
from node.worker.export import fuse
from tests.fixtures.models import tiny_model
from tests.node.export.adapters import random_adapter

GGUF_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi2", "phi3")
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


class Read:
    """A GGUF file's keys and tensors, as plain values."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def export(tmp_path: Path, base: Path, adapter: Path | None = None, gguf_type: str = "f32") -> Read:
    spec = ModelSpec(str(base), str(adapter) if adapter else "")
    request = Fuse(model=spec, save_path=str(tmp_path), gguf_path="m.gguf", gguf_type=gguf_type, fused_model=False)
    fuse(spec, request, lambda _task, _done, _total: None)
    return Read(tmp_path / "m.gguf")


def parameters(folder: Path) -> dict[str, np.ndarray]:
    model, _ = load_model(folder)
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_every_parameter_is_there_once(tmp_path: Path, family: str) -> None:
    base = tiny_model(tmp_path / "base", family)
    source, read = parameters(base), export(tmp_path, base)
    assert len(read.tensors) == len(source)
    assert sum(t.size for t in read.tensors.values()) == sum(v.size for v in source.values())
    np.testing.assert_array_equal(read.tensors["token_embd.weight"], source["model.embed_tokens.weight"])
    assert set(read.types.values()) == {"F32"}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_keys_that_every_model_has(tmp_path: Path, family: str) -> None:
    base = tiny_model(tmp_path / "base", family)
    keys = export(tmp_path, base).keys
    rows = parameters(base)["model.embed_tokens.weight"].shape[0]
    name = keys["general.architecture"]
    expected = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 4 if family == "phi2" else 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.dimension_count": 8 if family == "phi2" else 16,
        "vocab_size": rows,
    }
    assert {key: keys[f"{name}.{key}"] for key in expected} == expected
    epsilon = keys[f"{name}.attention.layer_norm{'' if family == 'phi2' else '_rms'}_epsilon"]
    assert epsilon == pytest.approx(1e-6 if family.startswith(("gemma", "qwen")) else 1e-5)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == rows
    assert keys["tokenizer.chat_template"]


def rotate_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotary embedding as MLX and transformers do it: dimension i turns with i + half."""
    first, second = np.split(x, 2)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )


def rotate_pairs(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotary embedding as llama.cpp does it for its llama architecture: dimension 2i turns with 2i + 1."""
    first, second = x[0::2], x[1::2]
    turned = np.stack(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )
    return turned.T.reshape(-1)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_query_and_key_rows_give_the_same_scores_under_the_other_rotation(tmp_path: Path, family: str) -> None:
    base = tiny_model(tmp_path / "base", family)
    source, written = parameters(base), export(tmp_path, base).tensors
    x, angles = np.random.default_rng(0).standard_normal(64), np.arange(1, 9) * 0.7
    for head, kv_head in ((0, 0), (3, 1)):
        rows, kv_rows = slice(16 * head, 16 * head + 16), slice(16 * kv_head, 16 * kv_head + 16)
        query = source["model.layers.1.self_attn.q_proj.weight"][rows] @ x
        key = source["model.layers.1.self_attn.k_proj.weight"][kv_rows] @ x
        their_query, their_key = written["blk.1.attn_q.weight"][rows] @ x, written["blk.1.attn_k.weight"][kv_rows] @ x
        ours = rotate_halves(query, angles) @ rotate_halves(key, 3 * angles)
        assert rotate_pairs(their_query, angles) @ rotate_pairs(their_key, 3 * angles) == pytest.approx(ours, rel=1e-5)
    np.testing.assert_array_equal(written["blk.1.attn_v.weight"], source["model.layers.1.self_attn.v_proj.weight"])


def test_biases_are_permuted_like_their_weights(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", attention_bias=True, mlp_bias=True)
    source, written = parameters(base), export(tmp_path, base).tensors
    order = np.arange(64).reshape(4, 2, 8).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(written["blk.0.attn_q.bias"], source["model.layers.0.self_attn.q_proj.bias"][order])
    np.testing.assert_array_equal(written["blk.0.ffn_down.bias"], source["model.layers.0.mlp.down_proj.bias"])


def test_rows_stay_where_pairs_are_already_neighbours(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", rope_traditional=True)
    source, written = parameters(base), export(tmp_path, base).tensors
    np.testing.assert_array_equal(written["blk.0.attn_q.weight"], source["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gemma_norms_hold_one_more(tmp_path: Path, family: str) -> None:
    base = tiny_model(tmp_path / "base", family)
    source, written = parameters(base), export(tmp_path, base).tensors
    pairs = {"output_norm": "model.norm", "blk.1.attn_norm": "model.layers.1.input_layernorm"}
    if family == "gemma3":
        pairs["blk.0.attn_q_norm"] = "model.layers.0.self_attn.q_norm"
    for theirs, ours in pairs.items():
        np.testing.assert_allclose(written[f"{theirs}.weight"], source[f"{ours}.weight"] + 1, atol=1e-6)


@pytest.mark.parametrize(("family", "tensor"), [("gemma2", "blk.0.attn_q"), ("gemma3", "blk.0.attn_q_norm")])
def test_gemma_scale_of_the_scores_moves_into_the_queries(tmp_path: Path, family: str, tensor: str) -> None:
    plain = export(tmp_path / "a", tiny_model(tmp_path / "plain", family)).tensors[f"{tensor}.weight"]
    other = tiny_model(tmp_path / "other", family, query_pre_attn_scalar=64)
    np.testing.assert_allclose(export(tmp_path / "b", other).tensors[f"{tensor}.weight"], plain / 2, rtol=1e-6)


def test_mixtral_experts_are_stacked_and_the_router_stays_exact(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "mixtral")
    source, read = parameters(base), export(tmp_path, base, gguf_type="f16")
    for theirs, ours in (("gate", "gate_proj"), ("down", "down_proj"), ("up", "up_proj")):
        value = source[f"model.layers.1.block_sparse_moe.switch_mlp.{ours}.weight"]
        np.testing.assert_array_equal(read.tensors[f"blk.1.ffn_{theirs}_exps.weight"], value.astype(np.float16))
    router = source["model.layers.1.block_sparse_moe.gate.weight"]
    np.testing.assert_array_equal(read.tensors["blk.1.ffn_gate_inp.weight"], router)
    assert read.types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert (read.keys["llama.expert_count"], read.keys["llama.expert_used_count"]) == (4, 2)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_qwen_experts(tmp_path: Path, model_type: str) -> None:
    options = {**EXPERTS, "shared_expert_intermediate_size": 96}
    base = tiny_model(tmp_path / "base", model_type[:5], model_type=model_type, **options)
    source, read = parameters(base), export(tmp_path, base)
    name = read.keys["general.architecture"]
    assert name == model_type.replace("_", "")
    assert read.keys[f"{name}.expert_feed_forward_length"] == 64
    np.testing.assert_array_equal(
        read.tensors["blk.0.ffn_up_exps.weight"], source["model.layers.0.mlp.switch_mlp.up_proj.weight"]
    )
    if model_type == "qwen2_moe":
        assert read.keys[f"{name}.expert_shared_feed_forward_length"] == 96
        assert read.tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (64,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [0]}, "layers that have no experts"),
    ],
)
def test_experts_that_llama_cpp_lacks_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base = tiny_model(tmp_path / "base", "qwen3", model_type="qwen3_moe", **EXPERTS | options)
    with pytest.raises(UserError, match=message):
        export(tmp_path, base)
    assert not (tmp_path / "m.gguf").exists()


def test_a_text_model_inside_a_larger_one(tmp_path: Path) -> None:
    import json

    base = tiny_model(tmp_path / "base", "gemma3")
    alone = export(tmp_path / "a", base)
    config = json.loads((base / "config.json").read_text())
    weights: Any = mx.load(str(base / "model.safetensors"))
    mx.save_safetensors(str(base / "model.safetensors"), {f"language_model.{n}": v for n, v in weights.items()})
    outer = {"model_type": "gemma3", "vocab_size": config["vocab_size"], "text_config": config}
    (base / "config.json").write_text(json.dumps(outer))
    inside = export(tmp_path / "b", base)
    assert inside.types == alone.types
    assert {k: v for k, v in inside.keys.items() if k != "general.name"} == {
        k: v for k, v in alone.keys.items() if k != "general.name"
    }


@pytest.mark.parametrize(
    ("gguf_type", "matrix", "largest_error"), [("f16", "F16", 2e-3), ("bf16", "BF16", 1e-2), ("q8_0", "Q8_0", 2e-2)]
)
def test_types(tmp_path: Path, gguf_type: str, matrix: str, largest_error: float) -> None:
    base = tiny_model(tmp_path / "base", "qwen3")
    source, read = parameters(base), export(tmp_path, base, gguf_type=gguf_type)
    assert {kind for name, kind in read.types.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in read.types.items() if "norm" not in name} == {matrix}
    value = source["model.layers.0.mlp.up_proj.weight"]
    error = np.abs(read.tensors["blk.0.ffn_up.weight"] - value).max()
    assert 0 < error < largest_error
    assert gguf.LlamaFileType(read.keys["general.file_type"]).name == f"MOSTLY_{matrix}"


def test_rows_that_blocks_do_not_divide_fall_back_to_f16(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", intermediate_size=144)
    read = export(tmp_path, base, gguf_type="q8_0")
    assert read.types["blk.0.ffn_down.weight"] == "F16"
    assert read.types["blk.0.ffn_up.weight"] == "Q8_0"


def test_many_rows_are_encoded_like_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base", "mixtral")
    whole = {kind: export(tmp_path / kind, base, gguf_type=kind).tensors for kind in ("f16", "bf16", "q8_0")}
    monkeypatch.setattr("node.worker.gguf.encode.CHUNK_ELEMENTS", 200)
    for kind, tensors in whole.items():
        parts = export(tmp_path / f"{kind}-parts", base, gguf_type=kind).tensors
        for name, value in tensors.items():
            np.testing.assert_array_equal(parts[name], value, err_msg=name)


def test_numbers_beyond_f16_are_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    weights: Any = mx.load(str(base / "model.safetensors"))
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"] * 1e6
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    with pytest.raises(UserError, match=r"blk.0.ffn_up.weight holds .*too large for f16; use --gguf-type bf16"):
        export(tmp_path, base, gguf_type="f16")
    assert not list(tmp_path.glob("*.gguf"))
    export(tmp_path, base, gguf_type="bf16")


def test_quantized_base_with_adapter_is_not_quantized_again(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "qwen2", quantize=4)
    adapter = random_adapter(tmp_path / "adapter", base)
    spec = ModelSpec(str(base), str(adapter))
    fuse(spec, Fuse(model=spec, save_path=str(tmp_path / "full"), dequantize=True), lambda _t, _d, _n: None)
    expected = parameters(tmp_path / "full")
    written = export(tmp_path, base, adapter).tensors
    np.testing.assert_array_equal(written["blk.1.ffn_up.weight"], expected["model.layers.1.mlp.up_proj.weight"])


def test_memory_stays_that_of_a_few_tensors(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama", hidden=384, layers=16)
    adapter = random_adapter(tmp_path / "adapter", base)
    size = (base / "model.safetensors").stat().st_size
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    export(tmp_path, base, adapter, gguf_type="q8_0")
    assert mx.get_peak_memory() - before < size / 4


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_scaling": LLAMA3}),
    "yarn": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    "longrope": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.0] * 8},
            "original_max_position_embeddings": 128,
        },
    ),
}


def exported_scaling(tmp_path: Path, name: str) -> Read:
    family, options = SCALINGS[name]
    return export(tmp_path, tiny_model(tmp_path / "base", family, **options))


def test_linear_scaling(tmp_path: Path) -> None:
    keys = exported_scaling(tmp_path, "linear").keys
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_llama3_scaling_gives_the_frequencies_that_mlx_uses(tmp_path: Path) -> None:
    factors = exported_scaling(tmp_path, "llama3").tensors["rope_freqs.weight"]
    model, _ = load_model(tmp_path / "base")
    own = np.array(model.layers[0].self_attn.rope._freqs)
    np.testing.assert_allclose(factors * 10000.0 ** (np.arange(0, 16, 2) / 16), own, rtol=1e-5)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_yarn_scaling(tmp_path: Path) -> None:
    keys = exported_scaling(tmp_path, "yarn").keys
    assert (keys["qwen2.rope.scaling.type"], keys["qwen2.rope.scaling.factor"]) == ("yarn", 4.0)
    assert keys["qwen2.rope.scaling.original_context_length"] == 128
    assert keys["qwen2.rope.scaling.attn_factor"] == 1.0


def test_longrope_scaling(tmp_path: Path) -> None:
    read = exported_scaling(tmp_path, "longrope")
    model, _ = load_model(tmp_path / "base")
    assert read.keys["phi3.rope.scaling.attn_factor"] == pytest.approx(model.layers[0].self_attn.rope._scale)
    assert read.keys["phi3.rope.scaling.original_context_length"] == 128
    np.testing.assert_array_equal(read.tensors["rope_factors_long.weight"], np.full(8, 1.5, np.float32))
    np.testing.assert_array_equal(read.tensors["rope_factors_short.weight"], np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen2", {"rope_scaling": LLAMA3}, "'llama3' rope scaling for qwen2"),
        ("llama", {"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional' scaling"),
        ("qwen2", {"rope_traditional": True}, "rope_traditional"),
        (
            "llama",
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
            "no sliding-window layers in llama",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, family: str, options: dict[str, Any], message: str
) -> None:
    base = tiny_model(tmp_path / "base", family, **options)
    with pytest.raises(UserError, match=message):
        export(tmp_path, base)


def test_gemma_windows_and_caps(tmp_path: Path) -> None:
    second = export(tmp_path / "2", tiny_model(tmp_path / "gemma2", "gemma2")).keys
    assert second["gemma2.attn_logit_softcapping"] == 50.0
    assert second["gemma2.final_logit_softcapping"] == 30.0
    assert second["gemma2.attention.sliding_window"] == 256
    third = export(tmp_path / "3", tiny_model(tmp_path / "gemma3", "gemma3")).keys
    assert third["gemma3.attention.sliding_window"] == 32
    assert third["gemma3.attention.sliding_window_pattern"] == 2
    assert third["gemma3.rope.freq_base"] == 1_000_000.0
    assert third["gemma3.rope.freq_base_swa"] == 10_000.0
