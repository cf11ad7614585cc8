"""A run that was, as the beginning of a fleet."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.data.padding import RUNGS
from coordinator.planner import JobFacts
from coordinator.ring_order import Link
from coordinator.simulation.calibration import FEWEST_STEPS, WARM_UP, Measured, calibrate
from coordinator.simulation.fleets import Fleet, Kind, Wire
from coordinator.simulation.network import Network
from node.errors import UserError
from node.spec import Int32

LATEST_STEPS = 64
"""So many of the last steps are taken for typical ones."""


@dataclass(frozen=True)
class PastRun:
    """What a run has measured.

    Attributes:
        folder: its folder.
        steps: settled ones.
        links: by the names of two machines.
        gradient_bytes: that each rank added to a sum; None where the run has saved no weights yet.
        batch_size, accumulation, max_seq_length: its options.
        streams: whether its sums went through the coordinator.
    """

    folder: Path
    steps: tuple[Measured, ...]
    links: Mapping[tuple[str, str], Link]
    gradient_bytes: int | None
    batch_size: int
    accumulation: int
    max_seq_length: int
    streams: bool

    @property
    def latest(self) -> tuple[Measured, ...]:
        """The settled steps of the ranks that it had at its end.

        Raises:
            UserError: there are too few.
        """
        last = set(self.steps[-1].rows) if self.steps else set()
        found = tuple(step for step in self.steps if set(step.rows) == last)
        if len(found) < FEWEST_STEPS:
            raise UserError(
                f"{self.folder} has {len(found)} settled steps, too few to learn from: the first {WARM_UP} of a fleet "
                f"do not count, and {FEWEST_STEPS} more are needed"
            )
        return found

    @property
    def members(self) -> list[str]:
        """Names of those ranks."""
        return sorted(self.latest[-1].rows)

    @property
    def step_seconds(self) -> float:
        """Of those steps, on average."""
        return statistics.fmean(step.seconds for step in self.latest)

    def job(self, gradient_bytes: int) -> JobFacts:
        """What it trained: as many rows as its steps had, of about one length, with as many input positions."""
        return JobFacts(
            steps=tuple(
                _rows(sum(step.rows.values()), sum(step.positions.values())) for step in self.latest[-LATEST_STEPS:]
            ),
            max_seq_length=self.max_seq_length,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            gradient_bytes=gradient_bytes,
            streams=self.streams,
        )


def _rows(rows: int, positions: int) -> Int32:
    """Lengths of so many rows that take so many input positions, of the two padded lengths next to their mean."""
    mean = positions / rows
    above = min(int(np.searchsorted(RUNGS, mean)), len(RUNGS) - 1)
    short, long = RUNGS[max(0, above - 1)], RUNGS[above]
    longer = round((positions - rows * short) / (long - short)) if long > short else 0
    longer = min(max(longer, 0), rows)
    # A row of n tokens has n - 1 input positions.
    return np.array([long + 1] * longer + [short + 1] * (rows - longer), np.int32)


def fleet_of(
    past: PastRun,
    gradient_bytes: int,
    wires: Mapping[tuple[str, str], Wire],
    usual: Wire,
    added: tuple[Kind, ...] = (),
) -> Fleet:
    """The machines of a run as it has shown them, and further ones.

    Args:
        past: the run.
        gradient_bytes: that each rank adds to a sum.
        wires: links that are to be taken in place of the measured ones, by names.
        usual: the link of those that the run knows nothing of, if it has measured none; else they have its median one.
        added: machines that it did not have.

    Raises:
        UserError: it has too few settled steps.
    """
    measured = {pair: Wire(link, "switch") for pair, link in past.links.items() if link.bits_per_second > 0}
    if measured:
        links = [wire.link for wire in measured.values()]
        bits = statistics.median(link.bits_per_second for link in links)
        usual = Wire(Link(bits, statistics.median(link.latency_seconds for link in links)), "switch")
    given = {frozenset(pair) for pair in wires}
    known = {pair: wire for pair, wire in measured.items() if frozenset(pair) not in given} | dict(wires)
    job = past.job(gradient_bytes)
    # What the sum cost beside the network is found with the links that it really went over.
    network = Network({pair: wire.link for pair, wire in measured.items()})
    found = calibrate([(past.latest, job)], network)
    kinds = tuple(Kind(name, fitted.speed, noise=fitted.noise) for name, fitted in found.machines.items())
    return Fleet((*kinds, *added), job, usual, known, found.costs)
