"""A run of a fleet in simulated time: shares, computing, sums, and machines that slow down or are lost."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coordinator.division import padded_lengths
from coordinator.overlap import known_after, last_part
from coordinator.pace import Pace, Speed
from coordinator.planner import Candidate, JobFacts, StepSplit, network_waits, plan
from coordinator.ring_order import best_order, ring_links
from coordinator.shares import micro_batched, positions_of
from coordinator.simulation.clock import Clock
from coordinator.simulation.network import Network
from coordinator.simulation.sums import Costs, make_sums
from node.errors import TooFewNodes
from node.spec import Int32

# As many as ``engine.STEPS_AHEAD``: shares are made before the steps ahead of them have told how fast the machines are.
STEPS_AHEAD = 4
REGROUP_SECONDS = 4.0
"""Until the others train again when one is lost: its end is noticed, and a new group forms."""


@dataclass(frozen=True)
class Slowdown:
    """From ``at_seconds`` on a machine takes ``times`` as long; 1.0 ends an earlier one."""

    at_seconds: float
    times: float


@dataclass(frozen=True)
class Machine:
    """A machine of a simulated fleet.

    Attributes:
        candidate: what the planner knows of it; its speed is its true one.
        noise: standard deviation of the logarithm of its seconds for equal shares.
        slowdowns: in order of time.
        lost_at: seconds; None never.
    """

    candidate: Candidate
    noise: float = 0.0
    slowdowns: tuple[Slowdown, ...] = ()
    lost_at: float | None = None

    def times_slower(self, seconds: float) -> float:
        """Than its speed says, at a time."""
        return next((slow.times for slow in reversed(self.slowdowns) if slow.at_seconds <= seconds), 1.0)


@dataclass(frozen=True)
class Step:
    """A step that all ranks have applied.

    Attributes:
        number: from 1.
        ended: seconds since the beginning of the run.
        compute_seconds, wait_seconds, positions: of each rank, by the machine's id.
        tokens: real ones, padding not counted.
    """

    number: int
    ended: float
    compute_seconds: Mapping[str, float]
    wait_seconds: Mapping[str, float]
    positions: Mapping[str, int]
    tokens: int

    @property
    def split(self) -> StepSplit:
        """Where its time went, as the engine tells it of real steps."""
        return network_waits(list(self.compute_seconds.values()), list(self.wait_seconds.values()))


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        ranks: ids of the machines that began it, in the order of the ring.
        steps: all, in order.
        warm_up: so many of the first ones that averages leave out.
        replayed: steps that were computed again.
    """

    ranks: tuple[str, ...]
    steps: tuple[Step, ...]
    warm_up: int
    replayed: int = 0

    @property
    def counted(self) -> tuple[Step, ...]:
        """The steps that averages are of."""
        return self.steps[self.warm_up :]

    @property
    def step_seconds(self) -> float:
        """Of a step, on average."""
        before = self.steps[self.warm_up - 1].ended if self.warm_up else 0.0
        return (self.steps[-1].ended - before) / len(self.counted)

    @property
    def network_seconds(self) -> float:
        """That a step takes longer than the slowest rank computes and all apply, on average: the sum."""
        return statistics.fmean(step.split.network_seconds for step in self.counted)

    @property
    def compute_seconds(self) -> float:
        """Of a step without the sum, on average: the slowest rank's, and the update."""
        return self.step_seconds - self.network_seconds

    @property
    def waiting_seconds(self) -> float:
        """That a machine waits for slower ones in a step: on average of steps and machines."""
        return statistics.fmean(
            max(0.0, wait - step.split.network_seconds) for step in self.counted for wait in step.wait_seconds.values()
        )

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return statistics.fmean(step.tokens for step in self.counted) / self.step_seconds


