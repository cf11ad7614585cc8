"""Which machines train together, and what that will give. Decides only: no I/O, no clock.

``plan`` takes what is known of machines, job and links, and says who takes part, in which ring order, with which
rows of a batch, how long a step will take, and why others are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from coordinator.division import cost_positions, padded_lengths
from coordinator.overlap import last_part, waits
from coordinator.pace import Speed
from coordinator.ring_order import Link, Links, best_order, ring_links, ring_seconds, streams_seconds
from coordinator.shares import micro_batched, positions_of
from node.errors import TooFewNodes
from node.info import GradientDtype
from node.runs import run_count
from node.sizes import show_size
from node.spec import Int32

__all__ = ["Candidate", "JobFacts", "Link", "Links", "Plan", "as_json", "describe", "plan"]

# Every set of machines is tried up to here. Of more: the fastest so many, sets grown from one of the fastest, and the
# best of these without some.
EVERY_SET_MEMBERS = 6
SEEDS = 3
DROPPING_ROUNDS = 8
WORTHWHILE_BATCH_GAIN = 1.15
LARGER_BATCHES = (2, 4, 8, 16)
SLOW_NETWORK = 0.25
WORTHWHILE_ROUNDING_GAIN = 1.1
# From this part of a step on that the network takes, so many local steps are recommended.
LOCAL_STEPS_NETWORK = 1 / 3
LOCAL_STEPS = 16
TIMES = "×"  # noqa: RUF001
HISTORY_STEPS = 5


@dataclass(frozen=True)
class Candidate:
    """A machine that might take part.

    Attributes:
        id, name: of the machine; the name is for people.
        memory_bytes: that the job may use, or None where that is not known.
        needs_bytes: least that the job needs on it, computing row by row.
        token_limit: most input positions of a micro-batch that fit, or None.
        speed: from a probe, or None where there was none.
        problem: why it cannot take part, or "".
    """

    id: str
    name: str
    memory_bytes: int | None
    needs_bytes: int
    token_limit: int | None
    speed: Speed | None
    problem: str = ""


@dataclass(frozen=True)
class JobFacts:
    """What a plan must know of a job.

    Attributes:
        steps: tokens of each row of some typical steps, at least one; with accumulation of all its batches.
        max_seq_length: tokens that rows were cut to.
        batch_size: rows of a batch.
        accumulation: batches of a step.
        gradient_bytes: that each rank contributes to a reduction, as fp32.
        reduction_seconds: what a reduction costs whatever its size.
        streams: whether it goes through the coordinator, and not around a ring.
        hub: id of the machine that the coordinator runs on, or "".
        gradient_dtype: as what gradients are sent; ``auto`` where that is for the plan to say.
        local_steps: steps that share one reduction.
        at_once: most input positions of a micro-batch of anybody, or None.
    """

    steps: tuple[Int32, ...]
    max_seq_length: int
    batch_size: int
    accumulation: int
    gradient_bytes: int
    reduction_seconds: float = 0.005
    streams: bool = False
    hub: str = ""
    gradient_dtype: GradientDtype | Literal["auto"] = "fp32"
    local_steps: int = 1
    at_once: int | None = None

    @property
    def runs(self) -> int:
        """In which a gradient travels, all but the last of them while the rest is computed."""
        return run_count(self.gradient_bytes // 4) if self.local_steps == 1 else 1

    @property
    def sent_bytes(self) -> int:
        """Of a gradient on the wire."""
        return self.gradient_bytes // 2 if self.gradient_dtype == "bf16" else self.gradient_bytes


@dataclass(frozen=True)
class PlannedMember:
    """One rank.

    Attributes:
        candidate: the machine.
        rows: its rows of the first typical step.
        compute_seconds: of its shares, on average.
    """

    candidate: Candidate
    rows: int
    compute_seconds: float


@dataclass(frozen=True)
class LeftOut:
    """A machine that does not take part, and why."""

    id: str
    name: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Who trains.

    Attributes:
        members: in the order of their ranks, which is that of the ring.
        step_rows: rows of the first typical step.
        compute_seconds: until the slowest member has computed its share, on average.
        network_seconds: of the reduction, but for what travels while the rest is computed.
        alone: name of the machine that would be fastest alone.
        alone_seconds: of its step.
        links: that the ring uses; one for two machines.
        left_out: the others.
        advice: lines for the person.
        gradient_dtype: as what gradients are sent.
    """

    members: tuple[PlannedMember, ...]
    step_rows: int
    compute_seconds: float
    network_seconds: float
    alone: str
    alone_seconds: float
    links: tuple[Link, ...]
    left_out: tuple[LeftOut, ...]
    advice: tuple[str, ...]
    gradient_dtype: GradientDtype = "fp32"

    def __str__(self) -> str:
        return "\n".join(describe(self))

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return self.compute_seconds + self.network_seconds

    @property
    def ratio(self) -> float:
        """How many times as fast as the best machine alone."""
        return self.alone_seconds / self.step_seconds


