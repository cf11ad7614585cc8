"""The same losses, gradients and weights as ``mlx_lm``'s own layers and loss give, step by step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.datasets import CompletionsDataset
from mlx_lm.tuner.utils import build_schedule
from mlx_lm.utils import load_tokenizer

from coordinator import api
from coordinator.config import TrainConfig
from coordinator.data.batches import Batches
from node.spec import OptimizerSpec, TuningSpec
from tests.fixtures.models import tiny_model
from tests.fixtures.oracle import Batch, OracleRun, oracle_run
from tests.fixtures.training import InProcess, as_rows, difference, random_batches, relative_difference

TOLERANCE = 1e-4
LORA: dict[str, Any] = {"rank": 4, "scale": 10.0, "dropout": 0.0}
WORDS = ("seven", "swift", "foxes", "jump", "over", "lazy", "dogs", "while", "twelve", "owls", "watch", "old", "rivers")
ADAPTER = TuningSpec(num_layers=-1, rank=4, scale=10.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("plain"), "llama")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("quantized"), "llama", quantize=4)


def assert_same(ours: InProcess, oracle: OracleRun) -> None:
    assert ours.losses == pytest.approx(oracle.losses, abs=TOLERANCE)
    assert ours.grad_norms == pytest.approx(oracle.grad_norms, rel=TOLERANCE)
    assert relative_difference(ours.weights, oracle.weights) < TOLERANCE
    # Numbers that stand still would agree with anything.
    assert difference(oracle.weights, oracle.initial_weights) > 40 * TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["whole rows", "masked prompts"])
@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "qdora", "full"])
def test_each_method(method: str, masked: bool, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue("quantized" if method.startswith("q") else "plain")
    kind: Any = method.removeprefix("q")
    batches = random_batches(3, masked=masked) * 2
    oracle = oracle_run(model, batches, fine_tune_type=kind, lora_parameters=LORA, learning_rates=1e-3, seed=3)
    spec = replace(ADAPTER, fine_tune_type=kind)
    ours = InProcess(model, spec, OptimizerSpec(learning_rate=1e-3), seed=3).run(batches)
    assert_same(ours, oracle)
    assert sum(oracle.losses[3:]) < sum(oracle.losses[:3]) - 0.2
    targets = [as_rows(batch).target_tokens for batch in batches]
    assert [done.tokens for done in ours.done] == targets


@pytest.mark.parametrize(
    ("name", "arguments", "rate"),
    [
        ("adam", {"bias_correction": True}, 1e-3),
        ("adamw", {"weight_decay": 0.1}, 1e-3),
        ("muon", {}, 1e-3),
        ("sgd", {"momentum": 0.9}, 1e-2),
        ("adafactor", {"relative_step": False, "scale_parameter": False}, 1e-3),
        ("adafactor", {}, 1e-3),
    ],
)
def test_each_optimizer(plain: Path, name: str, arguments: dict[str, Any], rate: float) -> None:
    batches = random_batches(5)
    oracle = oracle_run(
        plain, batches, lora_parameters=LORA, optimizer=name, optimizer_config=arguments, learning_rates=rate
    )
    ours = InProcess(plain, ADAPTER, OptimizerSpec(name=name, arguments=arguments, learning_rate=rate)).run(batches)
    assert_same(ours, oracle)


def test_schedule(plain: Path) -> None:
    schedule = {"name": "cosine_decay", "arguments": [1e-3, 8, 1e-5], "warmup": 3, "warmup_init": 1e-5}
    batches = random_batches(8)
    theirs = build_schedule(schedule)
    rates = [float(theirs(mx.array(update))) for update in range(8)]
    oracle = oracle_run(plain, batches, lora_parameters=LORA, learning_rates=rates)
    ours = InProcess(plain, ADAPTER, OptimizerSpec(learning_rate=1.0, schedule=schedule)).run(batches)
    assert_same(ours, oracle)
    assert [done.learning_rate for done in ours.done] == pytest.approx(rates)
    assert max(rates) > 50 * min(rates)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_accumulated_and_clipped(plain: Path, clip: float) -> None:
    batches = random_batches(8, masked=True)[:7]  # the last step takes one batch, not two
    oracle = oracle_run(
        plain, batches, lora_parameters=LORA, learning_rates=1e-2, optimizer="sgd", accumulation=2, max_grad_norm=clip
    )
    optimizer = OptimizerSpec(name="sgd", learning_rate=1e-2, max_grad_norm=clip)
    ours = InProcess(plain, ADAPTER, optimizer).run(batches, accumulation=2)
    assert len(ours.losses) == 4
    assert min(oracle.grad_norms) > 0.5
    if clip:
        assert ours.losses == pytest.approx(oracle.losses, abs=TOLERANCE)
        assert ours.grad_norms == pytest.approx(oracle.grad_norms, rel=TOLERANCE)
        assert difference(ours.weights, oracle.weights) < TOLERANCE / 10
    else:
        assert_same(ours, oracle)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_grad_checkpoint(plain: Path, method: Any) -> None:
    batches = random_batches(4)
    oracle = oracle_run(plain, batches, fine_tune_type=method, lora_parameters=LORA, learning_rates=1e-3)
    spec = replace(ADAPTER, fine_tune_type=method, grad_checkpoint=True)
    assert_same(InProcess(plain, spec, OptimizerSpec(learning_rate=1e-3)).run(batches), oracle)


def test_last_layers_and_chosen_keys(plain: Path) -> None:
    keys = ("self_attn.q_proj", "mlp.down_proj")
    batches = random_batches(4)
    oracle = oracle_run(plain, batches, lora_parameters=LORA | {"keys": list(keys)}, num_layers=1, learning_rates=1e-3)
    ours = InProcess(plain, replace(ADAPTER, num_layers=1, keys=keys), OptimizerSpec(learning_rate=1e-3)).run(batches)
    assert_same(ours, oracle)
    assert len(ours.weights) == 4


# --- through the command's own function: files, tokens, batches, a worker process ------------------------------------


def write_completions(folder: Path, rows: int) -> list[dict[str, str]]:
    """A training set of rows of very different lengths."""
    content = [
        {
            "prompt": " ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + i % 5)),
            "completion": " ".join(WORDS[(5 * i + j) % len(WORDS)] for j in range(1 + (7 * i) % 11)),
        }
        for i in range(rows)
    ]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return content


def oracle_batches(model: Path, rows: list[dict[str, str]], config: TrainConfig) -> list[Batch]:
    """The run's batches, tokenised and masked by ``mlx_lm``."""
    dataset = CompletionsDataset(rows, load_tokenizer(model), "prompt", "completion", config.mask_prompt)
    tokenised: Any = [dataset.process(row) for row in rows]
    lengths = np.array([len(tokens) for tokens, _ in tokenised], np.int32)
    order = Batches(lengths, config.batch_size, config.seed)
    assert config.iters is not None
    return [[tokenised[row] for row in order.rows(i)] for i in range(1, config.iters + 1)]


