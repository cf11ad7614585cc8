"""What measured steps say: machines and costs that made them are found again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from coordinator.planner import JobFacts
from coordinator.simulation.calibration import ALONE, WARM_UP, Measured, calibrate, measured_steps
from coordinator.simulation.steps import Machine, Step, simulate
from coordinator.simulation.sums import Costs
from node.errors import UserError
from tests.coordinator.simulation.made import machine, network

RANDOM = np.random.default_rng(5)
ROWS = tuple(np.clip(RANDOM.lognormal(5, 0.6, 24), 8, 1024).astype(np.int32) for _ in range(8))
JOB = JobFacts(ROWS, 2048, 24, 1, 1 << 20)
COSTS = Costs(apply_seconds=0.03, sum_seconds=0.04)
NETWORK = network(["a", "b", "c"], 3e7, 1e-3)
FLEET = [machine("a", 2000, 0.05, noise=0.04), machine("b", 1200, 0.05, noise=0.04), machine("c", 700, 0.1, noise=0.04)]


def metrics(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """As a run writes them."""
    return [
        {
            "step": step.number,
            "loss": 1.0,
            "seconds": max(step.compute_seconds[i] + step.wait_seconds[i] for i in step.wait_seconds) + 0.03,
            "per_node": {
                i: {
                    "rows": 8,
                    "positions": step.positions[i],
                    "compute_seconds": step.compute_seconds[i],
                    "wait_seconds": step.wait_seconds[i],
                }
                for i in step.wait_seconds
            },
        }
        for step in steps
    ]


def measured(machines: Sequence[Machine], seed: int = 1, job: JobFacts = JOB) -> list[Measured]:
    found = simulate(machines, job, NETWORK, COSTS, steps=40, seed=seed, everyone=True)
    return measured_steps(metrics(found.steps))


def test_runs_of_one_and_two_predict_three() -> None:
    known = calibrate([(measured(FLEET[:2]), JOB), (measured(FLEET[2:]), JOB)], NETWORK)
    assert known.costs.apply_seconds == pytest.approx(0.03)
    assert known.costs.sum_seconds == pytest.approx(0.04, abs=0.02)
    for one in FLEET:
        fitted = known.machines[one.candidate.name]
        assert one.candidate.speed is not None
        assert fitted.speed.predict(2000) == pytest.approx(one.candidate.speed.predict(2000), rel=0.03)
        assert fitted.noise == pytest.approx(0.04, abs=0.015)
    again = [machine(name, 1, noise=fitted.noise) for name, fitted in known.machines.items()]
    machines = [
        Machine(one.candidate.__class__(one.candidate.id, one.candidate.name, None, 0, None, fitted.speed), one.noise)
        for one, fitted in zip(again, known.machines.values(), strict=True)
    ]
    predicted = simulate(machines, JOB, NETWORK, known.costs, steps=40, everyone=True)
    truly = simulate(FLEET, JOB, NETWORK, COSTS, steps=40, seed=9, everyone=True)
    assert predicted.step_seconds == pytest.approx(truly.step_seconds, rel=0.05)


@pytest.mark.parametrize("megabytes", [4, 12])
def test_sums_that_travel_while_the_rest_is_computed_tell_what_they_cost(megabytes: int) -> None:
    large = dataclasses.replace(JOB, gradient_bytes=megabytes << 20)
    known = calibrate([(measured(FLEET[:2], job=large), large)], NETWORK)
    assert known.costs.apply_seconds == pytest.approx(0.03)
    again = simulate(FLEET[:2], large, NETWORK, known.costs, steps=40, everyone=True)
    truly = simulate(FLEET[:2], large, NETWORK, COSTS, steps=40, everyone=True)
    assert again.network_seconds == pytest.approx(truly.network_seconds, rel=0.1)
    assert again.step_seconds == pytest.approx(truly.step_seconds, rel=0.05)


def test_the_first_steps_of_each_group_teach_nothing() -> None:
    two = metrics(simulate(FLEET[:2], JOB, NETWORK, steps=8, everyone=True).steps)
    one = metrics(simulate(FLEET[:1], JOB, NETWORK, steps=6, everyone=True).steps)
    found = measured_steps([*two, {"step": 8, "val_loss": 1.0, "seconds": 3.0}, *one])
    assert [step.number for step in found] == [*range(WARM_UP + 1, 9), *range(WARM_UP + 1, 7)]


def test_a_machine_alone_is_named_by_nobody() -> None:
    entries = [
        {"step": i, "loss": 1.0, "seconds": 1.1, "compute_seconds": 1.0, "wait_seconds": 0.0, "padded_tokens": 500}
        for i in range(1, 11)
    ]
    known = calibrate([(measured_steps(entries), JOB)], NETWORK)
    assert known.machines[ALONE].speed.predict(500) == pytest.approx(1.0)
    assert known.machines[ALONE].noise == pytest.approx(0.0)
    assert known.costs.apply_seconds == pytest.approx(0.1)
    assert known.costs.sum_seconds == Costs().sum_seconds, "nothing was added up"


def test_a_step_in_which_somebody_was_lost_is_passed_over() -> None:
    entries = metrics(simulate(FLEET[:2], JOB, NETWORK, steps=8, everyone=True).steps)
    entries[5]["per_node"]["b"] = {"rows": 8}
    assert [step.number for step in measured_steps(entries)] == [4, 5, 7, 8]


def test_a_machine_that_slept_is_not_called_noisy() -> None:
    entries = metrics(simulate(FLEET[:2], JOB, NETWORK, steps=40, everyone=True).steps)
    entries[20]["per_node"]["a"]["compute_seconds"] *= 50
    known = calibrate([(measured_steps(entries), JOB)], NETWORK)
    assert known.machines["a"].noise < 0.08


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UserError, match="2 settled steps are too few"):
        calibrate([(measured(FLEET[:2])[:2], JOB)], NETWORK)