def plan(
    candidates: Sequence[Candidate],
    job: JobFacts,
    links: Links,
    *,
    min_nodes: int = 1,
    force_all: bool = False,
    required_names: Collection[str] = (),
) -> Plan:
    """Decide who takes part.

    Args:
        candidates: all machines that were found.
        job: what is to be trained.
        links: measured, between them.
        min_nodes: fewer members are an error.
        force_all: also take machines that make a step longer; those that cannot compute it stay out.
        required_names: machines that were asked for: they take part even if they make a step longer.

    Raises:
        TooFewNodes: fewer than ``min_nodes`` take part, none can, or one of ``required_names`` cannot.
    """
    if not job.steps or any(len(step) == 0 for step in job.steps):
        raise ValueError("a plan needs at least one step with rows")

    def of(gradient_dtype: GradientDtype) -> Plan:
        known = dataclasses.replace(job, gradient_dtype=gradient_dtype)
        return _plan(candidates, known, links, min_nodes, force_all, required_names)

    if job.gradient_dtype != "auto":
        return of(job.gradient_dtype)
    exact, rounded = of("fp32"), of("bf16")
    unrounded = _Trial(job, links).network_seconds([member.candidate for member in rounded.members])
    slow = unrounded > SLOW_NETWORK * (rounded.compute_seconds + unrounded)
    return rounded if slow and exact.step_seconds >= WORTHWHILE_ROUNDING_GAIN * rounded.step_seconds else exact


def _plan(
    candidates: Sequence[Candidate],
    job: JobFacts,
    links: Links,
    min_nodes: int,
    force_all: bool,
    required_names: Collection[str],
) -> Plan:
    reasons = {candidate.id: _why_not(candidate) for candidate in candidates}
    able = [candidate for candidate in candidates if not reasons[candidate.id]]
    left_out = [LeftOut(c.id, c.name, reasons[c.id]) for c in candidates if reasons[c.id]]
    missing = [*(name for name in required_names if name not in {candidate.name for candidate in candidates})]
    unable = [left for left in left_out if left.name in required_names]
    if missing or unable or not able:
        said = [*(f"{name} was not found" for name in missing), *(f"{left.name}: {left.reason}" for left in unable)]
        if not said:
            said = [f"{left.name}: {left.reason}" for left in left_out] or ["no machine was found"]
        raise TooFewNodes(f"the machines asked for cannot train this: {'; '.join(said)}")
    trial = _Trial(job, links)
    chosen = _choose(able, trial, force_all, {c.id for c in able if c.name in required_names})
    members = {candidate.id for candidate in chosen}
    if not math.isfinite(trial.seconds(chosen)):
        names = ", ".join(candidate.name for candidate in chosen)
        raise TooFewNodes(f"{names} cannot all reach their neighbours in a ring; check the network between them")
    left_out += [LeftOut(c.id, c.name, trial.why_slower(chosen, c)) for c in able if c.id not in members]
    if len(chosen) < min_nodes:
        others = "; ".join(f"{left.name}: {left.reason}" for left in left_out) or "no other machine was found"
        slower = " (--force-all takes slower ones, too)" if len(able) >= min_nodes else ""
        raise TooFewNodes(f"{len(chosen)} of at least {min_nodes} machines take part{slower}: {others}")
    return trial.plan_of(chosen, able, tuple(left_out))