def whole_run(model: Path, folder: Path, **options: Any) -> tuple[OracleRun, list[dict[str, Any]], dict[str, mx.array]]:
    """Train by the real program and by the oracle.

    Returns:
        The oracle's run, our metrics, our saved weights.
    """
    rows = write_completions(folder / "data", 18)
    config = TrainConfig(
        model=str(model),
        data=str(folder / "data"),
        adapter_path=str(folder / "adapters"),
        batch_size=4,
        iters=7,  # 5 batches are an epoch, the last of them two rows
        warmup=0,
        learning_rate=1e-3,
        num_layers=-1,
        lora_rank=4,
        lora_scale=10.0,
        val_batches=0,
        seed=5,
        **options,
    )
    accumulation = config.grad_accumulation_steps
    oracle = oracle_run(
        model,
        oracle_batches(model, rows, config),
        fine_tune_type=config.fine_tune_type,
        lora_parameters=LORA,
        learning_rates=1e-3,
        seed=5,
        accumulation=accumulation,
    )
    result = api.train(config)
    assert result.steps == -(-7 // accumulation)
    lines = (folder / "adapters" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    saved: Any = mx.load(str(folder / "adapters" / "adapters.safetensors"))
    return oracle, [json.loads(line) for line in lines], saved


@pytest.mark.parametrize(
    "options",
    [
        {"mask_prompt": True},
        {"fine_tune_type": "full", "grad_checkpoint": True},
        {"mask_prompt": True, "grad_accumulation_steps": 2},
    ],
    ids=["lora, masked prompts", "full, checkpointed", "lora, accumulated"],
)
def test_whole_run(plain: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    oracle, metrics, saved = whole_run(plain, tmp_path, **options)
    assert [line["step"] for line in metrics] == list(range(1, len(oracle.losses) + 1))
    assert [line["loss"] for line in metrics] == pytest.approx(oracle.losses, abs=TOLERANCE)
    assert [line["grad_norm"] for line in metrics] == pytest.approx(oracle.grad_norms, rel=TOLERANCE)
    assert relative_difference(saved, oracle.weights) < TOLERANCE
    assert difference(saved, oracle.initial_weights) > 50 * TOLERANCE
