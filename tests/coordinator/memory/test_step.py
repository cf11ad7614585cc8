"""The estimate against real peaks, real weights, and the table of memory that users know."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from coordinator.config import TrainConfig
from coordinator.memory import EstimateOptions, estimate
from coordinator.memory.architecture import architecture
from coordinator.memory.weights import expected_weights, read_weights
from coordinator.models import weight_shapes
from coordinator.preflight import estimate_options
from node.errors import UserError
from node.spec import OptimizerSpec, TuningSpec
from node.worker.randomness import RowContext
from node.worker.tuning import make_trainable
from tests.fixtures.models import FAMILIES, _family_config, tiny_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
SMALLEST, LARGEST = 0.85, 1.15
"""Ratios of estimate to measured peak that are let pass; the worst of the jobs below were 0.87 and 1.13."""


def job(**changes: Any) -> dict[str, Any]:
    config = LLAMA | {name: changes.pop(name) for name in list(changes) if name in LLAMA}
    fixed = {"dtype": "float32", "bits": 0, "fine_tune_type": "lora", "num_layers": 4, "rank": 8, "batch_size": 2}
    return {"config": config} | fixed | {"length": 128, "grad_checkpoint": False, "optimizer": "adam"} | changes


MEASURED = {
    "lora": job(),
    "lora, long rows": job(length=384, batch_size=1),
    "lora, half of the layers": job(num_layers=2, batch_size=4),
    "lora, high rank": job(rank=64),
    "lora, large vocabulary": job(vocab_size=32000, length=64),
    "lora, large vocabulary in parts": job(vocab_size=32000, length=256),
    "lora, large vocabulary, bf16": job(vocab_size=32000, length=256, dtype="bfloat16"),
    "lora, bf16": job(dtype="bfloat16", length=64),
    "lora, checkpointed": job(grad_checkpoint=True, length=256),
    "qlora": job(bits=4),
    "dora": job(fine_tune_type="dora"),
    "dora on a quantized base": job(fine_tune_type="dora", bits=4),
    "full": job(fine_tune_type="full"),
    "full, short rows": job(fine_tune_type="full", length=32),
    "full, many layers": job(fine_tune_type="full", length=8, batch_size=1, num_layers=16, num_hidden_layers=16),
    "full, bf16": job(fine_tune_type="full", length=32, dtype="bfloat16"),
    "full, sgd": job(fine_tune_type="full", optimizer="sgd", length=32),
    "full, adafactor": job(fine_tune_type="full", optimizer="adafactor", length=32),
    **{
        family: job() | {"config": _family_config(family, 4, 128) | {"vocab_size": 512, "intermediate_size": 384}}
        for family in ("qwen3", "mixtral", "gemma2", "gemma3", "phi2", "phi3")
    },
}


def estimated(wanted: dict[str, Any]) -> int:
    config = wanted["config"] | {"torch_dtype": wanted["dtype"]}
    if wanted["bits"]:
        config |= {"quantization": {"bits": wanted["bits"], "group_size": 64}}
    options = EstimateOptions(
        fine_tune_type=wanted["fine_tune_type"],
        num_layers=wanted["num_layers"],
        rank=wanted["rank"],
        batch_size=wanted["batch_size"],
        max_seq_length=wanted["length"],
        optimizer=wanted["optimizer"],
        grad_checkpoint=wanted["grad_checkpoint"],
        gpu=False,
    )
    return estimate(config, None, options).device_bytes


@pytest.mark.slow
def test_the_estimate_is_near_the_peak_of_real_steps() -> None:
    """Measured in one process of its own, so that only these jobs are in MLX's counters."""
    command = [sys.executable, "-m", "tests.coordinator.memory.measure"]
    done = subprocess.run(
        command, input=json.dumps(list(MEASURED.values())), capture_output=True, text=True, check=True, timeout=250
    )
    peaks = json.loads(done.stdout.splitlines()[-1])
    ratios = {name: estimated(job) / peak for (name, job), peak in zip(MEASURED.items(), peaks, strict=True)}
    assert {name: round(ratio, 2) for name, ratio in ratios.items() if not SMALLEST <= ratio <= LARGEST} == {}


