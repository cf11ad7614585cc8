"""A run on several machines computes what one machine computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.api import train
from coordinator.config import TrainConfig
from coordinator.config_file import write_yaml
from node.home import home
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode, serving
from tests.fixtures.pairs import pair
from tests.fixtures.runs import Run, assert_same_losses, losses, metrics, validations, write_chat_data

NAMES = ("anna", "ben", "cleo")
# Of a loss in fp32 and in bf16, and of all final weights together (L2).
FP32 = 1e-4
BF16 = 5e-3
WEIGHTS = 1e-3


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: of the case.
        nodes: ranks.
        options: of the run.
        model: of ``tiny_model``.
        tolerance: of each step's loss.
    """

    name: str
    nodes: int
    options: dict[str, Any]
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = FP32


FAST = [
    # 7 rows: no number of ranks divides them, and 30 rows are no whole number of batches.
    Case("masked prompts, accumulated", 2, {"batch_size": 7, "mask_prompt": True, "grad_accumulation_steps": 3}),
    Case("frozen layers' outputs kept", 2, {"batch_size": 7, "num_layers": 1, "reuse_prefix": "on"}),
    Case("dropout and noise, 3 ranks", 3, {"batch_size": 5, "lora_dropout": 0.2, "neftune_alpha": 5.0}),
]
SLOW = [
    Case("half precision", 2, {"batch_size": 3}, {"dtype": "bfloat16"}, BF16),
    Case("one rank that is not here", 1, {"batch_size": 4, "lora_dropout": 0.1}),
    Case("fewer rows than ranks", 3, {"batch_size": 2, "lora_dropout": 0.1, "mask_prompt": True}),
    Case("all weights", 3, {"batch_size": 5, "fine_tune_type": "full", "learning_rate": 1e-5}),
    Case("DoRA", 2, {"batch_size": 5, "fine_tune_type": "dora", "optimizer": "adamw", "max_grad_norm": 0.5}),
    Case("quantized", 2, {"batch_size": 6, "lora_dropout": 0.1}, {"quantize": 4}),
    Case("accumulated, 3 ranks", 3, {"batch_size": 4, "grad_accumulation_steps": 4, "neftune_alpha": 5.0}),
]


def as_parameters(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServingNode]]:
    """Three machines; they are told of each other by address."""
    with serving(tmp_path_factory.mktemp("nodes"), *NAMES, environment={"TANDEM_BONJOUR": "off"}) as found:
        yield found


def config_of(case: Case, folder: Path) -> TrainConfig:
    model = tiny_model(folder / "model", "llama", **case.model)
    data = write_chat_data(folder / "data", train=30, valid=6)
    options: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "iters": 24,
        "learning_rate": 1e-4,
        "num_layers": -1,
        "steps_per_eval": 12,
        "save_every": 12,
        **case.options,
    }
    return TrainConfig(**options)


def check(case: Case, nodes: list[ServingNode], folder: Path) -> None:
    """Train here alone, then on so many nodes and not here; compare."""
    for node in nodes:
        pair(node.home, home())
    config = config_of(case, folder)
    alone = dataclasses.replace(config, adapter_path=str(folder / "alone"), nodes="local", reuse_prefix="off")
    train(alone)
    together = dataclasses.replace(
        config,
        adapter_path=str(folder / "together"),
        nodes=",".join(node.address for node in nodes[: case.nodes]),
        local=False,
        force_all=True,
        min_nodes=case.nodes,
    )
    file = folder / "together.yaml"
    file.write_text(write_yaml(together))
    code, errors = Run("train", "-c", file).wait()
    assert code == 0, errors

    for curve in (losses, validations):
        assert_same_losses(curve(folder / "together"), curve(folder / "alone"), case.tolerance)
    here, there = (load_file(folder / name / "adapters.safetensors") for name in ("alone", "together"))
    assert here.keys() == there.keys()
    difference, size = (
        sum(float((values.astype(np.float64) ** 2).sum()) for values in arrays) ** 0.5
        for arrays in ([here[name] - there[name] for name in here], list(here.values()))
    )
    assert difference <= WEIGHTS * size
    if case.nodes > 1:
        rows = [entry["per_node"] for entry in metrics(folder / "together") if "per_node" in entry]
        assert len(rows) == len(losses(folder / "together"))
        busy = sum(sum(step[node.name]["rows"] for step in rows) > 0 for node in nodes[: case.nodes])
        # With few rows the slowest may never get one, as on a machine that does other things too.
        assert busy >= min(case.nodes, 2), "nobody shared the work"


@pytest.mark.parametrize("case", as_parameters(FAST))
def test_the_numbers_are_those_of_one_machine(case: Case, nodes: list[ServingNode], tmp_path: Path) -> None:
    check(case, nodes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", as_parameters(SLOW))
def test_the_numbers_are_those_of_one_machine_in_more_cases(
    case: Case, nodes: list[ServingNode], tmp_path: Path
) -> None:
    check(case, nodes, tmp_path)