def simulate(
    machines: Sequence[Machine],
    job: JobFacts,
    network: Network,
    costs: Costs | None = None,
    *,
    steps: int = 20,
    warm_up: int = 2,
    seed: int = 0,
    everyone: bool = False,
) -> Outcome:
    """Choose who takes part as the planner does, and run so many steps.

    Args:
        machines: all that there are.
        job: what is to be trained; its typical steps are taken in turn.
        network: between them.
        costs: beside computing and the network; those of ``Costs`` where none are known.
        steps: to run.
        warm_up: steps at the beginning that averages leave out.
        seed: of the noise. The same arguments give the same outcome.
        everyone: have all take part, also those with which a step takes longer.

    Raises:
        TooFewNodes: no machine can take part, or those that must do not reach each other.
    """
    if not 0 <= warm_up < steps:
        raise ValueError(f"of {steps} steps {warm_up} cannot be left out")
    candidates = [machine.candidate for machine in machines]
    if everyone:
        ranks = best_order([candidate.id for candidate in candidates], network.links, job.gradient_bytes)
        if not all(link.bits_per_second > 0 for link in ring_links(ranks, network.links)):
            raise TooFewNodes("these machines cannot all reach their neighbours in a ring")
    else:
        ranks = [member.candidate.id for member in plan(candidates, job, network.links).members]
    by_id = {machine.candidate.id: machine for machine in machines}
    # By the place among all machines: who else takes part does not change a machine's noise.
    place = {machine.candidate.id: number for number, machine in enumerate(machines)}
    noise = {rank: np.random.default_rng([seed, place[rank]]) for rank in ranks}
    run = _Run([by_id[rank] for rank in ranks], job, network, costs or Costs(), steps, noise)
    run.clock.run()
    return Outcome(tuple(ranks), tuple(run.steps), warm_up, run.replayed)


@dataclass
class _Rank:
    """Where one rank is.

    Attributes:
        machine: whose it is.
        pace: as its steps have shown it.
        step: that it works on, or waits for.
        idle: whether it waits for the coordinator.
        known, summed: runs of its step's gradient that it has computed, and that are added up.
        summing: whether one is being added up.
    """

    machine: Machine
    pace: Pace
    step: int = 1
    idle: bool = True
    known: int = 0
    summed: int = 0
    summing: bool = False

    @property
    def id(self) -> str:
        return self.machine.candidate.id


@dataclass
class _Reports:
    """Of one step, by machine."""

    compute: dict[str, float] = field(default_factory=dict)
    wait: dict[str, float] = field(default_factory=dict)


