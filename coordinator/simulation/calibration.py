"""What measured steps of one or a few machines say about each of them, and about the sum."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.pace import Speed
from coordinator.planner import Candidate, JobFacts, StepSplit, network_waits
from coordinator.ring_order import BUCKET_BYTES
from coordinator.simulation.network import Network
from coordinator.simulation.steps import Machine, simulate
from coordinator.simulation.sums import Costs, sum_seconds
from node.errors import UserError

WARM_UP = 3
"""Steps at the beginning of a run, and after its ranks have changed, that teach nothing: memory and shapes are new."""
FEWEST_STEPS = 3
BISECTIONS, TRIED_STEPS = 12, 8
OUTLIER_TIMES = 3.0
"""A share that took so many times the usual is not the machine's noise: it slept, or was used for something else."""
ALONE = "this Mac"
"""Who did the steps that name nobody."""


@dataclass(frozen=True)
class Measured:
    """One step of a run, as its ``metrics.jsonl`` tells it.

    Attributes:
        number: from 1.
        seconds: of the rank that took longest.
        compute_seconds, wait_seconds, positions, rows: of each machine, by name.
    """

    number: int
    seconds: float
    compute_seconds: Mapping[str, float]
    wait_seconds: Mapping[str, float]
    positions: Mapping[str, int]
    rows: Mapping[str, int]

    @property
    def split(self) -> StepSplit:
        """Where its time went."""
        return network_waits(list(self.compute_seconds.values()), list(self.wait_seconds.values()))


@dataclass(frozen=True)
class Fitted:
    """A machine as its steps show it.

    Attributes:
        speed: of its shares.
        noise: standard deviation of the logarithm of its seconds for equal shares.
    """

    speed: Speed
    noise: float


@dataclass(frozen=True)
class Calibration:
    """What was learnt.

    Attributes:
        machines: by name.
        costs: beside computing and the network.
    """

    machines: Mapping[str, Fitted]
    costs: Costs


def measured_steps(metrics: Sequence[Mapping[str, Any]], alone: str = ALONE) -> list[Measured]:
    """The settled steps of a run: without the first few, and the first few after its ranks have changed.

    Args:
        metrics: objects of its ``metrics.jsonl``; those of validations are passed over.
        alone: name of the machine of steps that name none.
    """
    found: list[Measured] = []
    ranks: frozenset[str] = frozenset()
    since = 0
    for entry in metrics:
        step = _measured(entry, alone)
        if step is None:
            continue
        since = since + 1 if ranks == step.rows.keys() else 1
        ranks = frozenset(step.rows)
        if since > WARM_UP:
            found.append(step)
    return found


def calibrate(runs: Sequence[tuple[Sequence[Measured], JobFacts]], network: Network) -> Calibration:
    """Fit machines, and what a sum costs beside the network.

    Args:
        runs: settled steps, each with what the job adds up; runs of one machine teach nothing of the sum.
        network: between the machines, by their names.

    Raises:
        UserError: there are too few steps.
    """
    steps = [step for measured, _ in runs for step in measured]
    if len(steps) < FEWEST_STEPS:
        raise UserError(
            f"{len(steps)} settled steps are too few to learn from: of a run the first {WARM_UP} do not count, and "
            f"{FEWEST_STEPS} more are needed"
        )
    costs = Costs()
    names = sorted({name for step in steps for name in step.positions})
    machines = {name: fitted for name in names if (fitted := _fit(name, steps)) is not None}
    costs = dataclasses.replace(costs, apply_seconds=statistics.median(_apply_seconds(step) for step in steps))
    beyond = [
        _sum_seconds(together, job, network, costs, machines)
        for measured, job in runs
        if (together := [step for step in measured if len(step.wait_seconds) > 1])
    ]
    if beyond:
        costs = dataclasses.replace(costs, sum_seconds=max(0.0, statistics.fmean(beyond)))
    return Calibration(machines, costs)


def _sum_seconds(
    together: Sequence[Measured],
    job: JobFacts,
    network: Network,
    costs: Costs,
    machines: Mapping[str, Fitted],
) -> float:
    """What each bucket or run of a sum cost beside the network, in these steps of several machines."""
    ids = list(together[-1].wait_seconds)
    same = [step for step in together if len(step.wait_seconds) == len(ids)]
    took = statistics.median(step.split.network_seconds for step in same)
    if job.runs == 1:
        wire = sum_seconds(ids, job, network, dataclasses.replace(costs, sum_seconds=0.0))
        return (took - wire) / max(1, -(-job.gradient_bytes // BUCKET_BYTES))
    if not machines.keys() >= set(ids):
        return costs.sum_seconds  # when one was ready that never had any rows, nobody knows
    # A part of it was over before the computing was: the cost with which as much is left as was seen.
    members = [Machine(Candidate(name, name, None, 0, None, machines[name].speed)) for name in ids]
    low, high = 0.0, took
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = dataclasses.replace(costs, sum_seconds=middle)
        found = simulate(members, job, network, tried, steps=TRIED_STEPS, everyone=True)
        low, high = (middle, high) if found.network_seconds < took else (low, middle)
    return low


def _fit(name: str, steps: Sequence[Measured]) -> Fitted | None:
    """A machine, by the shares that it computed; None of one that never had any."""
    samples = [
        (step.positions[name], step.compute_seconds[name])
        for step in steps
        if step.positions.get(name, 0) > 0 and step.compute_seconds[name] > 0
    ]
    if not samples:
        return None
    usual = statistics.median(seconds / positions for positions, seconds in samples)
    kept = [(positions, seconds) for positions, seconds in samples if seconds <= OUTLIER_TIMES * usual * positions]
    speed = Speed.of_steps(kept or samples)
    apart = [math.log(seconds / speed.predict(positions)) for positions, seconds in kept]
    return Fitted(speed, statistics.pstdev(apart) if apart else 0.0)


def _apply_seconds(step: Measured) -> float:
    """What the step took beyond computing and waiting."""
    longest = max(step.compute_seconds[name] + step.wait_seconds[name] for name in step.wait_seconds)
    return max(0.0, step.seconds - longest)


def _measured(entry: Mapping[str, Any], alone: str) -> Measured | None:
    """A step of the metrics; None of what is none, or lacks a figure: somebody was lost in it."""
    if "loss" not in entry or "seconds" not in entry:
        return None
    parts = entry.get("per_node") or {
        alone: {"rows": 1, "positions": entry.get("padded_tokens"), **{key: entry.get(key) for key in _SECONDS}}
    }
    if any(not isinstance(part, dict) or any(part.get(key) is None for key in _FIGURES) for part in parts.values()):
        return None
    return Measured(
        number=int(entry["step"]),
        seconds=float(entry["seconds"]),
        compute_seconds={name: float(part["compute_seconds"]) for name, part in parts.items()},
        wait_seconds={name: float(part["wait_seconds"]) for name, part in parts.items()},
        positions={name: int(part["positions"]) for name, part in parts.items()},
        rows={name: int(part["rows"]) for name, part in parts.items()},
    )


_SECONDS = ("compute_seconds", "wait_seconds")
_FIGURES = ("rows", "positions", *_SECONDS)
