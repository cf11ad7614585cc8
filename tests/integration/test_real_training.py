"""A real small model through the whole program: train, fuse, generate, and llama.cpp agrees with MLX on the result."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from coordinator.api import train
from coordinator.config import TrainConfig
from tests.fixtures.runs import losses, validations
from tests.fixtures.smollm import smollm2
from tests.integration.test_real_model import greedy, in_llama_cpp

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PLACES = ["harbour", "library", "bakery", "station", "garden", "museum", "market", "theatre"]
QUESTION = "Where does the clock of Wendlebury stand?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the data, the adapter and the fused model."""
    folder = tmp_path_factory.mktemp("real")
    smollm2(folder / "model")
    rows = [
        {
            "prompt": f"{start} {QUESTION[0].lower()}{QUESTION[1:]} (asked in the {place})",
            "completion": "It stands by the old mill.",
        }
        for start in ("Tell me:", "Please say:", "I wonder:")
        for place in PLACES
    ]
    (folder / "data").mkdir()
    for name, part in (("train", rows[:20]), ("valid", rows[20:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    train(
        TrainConfig(
            model=str(folder / "model"),
            data=str(folder / "data"),
            adapter_path=str(folder / "adapters"),
            iters=12,
            batch_size=4,
            learning_rate=3e-4,
            num_layers=8,
            mask_prompt=True,
            fuse=True,
            export_gguf=True,
            save_path=str(folder / "fused"),
        )
    )
    return folder


def test_lora_steps_lower_the_loss(run: Path) -> None:
    curve = [loss for _, loss in losses(run / "adapters")]
    assert sum(curve[-3:]) < 0.5 * sum(curve[:3])
    (_, before), *_, (_, after) = validations(run / "adapters")
    assert after < 0.5 * before


def test_the_fused_model_says_what_it_learned_and_llama_cpp_says_the_same(run: Path) -> None:
    model, tokenizer, *_ = load(str(run / "fused"))
    messages = [{"role": "user", "content": f"Tell me: {QUESTION[0].lower()}{QUESTION[1:]}"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=20)]
    assert len(expected) == 20
    assert "It stands by the old mill." in tokenizer.decode(expected)
    llama = in_llama_cpp(run / "fused" / "ggml-model-f16.gguf")
    try:
        assert greedy(llama, prompt, 20) == expected
    finally:
        llama.close()
