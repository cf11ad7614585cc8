"""Fleets for the simulator."""

from __future__ import annotations

import itertools
import math

import numpy as np

from coordinator.pace import Speed
from coordinator.planner import Candidate, JobFacts
from coordinator.ring_order import Link
from coordinator.simulation.network import Medium, Network
from coordinator.simulation.steps import Machine
from coordinator.simulation.sums import Costs

FREE = Costs(apply_seconds=0.0, sum_seconds=0.0, memory_bytes_per_second=math.inf)
"""Nothing but computing and the network costs anything."""


def machine(name: str, tokens_per_second: float = 1000.0, overhead: float = 0.0, **more: object) -> Machine:
    candidate = Candidate(name, name, None, 0, None, Speed(overhead, 1 / tokens_per_second))
    return Machine(candidate, **more)  # type: ignore[arg-type]


def names(count: int) -> list[str]:
    return [f"m{number:02d}" for number in range(count)]


def network(ids: list[str], bits_per_second: float, latency_seconds: float = 0.0, medium: Medium = "switch") -> Network:
    link = Link(bits_per_second, latency_seconds)
    return Network(dict.fromkeys(itertools.combinations(ids, 2), link), usual=medium)


def job(rows: int = 16, gradient_bytes: int = 8 << 20, length: int = 257, **more: object) -> JobFacts:
    return JobFacts((np.full(rows, length, np.int32),), 2048, rows, 1, gradient_bytes, **more)  # type: ignore[arg-type]