def large(hidden: int, layers: int, inner: int, heads: int, kv_heads: int, vocab: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


# Llama 3.2 1B and 3B, Llama 2 7B and 13B; gigabytes that guides tell people to expect: LoRA 4-bit, LoRA 16-bit, full.
TABLE = {
    "1B": (large(2048, 16, 8192, 32, 8, 128256, tied=True), 1.24e9, (3, 4, 6)),
    "3B": (large(3072, 28, 8192, 24, 8, 128256, tied=True), 3.21e9, (5, 8, 14)),
    "7B": (large(4096, 32, 11008, 32, 32, 32000, tied=False), 6.74e9, (8, 16, 32)),
    "13B": (large(5120, 40, 13824, 40, 40, 32000, tied=False), 13.0e9, (12, 28, 56)),
}


@pytest.mark.parametrize("size", TABLE)
def test_the_table_that_users_know(size: str) -> None:
    """With the defaults (batch 4, 16 layers, rank 8, Adam) and rows of 128 tokens, LoRA needs what the table says.

    The table's full column holds no more than weights and gradients of every layer; with the default 16 layers, Adam's
    moments and the update it must be more, and never less than weights, gradients and two moments of those layers.
    """
    config, parameters, (quantized, half, full) = TABLE[size]
    assert architecture(config).parameters == pytest.approx(parameters, rel=0.01)
    job = EstimateOptions(max_seq_length=128)

    def gigabytes(**changes: Any) -> float:
        return estimate(config, None, EstimateOptions(**(vars(job) | changes))).total / 1e9

    assert 0.8 < gigabytes(bits=4) / quantized < 1.35
    assert 0.8 < gigabytes() / half < 1.4
    trained = parameters * min(16 / config["num_hidden_layers"], 0.8) * 2
    assert full * 0.8 < (parameters * 2 + 3 * trained) / 1e9 < gigabytes(fine_tune_type="full") < 2.5 * full


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
def test_every_familys_size_is_known(family: str, bits: int | None, tmp_path: Path) -> None:
    """From the files to the byte, from the configuration but for biases, adapters to the last parameter."""
    folder = tiny_model(tmp_path / family, family, layers=3, quantize=bits, dtype="float16")
    config = json.loads((folder / "config.json").read_text())
    model = architecture(config)
    loaded, _ = load_model(folder)
    true_bytes = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
    exact = read_weights(config, model, weight_shapes(folder))
    assert exact.total_bytes == true_bytes
    assert exact.bits == (bits or 0)
    if family != "gemma3":  # the fixture's file has a head of its own, which its configuration does not say
        assert expected_weights(config, model).total_bytes == pytest.approx(true_bytes, rel=0.06)
    make_trainable(loaded, TuningSpec(num_layers=2, rank=4), 0, RowContext())
    trained = sum(array.size for _, array in tree_flatten(loaded.trainable_parameters()))
    options = EstimateOptions(num_layers=2, rank=4)
    from_files = estimate(config, weight_shapes(folder), options)
    assert from_files.exact_weights
    assert from_files.trainable_parameters == trained
    assert estimate(config, None, options).trainable_parameters == pytest.approx(trained, rel=0.02)


def test_keys_choose_what_is_adapted(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    keys = ("self_attn.q_proj", "mlp.down_proj")
    loaded, _ = load_model(folder)
    make_trainable(loaded, TuningSpec(num_layers=-1, rank=4, keys=keys), 0, RowContext())
    trained = sum(array.size for _, array in tree_flatten(loaded.trainable_parameters()))
    options = EstimateOptions(num_layers=-1, rank=4, keys=keys)
    for shapes in (None, weight_shapes(folder)):
        assert estimate(config, shapes, options).trainable_parameters == trained


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd", "adafactor"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_moments_are_counted_as_they_are(optimizer: str, kind: Any, tmp_path: Path) -> None:
    from node.worker.optimizer import Optimizer

    folder = tiny_model(tmp_path / "llama", "llama")
    loaded, _ = load_model(folder)
    make_trainable(loaded, TuningSpec(kind, num_layers=2), 0, RowContext())
    parameters: Any = loaded.trainable_parameters()
    state = Optimizer(OptimizerSpec(optimizer), parameters).arrays()
    true_bytes = sum(array.nbytes for array in state.values() if isinstance(array, mx.array))
    config = json.loads((folder / "config.json").read_text())
    options = EstimateOptions(fine_tune_type=kind, num_layers=2, optimizer=optimizer)
    found = estimate(config, weight_shapes(folder), options).optimizer_bytes
    assert found == pytest.approx(true_bytes, rel=0.1, abs=2000)


def test_the_parts_add_up_and_grow_with_the_job() -> None:
    config, _, _ = TABLE["3B"]

    def total(**changes: Any) -> int:
        return estimate(config, None, EstimateOptions(**{"max_seq_length": 256, "batch_size": 2} | changes)).total

    found = estimate(config, None, EstimateOptions())
    parts = [value for name, value in vars(found).items() if name.endswith("_bytes")]
    assert sum(parts) == found.total
    assert min(parts) >= 0
    base = total()
    for more in ({"batch_size": 4}, {"max_seq_length": 512}, {"num_layers": -1}, {"rank": 64}):
        assert total(**more) > base
    for less in ({"bits": 4}, {"grad_checkpoint": True}, {"micro_batch_rows": 1}, {"optimizer": "sgd"}):
        assert total(**less) < base
    assert total(batch_size=4) == total(batch_size=64), "more rows at once would be no faster"
    assert total(batch_size=4, fine_tune_type="full") < total(batch_size=64, fine_tune_type="full")
    assert total(num_layers=28) == total(num_layers=-1) == total(num_layers=99)


def test_attention_within_a_window_counts_with_all_scores() -> None:
    def activations(length: int, window: int | None) -> int:
        options = EstimateOptions(max_seq_length=length, batch_size=1, gpu=False)
        return estimate(LLAMA | {"sliding_window": window}, None, options).activation_bytes

    assert activations(512, 512) == activations(512, None)
    assert activations(1024, 512) > 1.3 * activations(1024, None)


def test_a_configuration_that_says_too_little() -> None:
    with pytest.raises(UserError, match="has no hidden_size"):
        estimate({"model_type": "odd"}, None, EstimateOptions())


def test_names_of_older_and_nested_configurations() -> None:
    older = architecture({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257})
    assert older.parameters == pytest.approx(124e6, rel=0.02)
    nested = architecture({"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}})
    assert (nested.hidden, nested.layers) == (256, 4)


def test_what_is_kept_for_other_machines_counts() -> None:
    config = large(4096, 32, 11008, 32, 32, 32000, tied=False)
    plain = EstimateOptions(max_seq_length=128)
    alone, rounded, rounds = (
        estimate(config, None, dataclasses.replace(plain, **changes))
        for changes in ({}, {"rounded": True}, {"rounds": True})
    )
    numbers = 4 * alone.trainable_parameters
    assert rounded.optimizer_bytes - alone.optimizer_bytes == numbers
    # The momentum, and the weights and two moments that a round began with.
    assert rounds.optimizer_bytes - alone.optimizer_bytes == numbers + alone.trainable_bytes + alone.optimizer_bytes
    assert rounds.total > rounded.total > alone.total
    config_of_run = TrainConfig(model="m", gradient_dtype="bf16", local_steps=16)
    assert (estimate_options(config_of_run).rounded, estimate_options(config_of_run).rounds) == (True, True)
    assert not estimate_options(TrainConfig(model="m")).rounds
