"""Fleets of so many machines of each kind, and what one more of them gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.pace import Speed
from coordinator.planner import Candidate, JobFacts, Plan, plan
from coordinator.ring_order import Link
from coordinator.simulation.network import Medium, Network
from coordinator.simulation.steps import Machine, Outcome, simulate
from coordinator.simulation.sums import Costs
from node.spec import Int32

MOST_MACHINES = 64
PAYS = 0.05
"""One more machine pays when it makes the fleet faster by so much."""
EVERY_COUNT = 12
"""Up to here each number of machines is tried, beyond it some."""
COUNTS = (16, 24, 32, 48, 64)
SHARE_SECONDS = 0.02
"""Of starting any share, where only tokens per second are known."""
STEPS, WARM_UP = 13, 1
TYPICAL_STEPS = 12
PLANNED_STEPS = 2
SPREAD = 0.6
"""Standard deviation of the logarithm of the rows' lengths, as of chats: a few are long."""


@dataclass(frozen=True)
class Wire:
    """A link and what it is made of."""

    link: Link
    medium: Medium


@dataclass(frozen=True)
class Kind:
    """Machines that are alike.

    Attributes:
        name: of each of them, with a number where there are several.
        speed: of each.
        count: how many there are.
        noise: see ``Machine``.
        token_limit: see ``Candidate``.
    """

    name: str
    speed: Speed
    count: int = 1
    noise: float = 0.03
    token_limit: int | None = None

    @property
    def names(self) -> list[str]:
        """Of the machines."""
        return [self.name] if self.count == 1 else [f"{self.name} {number}" for number in range(1, self.count + 1)]


@dataclass(frozen=True)
class Fleet:
    """What is simulated.

    Attributes:
        kinds: of the machines.
        job: what is trained.
        usual: between machines of kinds that are not in ``wires``.
        wires: by the names of two kinds, in either order; of one kind among its own by its name twice.
        costs: beside computing and the network.
    """

    kinds: tuple[Kind, ...]
    job: JobFacts
    usual: Wire
    wires: Mapping[tuple[str, str], Wire] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)

    @property
    def size(self) -> int:
        """Number of machines."""
        return sum(kind.count for kind in self.kinds)

    @property
    def machines(self) -> list[Machine]:
        """All, the fastest first."""
        found = [
            Machine(Candidate(name, name, None, 0, kind.token_limit, kind.speed), kind.noise)
            for kind in self.kinds
            for name in kind.names
        ]
        return sorted(found, key=_seconds_per_position)

    @property
    def network(self) -> Network:
        """Between all of them."""
        kind_of = {name: kind.name for kind in self.kinds for name in kind.names}
        names = list(kind_of)
        pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
        wires = {(a, b): self._wire(kind_of[a], kind_of[b]) for a, b in pairs}
        return Network(
            {pair: wire.link for pair, wire in wires.items()},
            {pair: wire.medium for pair, wire in wires.items()},
            self.usual.medium,
        )

    def _wire(self, one: str, other: str) -> Wire:
        return self.wires.get((one, other)) or self.wires.get((other, one)) or self.usual

    def with_more(self, name: str, more: int = 1) -> Fleet:
        """The fleet with further machines of a kind."""
        return dataclasses.replace(
            self,
            kinds=tuple(
                dataclasses.replace(kind, count=kind.count + more) if kind.name == name else kind for kind in self.kinds
            ),
        )

    def run(self, machines: Sequence[Machine] | None = None) -> Outcome:
        """Steps of all machines, or of these."""
        chosen = self.machines if machines is None else machines
        return simulate(chosen, self.job, self.network, self.costs, steps=STEPS, warm_up=WARM_UP, everyone=True)

    def plan(self) -> Plan:
        """Whom the planner would take."""
        job = self.job
        if self.size > EVERY_COUNT:
            # It tries many sets of them, each on every typical step.
            job = dataclasses.replace(job, steps=job.steps[:PLANNED_STEPS])
        return plan([machine.candidate for machine in self.machines], job, self.network.links)


@dataclass(frozen=True)
class Row:
    """What so many of the machines give.

    Attributes:
        machines: their names, the fastest first.
        outcome: of their steps.
        speed_up: over the first one alone.
        gain: of each machine that the row before has not, as a part of its speed; None for the first row.
    """

    machines: tuple[str, ...]
    outcome: Outcome
    speed_up: float
    gain: float | None

    @property
    def pays(self) -> bool:
        """Whether the machines that the row before has not are worth it."""
        return self.gain is None or self.gain >= PAYS


