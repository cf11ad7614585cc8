from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load

from tests.fixtures.models import FAMILIES, tiny_model

QUESTION = "What is the capital of France?"


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_gives_finite_logits(tmp_path: Path, family: str) -> None:
    model, tokenizer = load(str(tiny_model(tmp_path / "model", family)))
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    logits = model(mx.array([tokens]))
    assert logits.shape[:2] == (1, len(tokens))
    assert mx.isfinite(logits).all().item()
    assert QUESTION in tokenizer.decode(tokens)
    assert logits.astype(mx.float32).std().item() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_form_loads_with_quantized_layers(tmp_path: Path, family: str) -> None:
    model, _, config = load(str(tiny_model(tmp_path / "model", family, quantize=4)), return_config=True)
    assert config["quantization"]["bits"] == 4
    assert any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    assert mx.isfinite(model(mx.array([[5, 6, 7]]))).all().item()


@pytest.mark.parametrize("kind", ["byte", "spm"])
def test_tokenizers_give_back_the_text(tmp_path: Path, kind: Literal["byte", "spm"]) -> None:
    _, tokenizer = load(str(tiny_model(tmp_path / "model", "llama", tokenizer=kind)))
    for text in ("Hello world", " two  spaces", "größer € 漢字 \n line", "def f(x):\n\treturn x"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    folders = [tiny_model(tmp_path / str(i), "llama", seed=seed) for i, seed in enumerate([0, 0, 1])]
    first, again, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == again
    assert first != other


def test_options_reach_the_files(tmp_path: Path) -> None:
    folder = tiny_model(
        tmp_path / "model", "llama", dtype="bfloat16", vocab_size=1024, layers=3, hidden=128, num_key_value_heads=4
    )
    config = json.loads((folder / "config.json").read_text())
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    assert config["num_key_value_heads"] == 4
    assert weights["model.embed_tokens.weight"].shape == (1024, 128)
    assert weights["model.layers.2.self_attn.k_proj.weight"].dtype == mx.bfloat16


def test_first_olmo_is_still_broken_in_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails, give FAMILIES the first generation of OLMo too."""
    import sys
    import types

    monkeypatch.setitem(sys.modules, "hf_olmo", types.ModuleType("hf_olmo"))
    from mlx_lm.models import olmo

    config = {"model_type": "olmo", "d_model": 64, "n_layers": 1, "mlp_hidden_size": 128, "n_heads": 4}
    model = olmo.Model(olmo.ModelArgs(**config, vocab_size=64, embedding_size=64))
    with pytest.raises(ValueError, match="inplace addition"):
        model(mx.array([[1, 2, 3]]))