def _why_not(candidate: Candidate) -> str:
    if candidate.problem:
        return candidate.problem
    if candidate.memory_bytes is not None and candidate.memory_bytes < candidate.needs_bytes:
        return f"needs {show_size(candidate.needs_bytes)} of memory, has {show_size(candidate.memory_bytes)}"
    return "" if candidate.speed else "its speed was not measured"


def _speed(candidate: Candidate) -> Speed:
    assert candidate.speed is not None, "only machines with a speed are planned with"
    return candidate.speed


@dataclass(frozen=True)
class _Part:
    """One member's part of a step.

    Attributes:
        rows: of it.
        seconds: to compute it.
        last_seconds: to compute its last micro-batch.
    """

    rows: int
    seconds: float
    last_seconds: float


class _Trial:
    """What sets of machines would give; each set is computed once.

    Args:
        job: what is to be trained.
        links: between the machines.
    """

    def __init__(self, job: JobFacts, links: Links) -> None:
        self.job = job
        self.links = links
        self._known: dict[frozenset[str], float] = {}
        self._computed: dict[tuple[tuple[str, ...], int], tuple[float, float]] = {}

    def seconds(self, members: Sequence[Candidate]) -> float:
        """Of a step; infinite where no ring can be made."""
        key = frozenset(member.id for member in members)
        if key not in self._known:
            order = self.order(members)
            network = self.network_seconds(order)
            self._known[key] = network + (self.compute(order) if math.isfinite(network) else 0.0)
        return self._known[key]

    def order(self, members: Sequence[Candidate]) -> list[Candidate]:
        """Around the ring."""
        by_id = {member.id: member for member in members}
        return [by_id[i] for i in best_order(list(by_id), self.links, self.job.sent_bytes)]

    def network_seconds(self, order: Sequence[Candidate], sent_bytes: int | None = None, times: int = 1) -> float:
        """That a step waits for its reduction, in this ring or over the streams.

        Args:
            order: of the ring.
            sent_bytes: of a gradient; the job's unless told.
            times: of steps with so many times the rows.
        """
        size, runs = self.job.sent_bytes if sent_bytes is None else sent_bytes, self.job.runs
        if runs == 1 or len(order) < 2:
            return self.reduction_seconds(order, size) / self.job.local_steps
        each = self.reduction_seconds(order, size // runs)
        return waits(self._seconds(order, times)[1], each, runs) if math.isfinite(each) else each

    def reduction_seconds(self, order: Sequence[Candidate], sent_bytes: int | None = None) -> float:
        """Of all of a reduction."""
        ids, job = [member.id for member in order], self.job
        size = job.sent_bytes if sent_bytes is None else sent_bytes
        if job.streams:
            return streams_seconds(ids, self.links, job.hub, size, job.reduction_seconds)
        return ring_seconds(ids, self.links, size, job.reduction_seconds)

    def compute(self, members: Sequence[Candidate], times: int = 1) -> float:
        """Until the slowest has computed its share, on average; of steps with so many times the rows."""
        return self._seconds(members, times)[0]

    def _seconds(self, members: Sequence[Candidate], times: int) -> tuple[float, float]:
        """Of the slowest member's share, and of its last micro-batch, on average."""
        key = tuple(member.id for member in members), times
        if key not in self._computed:
            slowest = [
                max(self.parts(members, np.tile(step, times)), key=lambda part: part.seconds) for step in self.job.steps
            ]
            self._computed[key] = (
                statistics.fmean(part.seconds for part in slowest),
                statistics.fmean(part.last_seconds for part in slowest),
            )
        return self._computed[key]

    def parts(self, members: Sequence[Candidate], lengths: Int32) -> list[_Part]:
        """Of each member of a step with such rows."""
        job, speeds = self.job, [_speed(member) for member in members]
        padded = padded_lengths(lengths, job.max_seq_length)
        shares = micro_batched(
            lengths,
            job.max_seq_length,
            speeds,
            [member.token_limit for member in members],
            most_rows=job.batch_size,
            at_once=job.at_once,
        )
        found = []
        for speed, share in zip(speeds, shares, strict=True):
            longest_first = sorted((int(padded[row]) for part in share for row in part), reverse=True)
            seconds = speed.predict(cost_positions(longest_first))
            found.append(_Part(len(longest_first), seconds, seconds * last_part(positions_of(padded, share))))
        return found

    def why_slower(self, chosen: Sequence[Candidate], other: Candidate) -> str:
        """Why this machine is not among the chosen, with figures."""
        with_it = self.seconds([*chosen, other])
        if not math.isfinite(with_it):
            return "no way between it and the others was found over the network"
        without = self.seconds(chosen)
        return f"slower than it is worth: a step takes {_show(with_it)} with it, {_show(without)} without"

    def plan_of(self, chosen: Sequence[Candidate], able: Sequence[Candidate], left_out: tuple[LeftOut, ...]) -> Plan:
        """The plan for these members."""
        order = self.order(chosen)
        steps = [self.parts(order, step) for step in self.job.steps]
        members = tuple(
            PlannedMember(member, steps[0][rank].rows, statistics.fmean(parts[rank].seconds for parts in steps))
            for rank, member in enumerate(order)
        )
        fastest = min(able, key=lambda member: self.seconds([member]))
        result = Plan(
            members=members,
            step_rows=len(self.job.steps[0]),
            compute_seconds=self.compute(order),
            network_seconds=self.network_seconds(order),
            alone=fastest.name,
            alone_seconds=self.seconds([fastest]),
            links=tuple(ring_links([member.id for member in order], self.links)),
            left_out=left_out,
            advice=(),
            gradient_dtype="bf16" if self.job.gradient_dtype == "bf16" else "fp32",
        )
        return dataclasses.replace(result, advice=tuple(self._advice(result, able)))

    def _advice(self, result: Plan, able: Sequence[Candidate]) -> Iterator[str]:
        chosen = [member.candidate for member in result.members]
        if len(able) > 1:
            ratios = {
                times: max(self._ratio(chosen, able, times), self._ratio(able, able, times)) for times in LARGER_BATCHES
            }
            best = max(ratios.values())
            if best >= WORTHWHILE_BATCH_GAIN * result.ratio:
                enough = max(0.9 * best, WORTHWHILE_BATCH_GAIN * result.ratio)
                times = next(times for times, ratio in ratios.items() if ratio >= enough)
                yield (
                    f"batch {self.job.batch_size} limits this fleet to {result.ratio:.1f} {TIMES}; "
                    f"{self.job.batch_size * times} would give {ratios[times]:.1f} {TIMES}"
                )
        slow = result.network_seconds > SLOW_NETWORK * result.step_seconds
        if result.gradient_dtype == "bf16" and len(chosen) > 1:
            exact = _show(self.network_seconds(chosen, self.job.gradient_bytes))
            yield (
                f"gradients travel as bf16: {_show(result.network_seconds)} of network a step instead of {exact};"
                " --gradient-dtype fp32 keeps them exact"
            )
        elif slow:
            rounded = self.network_seconds(chosen, self.job.gradient_bytes // 2)
            if result.step_seconds >= WORTHWHILE_ROUNDING_GAIN * (result.compute_seconds + rounded):
                yield (
                    f"gradients as bf16 would take {_show(rounded)} of network a step instead of"
                    f" {_show(result.network_seconds)}: --gradient-dtype bf16, if the numbers need not be those of one"
                    " machine"
                )
        yield from self._advice_on_local_steps(result, chosen)
        if slow:
            yield _slow_network(result.network_seconds / result.step_seconds)

    def _advice_on_local_steps(self, result: Plan, chosen: Sequence[Candidate]) -> Iterator[str]:
        reduction, steps = self.reduction_seconds(chosen), self.job.local_steps
        if steps > 1 and len(chosen) > 1:
            yield (
                f"machines train {steps} steps by themselves at a time: {_show(result.network_seconds)} of network a"
                f" step instead of {_show(reduction)}; --local-steps 1 gives the numbers of one machine"
            )
        elif result.network_seconds > LOCAL_STEPS_NETWORK * result.step_seconds:
            expected = result.compute_seconds + reduction / LOCAL_STEPS
            yield (
                f"--local-steps {LOCAL_STEPS} would make a step {_show(expected)} instead of"
                f" {_show(result.step_seconds)}, if the numbers need not be those of one machine"
            )

    def _ratio(self, members: Sequence[Candidate], able: Sequence[Candidate], times: int) -> float:
        alone = min(self.compute([member], times) for member in able)
        return alone / (self.compute(members, times) + self.network_seconds(self.order(members), times=times))


def _choose(able: Sequence[Candidate], trial: _Trial, force_all: bool, required: set[str]) -> list[Candidate]:
    """The set with the shortest step; the smaller one of equals. With ``force_all`` the largest that has a ring."""

    def rank(members: Sequence[Candidate]) -> tuple[float, ...]:
        seconds = trial.seconds(members)
        if not math.isfinite(seconds):
            return (1, 0, 0)
        return (0, -len(members), seconds) if force_all else (0, seconds, len(members))

    if len(able) <= EVERY_SET_MEMBERS:
        return min(_every_set(able, required), key=rank)
    fastest = sorted(able, key=lambda candidate: (candidate.id not in required, _speed(candidate).seconds_per_position))
    grown = [_grown(fastest, seed, len(required), rank) for seed in range(1 if required else SEEDS)]
    best = min([*(fastest[:count] for count in range(max(1, len(required)), len(able) + 1)), *grown], key=rank)
    for _ in range(DROPPING_ROUNDS):
        # A slow link spoils a ring that the speeds alone would choose.
        smaller = [[c for c in best if c.id != drop.id] for drop in best if drop.id not in required and len(best) > 1]
        better = min([best, *smaller], key=rank)
        if better is best:
            break
        best = better
    members = {candidate.id for candidate in best}
    return [candidate for candidate in able if candidate.id in members]


def _every_set(able: Sequence[Candidate], required: set[str]) -> Iterator[list[Candidate]]:
    """All sets with those that are required, in the order of ``able``."""
    rest = [candidate.id for candidate in able if candidate.id not in required]
    for count in range(0 if required else 1, len(rest) + 1):
        for pick in itertools.combinations(rest, count):
            yield [candidate for candidate in able if candidate.id in required or candidate.id in pick]


def _grown(
    fastest: Sequence[Candidate], seed: int, required: int, rank: Callable[[Sequence[Candidate]], tuple[float, ...]]
) -> list[Candidate]:
    """Those required, or else the one at ``seed``, and of the others, fastest first, each that makes the set better."""
    best = list(fastest[:required]) if required else [fastest[seed]]
    for candidate in fastest:
        if candidate not in best and rank([*best, candidate]) < rank(best):
            best.append(candidate)
    return best


def describe(result: Plan) -> list[str]:
    """The plan in lines for people."""
    first = result.members[0].candidate.name
    if len(result.members) == 1:
        lines = [f"{first} trains alone: a step takes about {_show(result.step_seconds)}"]
    else:
        lines = [f"{len(result.members)} machines: about {result.ratio:.1f} {TIMES} {result.alone} alone"]
        for member in result.members:
            lines.append(
                f"{member.candidate.name} {member.rows}/{result.step_rows} of the rows, "
                f"computes {_show(member.compute_seconds)}{_memory(member.candidate)}"
            )
        lines.append(
            f"a step takes about {_show(result.step_seconds)}: {_show(result.compute_seconds)} compute, "
            f"{_show(result.network_seconds)} network ({_show(result.alone_seconds)} on {result.alone} alone)"
        )
        lines += [link.text for link in result.links if link.text]
    lines += [f"{left.name} is left out: {left.reason}" for left in result.left_out]
    return lines + list(result.advice)


def as_json(result: Plan) -> dict[str, Any]:
    """The plan for programs; seconds, bytes and bits per second."""
    return {
        "members": [
            {
                "rank": rank,
                "id": member.candidate.id,
                "name": member.candidate.name,
                "rows": member.rows,
                "compute_seconds": member.compute_seconds,
                "needs_bytes": member.candidate.needs_bytes,
                "memory_bytes": member.candidate.memory_bytes,
                "token_limit": member.candidate.token_limit,
            }
            for rank, member in enumerate(result.members)
        ],
        "step_rows": result.step_rows,
        "step_seconds": result.step_seconds,
        "compute_seconds": result.compute_seconds,
        "network_seconds": result.network_seconds,
        "gradient_dtype": result.gradient_dtype,
        "alone": {"name": result.alone, "step_seconds": result.alone_seconds},
        "ratio": result.ratio,
        "links": [dataclasses.asdict(link) for link in result.links],
        "left_out": [dataclasses.asdict(left) for left in result.left_out],
        "advice": list(result.advice),
    }


def _memory(candidate: Candidate) -> str:
    if candidate.memory_bytes is None:
        return ""
    return f", needs {show_size(candidate.needs_bytes)} of {show_size(candidate.memory_bytes)}"


def _show(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def _slow_network(fraction: float) -> str:
    return (
        f"the network takes {100 * fraction:.0f} % of a step; a larger batch, --grad-accumulation-steps or a faster "
        "link (a cable in place of Wi-Fi) would help"
    )


@dataclass(frozen=True)
class StepSplit:
    """Where a step's time went.

    Attributes:
        compute_seconds: of the rank that computed longest.
        network_seconds: that even this rank waited: the reduction itself.
        imbalance_seconds: that the rank which waited longest waited beyond that.
    """

    compute_seconds: float
    network_seconds: float
    imbalance_seconds: float


def network_waits(compute_seconds: Sequence[float], wait_seconds: Sequence[float]) -> StepSplit:
    """Tell the network's part of the ranks' waiting from that of unequal shares.

    Args:
        compute_seconds: of each rank in one step.
        wait_seconds: of each rank in that step's reduction.
    """
    longest = max(compute_seconds)
    # Ranks within 5 % count as longest: which of them entered last is noise.
    last = [wait for compute, wait in zip(compute_seconds, wait_seconds, strict=True) if compute >= 0.95 * longest]
    network = min(last)
    return StepSplit(longest, network, max(0.0, max(wait_seconds) - network))


def says_slow_network(history: Sequence[StepSplit]) -> str | None:
    """What to tell the person when the network takes over a quarter of the steps, by the median of the last few."""
    if len(history) < HISTORY_STEPS:
        return None
    recent = history[-4 * HISTORY_STEPS :]
    totals = [split.compute_seconds + split.network_seconds for split in recent]
    fraction = statistics.median(
        split.network_seconds / total if total > 0 else 0.0 for split, total in zip(recent, totals, strict=True)
    )
    return _slow_network(fraction) if fraction > SLOW_NETWORK else None
