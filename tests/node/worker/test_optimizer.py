from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from node.errors import UserError
from node.spec import OptimizerSpec, Restore, TuningSpec
from node.worker.optimizer import CLASSES, Optimizer, chooses_own_rate, learning_rates
from node.worker.state import load_copy, save_arrays
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, difference, random_batches

BATCHES = random_batches(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def test_warm_up_rises_linearly_to_its_peak() -> None:
    rate = learning_rates(OptimizerSpec(learning_rate=1e-3, warmup_steps=4))
    assert [rate(step) for step in range(1, 7)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    rate = learning_rates(OptimizerSpec(learning_rate=1e-3))
    assert [rate(1), rate(1000)] == [1e-3, 1e-3]


ADAFACTOR: dict[str, dict[str, Any]] = {
    "relative": {"scale_parameter": False, "clip_threshold": 1e9},
    "warming up": {"scale_parameter": False, "clip_threshold": 1e9, "warmup_init": True},
    "told": {"scale_parameter": False, "clip_threshold": 1e9, "relative_step": False},
}


@pytest.mark.parametrize("case", ADAFACTOR)
def test_adafactors_rate_is_the_one_it_uses(case: str) -> None:
    spec = OptimizerSpec("adafactor", ADAFACTOR[case], learning_rate=3e-3, warmup_steps=2)
    rate = learning_rates(spec)
    parameters = {"bias": mx.ones(4)}
    optimizer = Optimizer(spec, parameters)
    for step in (1, 2, 3):
        now = optimizer.update(parameters, {"bias": mx.ones(4)}, rate(step))
        # With equal gradients all along the update is the rate itself.
        assert (parameters["bias"] - now["bias"]).tolist() == pytest.approx([rate(step)] * 4, rel=1e-3, abs=1e-7)
        parameters = now
    assert chooses_own_rate(spec) == (case != "told")
    expected = {"relative": [1e-2, 1e-2], "warming up": [1e-6, 4e-6], "told": [1.5e-3, 3e-3]}
    assert [rate(1), rate(4)] == pytest.approx(expected[case])
    assert learning_rates(OptimizerSpec("adafactor"))(40_000) == pytest.approx(0.005)


def test_schedule_is_evaluated_at_the_updates_made_before() -> None:
    rate = learning_rates(OptimizerSpec(schedule={"name": "cosine_decay", "arguments": [1e-3, 10, 1e-4]}))
    theirs = optim.cosine_decay(1e-3, 10, 1e-4)
    expected = [float(theirs(mx.array(update))) for update in range(12)]
    assert [rate(step) for step in range(1, 13)] == pytest.approx(expected)
    assert expected[0] == pytest.approx(1e-3)
    assert expected[10] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "no_such_schedule", "arguments": [1e-3]},
        {"name": "cosine_decay", "arguments": []},
        {"name": "cosine_decay", "arguments": [1e-3]},
        {"name": "cosine_decay", "arguments": ["fast", 10]},
        {"name": "cosine_decay"},
        {"arguments": [1e-3]},
        {"name": "cosine_decay", "arguments": 1e-3},
    ],
)
def test_an_impossible_schedule_is_the_persons_mistake(schedule: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lr_schedule") as caught:
        learning_rates(OptimizerSpec(schedule=schedule))
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_the_persons_mistake() -> None:
    with pytest.raises(UserError, match=r"optimizer_config: adamw: .*speed"):
        Optimizer(OptimizerSpec(name="adamw", arguments={"speed": 3}), {"w": mx.zeros(2)})


def test_loraplus_makes_b_learn_faster() -> None:
    parameters = {"layers": [{"lora_a": mx.zeros(3), "lora_b": mx.zeros(3), "m": mx.zeros(3)}]}
    gradients = {"layers": [{"lora_a": mx.ones(3), "lora_b": mx.ones(3), "m": mx.ones(3)}]}
    optimizer = Optimizer(OptimizerSpec(name="sgd", loraplus_ratio=16.0), parameters)
    updated = dict(tree_flatten(optimizer.update(parameters, gradients, 0.5)))
    assert {name: array.tolist() for name, array in updated.items()} == {
        "layers.0.lora_a": [-0.5] * 3,
        "layers.0.lora_b": [-8.0] * 3,
        "layers.0.m": [-0.5] * 3,
    }


def test_loraplus_in_a_step(model: Path) -> None:
    spec = OptimizerSpec(name="sgd", learning_rate=1e-3)
    start = InProcess(model).weights
    plain = InProcess(model, optimizer=spec).run(BATCHES[:1]).weights
    plus = InProcess(model, optimizer=replace(spec, loraplus_ratio=4.0)).run(BATCHES[:1]).weights
    for name in start:
        ratio = 4.0 if name.endswith("lora_b") else 1.0
        assert mx.allclose(plus[name] - start[name], ratio * (plain[name] - start[name]), rtol=1e-3, atol=1e-7)
    assert any(mx.abs(plain[name] - start[name]).max() > 1e-4 for name in start if name.endswith("lora_b"))


def test_clipping_limits_the_update_and_reports_the_norm_before(model: Path) -> None:
    free = OptimizerSpec(name="sgd", learning_rate=1.0)
    start = InProcess(model).weights

    def moved(spec: OptimizerSpec) -> tuple[float, float]:
        run = InProcess(model, optimizer=spec).run(BATCHES[:1])
        length: Any = mx.sqrt(sum((mx.square(run.weights[name] - start[name]).sum() for name in start), mx.array(0.0)))
        return run.grad_norms[0], length.item()

    norm, length = moved(free)
    assert length == pytest.approx(norm, rel=1e-4)
    assert moved(replace(free, max_grad_norm=norm / 8)) == pytest.approx((norm, norm / 8), rel=1e-4)
    assert moved(replace(free, max_grad_norm=norm * 8)) == pytest.approx((norm, norm), rel=1e-4)


SPECS = [
    *(OptimizerSpec(name=name, learning_rate=1e-3, warmup_steps=4) for name in CLASSES),
    OptimizerSpec(name="sgd", arguments={"momentum": 0.9}, learning_rate=1e-3),
    OptimizerSpec(name="adam", arguments={"bias_correction": True}, learning_rate=1e-3, loraplus_ratio=4.0),
    OptimizerSpec(learning_rate=1e-3, max_grad_norm=0.5),
    OptimizerSpec(schedule={"name": "linear_schedule", "arguments": [1e-3, 1e-4, 5]}),
]


@pytest.mark.parametrize("num_layers", [-1, 1])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}{'+' * (spec.loraplus_ratio != 1)}")
def test_state_through_files_goes_on_bitwise(model: Path, tmp_path: Path, spec: OptimizerSpec, num_layers: int) -> None:
    tuning = TuningSpec(num_layers=num_layers, dropout=0.1)
    there = InProcess(model, tuning, spec).run(BATCHES[:3])
    state = there.trainer.published()
    weights = save_arrays(tmp_path / "w.safetensors", state.parameters)
    moments = save_arrays(tmp_path / "o.safetensors", state.moments)
    there.run(BATCHES[3:])
    again = InProcess(model, tuning, spec, seed=0)
    again.trainer.restore(load_copy(tmp_path, Restore(3, weights, moments)))
    again.run(BATCHES[3:])
    assert again.losses == there.losses[3:]
    assert again.grad_norms == there.grad_norms[3:]
    assert difference(again.weights, there.weights) == 0
    after, expected = again.trainer.published().moments, there.trainer.published().moments
    assert set(after) == set(expected)
    assert all(mx.array_equal(after[name], expected[name]) for name in after)


@pytest.mark.parametrize(
    ("tuning", "spec"),
    [
        (TuningSpec(num_layers=-1), OptimizerSpec(name="sgd")),
        (TuningSpec(num_layers=1), OptimizerSpec(name="adam")),
        (TuningSpec(num_layers=-1, rank=2), OptimizerSpec(name="adam")),
        (TuningSpec(num_layers=-1), OptimizerSpec(name="adam", loraplus_ratio=2.0)),
    ],
)
def test_state_of_another_run_is_refused(model: Path, tuning: TuningSpec, spec: OptimizerSpec) -> None:
    state = InProcess(model, TuningSpec(num_layers=-1), OptimizerSpec(name="adam")).run(BATCHES[:1]).trainer.published()
    other = InProcess(model, tuning, spec)
    with pytest.raises(UserError, match=r"saved .* not fit"):
        other.trainer.restore(state)