class _Run:
    def __init__(
        self,
        machines: Sequence[Machine],
        job: JobFacts,
        network: Network,
        costs: Costs,
        steps: int,
        noise: Mapping[str, np.random.Generator],
    ) -> None:
        self.clock = Clock()
        self.steps: list[Step] = []
        self.replayed = 0
        self._job, self._network, self._costs, self._total, self._noise = job, network, costs, steps, noise
        self._ranks = [_Rank(machine, Pace(_speed(machine))) for machine in machines]
        self._group = 0  # what belongs to an earlier one has no effect any more
        for machine in machines:
            if machine.lost_at is not None:
                self.clock.at(machine.lost_at, functools.partial(self._lose, machine.candidate.id))
        self._form(1)

    # --- the group --------------------------------------------------------------------------------------------------

    def _form(self, first: int) -> None:
        """Go on from a step with the ranks that there are."""
        ids = [rank.id for rank in self._ranks]
        self._runs = self._job.runs if len(ids) > 1 else 1
        run = dataclasses.replace(self._job, gradient_bytes=-(-self._job.gradient_bytes // self._runs))
        self._sums = make_sums(ids, run, self._network, self.clock, self._costs) if len(ids) > 1 else None
        self._reports: dict[int, _Reports] = {}
        self._shares: dict[int, dict[str, list[int]]] = {}
        self._sent = first - 1
        for rank in self._ranks:
            rank.step, rank.idle, rank.summing = first, True, False
        self._send()

    def _lose(self, machine: str) -> None:
        if len(self.steps) >= self._total or machine not in {rank.id for rank in self._ranks}:
            return
        self._group += 1
        self._ranks = [rank for rank in self._ranks if rank.id != machine]
        if not self._ranks:
            return
        # The newest state that anybody left holds is given to all; what was computed of later steps is lost.
        applied = max((rank.step - 1 for rank in self._ranks), default=0)
        for number in range(len(self.steps) + 1, applied + 1):
            self._finish(number)
        self.replayed += len(self._reports)  # of steps that nobody left has applied
        self._reports = {}
        group = self._group
        self.clock.after(REGROUP_SECONDS, lambda: self._form(applied + 1) if group == self._group else None)

    # --- the coordinator --------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Divide the next steps, a few ahead, and wake who waits for them."""
        while self._sent < min(self._total, len(self.steps) + STEPS_AHEAD):
            self._sent += 1
            self._shares[self._sent] = self._divided(self._sent)
        for rank in self._ranks:
            if rank.idle and rank.step <= self._sent:
                self._begin(rank)

    def _divided(self, number: int) -> dict[str, list[int]]:
        """Input positions of the micro-batches of each rank."""
        job, lengths = self._job, self._lengths(number)
        parts = micro_batched(
            lengths,
            job.max_seq_length,
            [rank.pace.now for rank in self._ranks],
            [rank.machine.candidate.token_limit for rank in self._ranks],
            most_rows=job.batch_size,
            at_once=job.at_once,
        )
        padded = padded_lengths(lengths, job.max_seq_length)
        return {rank.id: positions_of(padded, own) for rank, own in zip(self._ranks, parts, strict=True)}

    def _lengths(self, number: int) -> Int32:
        return self._job.steps[(number - 1) % len(self._job.steps)]

    def _finish(self, number: int) -> None:
        """A step is done: learn from it."""
        reports, shares = self._reports.pop(number), self._shares.pop(number)
        positions = {rank: sum(share) for rank, share in shares.items()}
        for rank in self._ranks:
            if rank.id in reports.wait:
                rank.pace = rank.pace.observed(positions[rank.id], reports.compute[rank.id])
        compute = {machine: reports.compute[machine] for machine in reports.wait}
        tokens = int(self._lengths(number).sum())
        self.steps.append(Step(number, self.clock.now, compute, dict(reports.wait), positions, tokens))

    # --- a rank -----------------------------------------------------------------------------------------------------

    def _begin(self, rank: _Rank) -> None:
        rank.idle = False
        number = rank.step
        machine, noise = rank.machine, rank.machine.noise
        share = self._shares[number][rank.id]
        seconds = _speed(machine).predict(sum(share))
        if seconds and noise:
            seconds *= math.exp(noise * self._noise[rank.id].standard_normal() - noise * noise / 2)
        seconds = _stretched(machine, self.clock.now, seconds)
        self._reports.setdefault(number, _Reports()).compute[rank.id] = seconds
        computed, last = self.clock.now + seconds, seconds * last_part(share)
        rank.known, rank.summed = 0, 0
        for run in range(1, self._runs + 1):
            left = last * (1 - known_after(run, self._runs))
            self._later(seconds - left, lambda: self._known(rank, number, computed))

    def _known(self, rank: _Rank, number: int, computed: float) -> None:
        """A rank has one run more of a step's gradient, which is all computed at a time."""
        rank.known += 1
        self._give(rank, number, computed)

    def _give(self, rank: _Rank, number: int, computed: float) -> None:
        """Enter the next sum, where there is something to give."""
        group = self._group

        def summed() -> None:
            if group != self._group:
                return
            rank.summing = False
            rank.summed += 1
            if rank.summed == self._runs:
                wait = self.clock.now - computed
                self._later(self._costs.apply_seconds, lambda: self._applied(rank, number, wait))
            else:
                self._give(rank, number, computed)

        if rank.summing or rank.summed == rank.known:
            return
        rank.summing = True
        if self._sums is None:
            summed()
        else:
            self._sums.enter(self._ranks.index(rank), summed)

    def _applied(self, rank: _Rank, number: int, wait: float) -> None:
        self._reports[number].wait[rank.id] = wait
        rank.step = number + 1
        rank.idle = True
        if len(self._reports[number].wait) == len(self._ranks):
            self._finish(number)
            self._send()
        if rank.idle and rank.step <= self._sent:
            self._begin(rank)

    def _later(self, seconds: float, happen: Callable[[], None]) -> None:
        """Have something happen in so many seconds, if the group is the same then."""
        group = self._group
        self.clock.after(seconds, lambda: happen() if group == self._group else None)


def _speed(machine: Machine) -> Speed:
    assert machine.candidate.speed is not None, "the planner leaves out machines without a speed"
    return machine.candidate.speed


def _stretched(machine: Machine, begin: float, seconds: float) -> float:
    """How long work takes that would take so long, as the machine slows down or recovers meanwhile."""
    left, now = seconds, begin
    for change in (slow.at_seconds for slow in machine.slowdowns if slow.at_seconds > begin):
        times = machine.times_slower(now)
        if left * times <= change - now:
            break
        left -= (change - now) / times
        now = change
    return now - begin + left * machine.times_slower(now)
