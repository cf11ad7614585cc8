"""The coordinator's tables of what the worker knows, against the worker's own and ``mlx.optimizers``."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from coordinator.update_rule import ARGUMENTS, SCHEDULES, check_arguments, check_schedule
from node.exports.kinds import GGUF_MODEL_TYPES
from node.spec import OptimizerSpec
from node.worker.gguf import SUPPORTED
from node.worker.optimizer import CLASSES, Optimizer, learning_rates

GOOD: dict[str, dict[str, Any]] = {
    "adam": {"betas": [0.8, 0.95], "eps": 1e-6, "bias_correction": True},
    "adamw": {"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True},
    "muon": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": False, "ns_steps": 3},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.0, "nesterov": True},
    "adafactor": {
        "eps": [1e-30, 1e-3],
        "clip_threshold": 2.0,
        "decay_rate": -0.7,
        "beta_1": 0.9,
        "weight_decay": 0.1,
        "scale_parameter": False,
        "relative_step": False,
        "warmup_init": False,
    },
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_arguments_are_those_of_the_class(name: str) -> None:
    parameters = set(inspect.signature(CLASSES[name]).parameters)
    assert set(ARGUMENTS[name]) == parameters - {"learning_rate"}
    assert set(ARGUMENTS) == set(CLASSES)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_passes_the_check_makes_an_optimizer_that_updates(name: str) -> None:
    assert set(GOOD[name]) == set(ARGUMENTS[name])
    check_arguments({name: GOOD[name]})
    parameters = {"weight": mx.ones((4, 4))}
    optimizer = Optimizer(OptimizerSpec(name=name, arguments=GOOD[name]), parameters)
    updated = optimizer.update(parameters, {"weight": mx.full((4, 4), 0.5)}, 0.1)
    assert not mx.array_equal(updated["weight"], parameters["weight"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedules_are_those_of_the_library(name: str) -> None:
    names, needed = SCHEDULES[name]
    parameters = inspect.signature(getattr(optim.schedulers, name)).parameters
    assert tuple(parameters) == names
    assert sum(item.default is inspect.Parameter.empty for item in parameters.values()) == needed


def test_no_schedule_that_yaml_can_express_is_left_out() -> None:
    functions = {
        name: function
        for name, function in inspect.getmembers(optim.schedulers, inspect.isfunction)
        if function.__module__ == optim.schedulers.__name__
    }
    assert set(functions) == {*SCHEDULES, "join_schedules"}, "join_schedules takes functions"


@pytest.mark.parametrize("warmup", [None, 0, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_passes_the_check_gives_learning_rates(name: str, warmup: int | None) -> None:
    values = {"init": 1e-3, "decay_rate": 0.5, "step_size": 2, "decay_steps": 10, "end": 0.0, "steps": 10}
    names, _ = SCHEDULES[name]
    schedule = {"name": name, "arguments": [values[argument] for argument in names], "warmup": warmup}
    check_schedule(schedule)
    rates = learning_rates(OptimizerSpec(schedule=schedule))
    assert rates(1) == pytest.approx(0.0 if warmup else 1e-3)
    assert rates(20) < 1e-3


def test_the_models_that_can_be_exported() -> None:
    assert set(GGUF_MODEL_TYPES) == set(SUPPORTED)