@dataclass(frozen=True)
class More:
    """What one more machine of a kind gives.

    Attributes:
        kind: its name.
        gain: a part of the whole fleet's speed.
        stops_at: where all machines are of one kind, how many of them is too many: the last one gives too little.
            None where there are several kinds, or no number up to the most is too many.
    """

    kind: str
    gain: float
    stops_at: int | None = None

    @property
    def pays(self) -> bool:
        """Whether it is worth it."""
        return self.gain >= PAYS


@dataclass(frozen=True)
class Growth:
    """A fleet, from its fastest machine to all of them, and beyond.

    Attributes:
        fleet: all of it.
        rows: of more and more machines; the last of all.
        more: what one more of each kind gives; empty where there are as many as can be.
        plan: whom the planner takes.
    """

    fleet: Fleet
    rows: tuple[Row, ...]
    more: tuple[More, ...]
    plan: Plan


def growth(fleet: Fleet) -> Growth:
    """Simulate a fleet, its fastest machines, and one more.

    Raises:
        TooFewNodes: machines do not reach each other.
    """
    machines = fleet.machines
    rows: list[Row] = []
    for count in _counts(len(machines)):
        rows.append(_row(fleet, machines[:count], rows[-1] if rows else None))
    more = []
    if fleet.size < MOST_MACHINES:
        whole = rows[-1].outcome.tokens_per_second
        for kind in fleet.kinds:
            larger = fleet.with_more(kind.name)
            gain = larger.run().tokens_per_second / whole - 1
            stops_at = _stops_at(fleet, rows) if len(fleet.kinds) == 1 else None
            more.append(More(kind.name, gain, stops_at))
    return Growth(fleet, tuple(rows), tuple(more), fleet.plan())


def _row(fleet: Fleet, machines: Sequence[Machine], before: Row | None) -> Row:
    outcome = fleet.run(machines)
    names = tuple(machine.candidate.name for machine in machines)
    if before is None:
        return Row(names, outcome, 1.0, None)
    ratio = outcome.tokens_per_second / before.outcome.tokens_per_second
    further = len(names) - len(before.machines)
    return Row(names, outcome, before.speed_up * ratio, ratio ** (1 / further) - 1)


def _stops_at(fleet: Fleet, rows: Sequence[Row]) -> int | None:
    """The first number of machines of the only kind of which the last one does not pay."""
    found = next((row for row in rows if not row.pays), None)
    if found is not None:
        return len(found.machines)
    row = rows[-1]
    for count in range(fleet.size + 1, MOST_MACHINES + 1):
        larger = fleet.with_more(fleet.kinds[0].name, count - fleet.size)
        row = _row(larger, larger.machines, row)
        if not row.pays:
            return count
    return None


def _counts(size: int) -> list[int]:
    return sorted({*range(1, min(size, EVERY_COUNT) + 1), *(count for count in COUNTS if count < size), size})


def _seconds_per_position(machine: Machine) -> float:
    assert machine.candidate.speed is not None, "every kind has a speed"
    return machine.candidate.speed.seconds_per_position


def typical_rows(rows: int, mean_length: float, max_seq_length: int) -> tuple[Int32, ...]:
    """Lengths of the rows of some steps, always the same ones: many short, a few long.

    Args:
        rows: of each step.
        mean_length: tokens of a row, on average over all steps.
        max_seq_length: most tokens of a row.
    """
    random = np.random.default_rng(0)
    drawn = random.lognormal(0.0, SPREAD, (TYPICAL_STEPS, rows))
    lengths = np.clip(np.rint(drawn * mean_length / drawn.mean()), 2, max_seq_length)
    return tuple(step.astype(np.int32) for step in lengths)


def speed_of(tokens_per_second: float) -> Speed:
    """Of a machine of which only this is known; padding counts as tokens."""
    if not (tokens_per_second > 0 and math.isfinite(tokens_per_second)):
        raise ValueError(f"tokens per second must be above 0, not {tokens_per_second}")
    return Speed(SHARE_SECONDS, 1 / tokens_per_second)
