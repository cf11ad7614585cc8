from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load

from coordinator.demo.model import Shape, write_model
from coordinator.demo.tokenizer import TURN_END, write_tokenizer

TEXTS = ["The capital of Peru is Lima.", "People in Peru speak Spanish.", "größer €"]


def write_both(folder: Path, seed: int = 0) -> Shape:
    folder.mkdir()
    shape = Shape(write_tokenizer(folder, TEXTS, 300), hidden=64, layers=2, intermediate=128)
    write_model(folder, shape, seed)
    return shape


def test_mlx_lm_opens_it(tmp_path: Path) -> None:
    shape = write_both(tmp_path / "model")
    model, tokenizer = load(str(tmp_path / "model"))
    weights = [value for _, value in tree_flatten(model.parameters())]
    assert sum(value.size for value in weights) == shape.parameters
    logits = model(mx.array([tokenizer.encode(TEXTS[0])]))
    assert logits.shape[-1] == shape.vocab_size
    assert mx.isfinite(logits).all().item()


def test_tokenizer_ends_turns(tmp_path: Path) -> None:
    write_both(tmp_path / "model")
    _, tokenizer = load(str(tmp_path / "model"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages)
    assert whole[: len(asked)] == asked
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    assert tokenizer.eos_token_ids == {end}
    assert whole[len(asked) :].count(end) == 1


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_both(tmp_path / name, seed)
    first, again, other = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert first == again
    assert first != other
