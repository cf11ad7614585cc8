"""A sum over the ranks, packet by packet: around a ring as MLX moves it, or through the coordinator.

MLX's ring (``mlx/distributed/ring/ring.cpp``, read for version 0.32) cuts the numbers in two halves that go round in
opposite directions where each piece stays above 256 KB. A half is cut into one segment for each rank, and a segment
into packets of at most 8 MB, at least two where they stay above 128 KB. In each of ``2 * (ranks - 1)`` turns a rank
sends a segment to its neighbour while it receives another one, which in the first half of the turns it adds to its own.
Two packets are under way at any time: the next one is sent when the one before the last has been sent and its
counterpart has arrived and been added.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.planner import JobFacts
from coordinator.ring_order import BUCKET_BYTES, link_between
from coordinator.simulation.clock import Clock
from coordinator.simulation.network import Network, Traffic
from node.spec import PIECE_BYTES, PIECES_IN_FLIGHT

SMALLEST_PART_BYTES = 256 << 10
SMALLEST_PACKET_BYTES = 128 << 10
LARGEST_PACKET_BYTES = 8 << 20
# Of a large sum so many buckets, or pieces, are followed; the others take as long as the last of these.
FOLLOWED_BUCKETS = 4
FOLLOWED_PIECES = 96
HUB = "coordinator"
"""Stands for a coordinator whose machine does not train."""

Done = Callable[[], None]


class Sums(Protocol):
    """The sums of one group, one after another."""

    def enter(self, rank: int, done: Done) -> None:
        """A rank gives its numbers of the next sum now; ``done`` happens when it has the total."""


@dataclass(frozen=True)
class Costs:
    """What a step costs beside computing and the network.

    Attributes:
        apply_seconds: from the total to the updated weights.
        sum_seconds: of each bucket of a sum: telling the reducer, its start and its end.
        memory_bytes_per_second: at which numbers are handed to the reducer and back, and added.
    """

    apply_seconds: float = 0.01
    sum_seconds: float = 0.005
    memory_bytes_per_second: float = 8e9

    def handing_seconds(self, size_bytes: float) -> float:
        """To the reducer and back."""
        return 2 * size_bytes / self.memory_bytes_per_second


def packets(size_bytes: float, ranks: int) -> tuple[int, list[float]]:
    """How a sum of so many bytes is cut.

    Returns:
        How many directions it goes round in, and the bytes of each packet of a segment.
    """
    directions = max(1, min(2, int(size_bytes // (ranks * SMALLEST_PART_BYTES))))
    segment = size_bytes / directions / ranks
    packet = max(SMALLEST_PACKET_BYTES, min(LARGEST_PACKET_BYTES, segment / 2))
    count = max(1, -int(-segment // packet))
    return directions, [packet] * (count - 1) + [segment - packet * (count - 1)]


@dataclass
class _Flow:
    """One rank's part of one direction."""

    rank: int
    towards: int
    plan: list[float] = field(default_factory=list)
    adding: int = 0  # so many of the packets are added when they arrive
    sent: int = 0
    taken: int = 0
    left: deque[float] = field(default_factory=deque)
    arrived: deque[float] = field(default_factory=deque)
    waiting_since: float | None = None


class Ring:
    """Sums around a ring; see ``Sums``.

    Args:
        ids: of the machines, in the order of their ranks.
        size_bytes: of each sum.
        traffic: over the links.
        clock: the time.
        costs: beside the network.
    """

    def __init__(self, ids: Sequence[str], size_bytes: int, traffic: Traffic, clock: Clock, costs: Costs) -> None:
        self._ids, self._traffic, self._clock, self._costs = ids, traffic, clock, costs
        buckets = max(1, -(-size_bytes // BUCKET_BYTES))
        self._followed = min(buckets, FOLLOWED_BUCKETS)
        last = size_bytes - (buckets - 1) * BUCKET_BYTES if buckets == self._followed else BUCKET_BYTES
        self._sizes = [BUCKET_BYTES] * (self._followed - 1) + [last]
        self._not_followed = (size_bytes - sum(self._sizes)) / BUCKET_BYTES
        self._flows = [[_Flow(rank, towards) for towards in (1, -1)] for rank in range(len(ids))]
        self._open: list[int] = [0] * len(ids)  # directions of a rank's present bucket that go on
        self._progress: list[tuple[int, float, Done]] = [(0, 0.0, _nothing)] * len(ids)

    def enter(self, rank: int, done: Done) -> None:
        """See ``Sums``."""
        self._begin(rank, 0, done)

    def _begin(self, rank: int, bucket: int, done: Done) -> None:
        self._progress[rank] = (bucket, self._clock.now, done)
        size = self._sizes[bucket]
        before = self._costs.sum_seconds + self._costs.handing_seconds(size) / 2
        self._clock.after(before, lambda: self._give(rank, size))

    def _give(self, rank: int, size: float) -> None:
        ranks = len(self._ids)
        directions, segment = packets(size, ranks)
        self._open[rank] = directions
        flows = self._flows[rank][:directions]
        for flow in flows:
            flow.plan = segment * (2 * (ranks - 1))
            flow.adding, flow.sent, flow.taken = len(segment) * (ranks - 1), 0, 0
            flow.left.clear()
        # The directions share a port as two sockets do: neither goes before the other.
        for _ in segment[:2]:
            for flow in flows:
                self._send(flow)
        for flow in flows:
            self._await(flow)

    def _send(self, flow: _Flow) -> None:
        """Send the next packet, and tell the neighbour when it arrives."""
        if flow.sent == len(flow.plan):
            return
        other = (flow.rank + flow.towards) % len(self._ids)
        size = flow.plan[flow.sent]
        left, arrived = self._traffic.send(self._ids[flow.rank], self._ids[other], size, self._clock.now)
        flow.sent += 1
        flow.left.append(left)
        neighbour = self._flows[other][0 if flow.towards == 1 else 1]
        neighbour.arrived.append(arrived)
        if neighbour.waiting_since is not None:
            neighbour.waiting_since = None
            self._await(neighbour)

    def _await(self, flow: _Flow) -> None:
        """Go on when the oldest packet under way has left and its counterpart has arrived."""
        if not flow.arrived:
            flow.waiting_since = self._clock.now
            return
        ready = max(flow.left.popleft(), flow.arrived.popleft(), self._clock.now)
        if flow.taken < flow.adding:
            ready += flow.plan[flow.taken] / self._costs.memory_bytes_per_second
        self._clock.at(ready, lambda: self._took(flow))

    def _took(self, flow: _Flow) -> None:
        flow.taken += 1
        if flow.taken < len(flow.plan):
            self._send(flow)
            self._await(flow)
            return
        self._open[flow.rank] -= 1
        if not self._open[flow.rank]:
            after = self._costs.handing_seconds(self._sizes[self._progress[flow.rank][0]]) / 2
            self._clock.after(after, lambda: self._summed(flow.rank))

    def _summed(self, rank: int) -> None:
        bucket, began, done = self._progress[rank]
        if bucket + 1 < self._followed:
            self._begin(rank, bucket + 1, done)
        else:
            self._clock.after(self._not_followed * (self._clock.now - began), done)


class Streams:
    """Sums through the coordinator; see ``Sums``.

    Args:
        ids: of the machines, in the order of their ranks.
        hub: the id of the one that the coordinator runs on; "" where it is none of them.
        size_bytes: of each sum.
        traffic: over the links; of a coordinator of its own, each machine's link is its best one.
        clock: the time.
        costs: beside the network.
    """

    def __init__(
        self, ids: Sequence[str], hub: str, size_bytes: int, traffic: Traffic, clock: Clock, costs: Costs
    ) -> None:
        self._ids, self._hub, self._traffic, self._clock, self._costs = ids, hub, traffic, clock, costs
        pieces = max(1, -(-size_bytes // PIECE_BYTES))
        self._followed = min(pieces, FOLLOWED_PIECES)
        self._piece_bytes = min(size_bytes, PIECE_BYTES)
        self._not_followed = (size_bytes - self._followed * self._piece_bytes) / max(1, self._piece_bytes)
        self._sent = [0] * len(ids)
        self._totals = [0] * len(ids)
        self._given: dict[int, int] = {}  # ranks that have given a piece, by its number in the present sum
        self._began = [0.0] * len(ids)
        self._middle = [0.0] * len(ids)
        self._done: list[Done] = [_nothing] * len(ids)

    def enter(self, rank: int, done: Done) -> None:
        """See ``Sums``."""
        self._done[rank], self._sent[rank], self._totals[rank] = done, 0, 0
        self._began[rank] = self._clock.now
        self._clock.after(self._costs.sum_seconds, lambda: self._send(rank))

    def _send(self, rank: int) -> None:
        while self._sent[rank] < min(self._followed, self._totals[rank] + PIECES_IN_FLIGHT):
            piece = self._sent[rank]
            self._sent[rank] += 1
            arrived = self._over(self._ids[rank], self._hub, self._clock.now)
            self._clock.at(arrived, lambda piece=piece: self._take(piece))  # type: ignore[misc]

    def _take(self, piece: int) -> None:
        self._given[piece] = self._given.get(piece, 0) + 1
        if self._given[piece] < len(self._ids):
            return
        del self._given[piece]
        adding = len(self._ids) * self._piece_bytes / self._costs.memory_bytes_per_second
        for rank, machine in enumerate(self._ids):
            arrived = self._over(self._hub, machine, self._clock.now + adding)
            self._clock.at(arrived, lambda rank=rank: self._total(rank))  # type: ignore[misc]

    def _total(self, rank: int) -> None:
        self._totals[rank] += 1
        if self._totals[rank] == -(-self._followed // 2):
            self._middle[rank] = self._clock.now
        if self._totals[rank] < self._followed:
            self._send(rank)
            return
        half = self._followed - -(-self._followed // 2)
        each = (self._clock.now - self._middle[rank]) / half if half else 0.0
        self._clock.after(self._not_followed * each, self._done[rank])

    def _over(self, one: str, other: str, now: float) -> float:
        if one == other:
            return now
        return self._traffic.send(one, other, self._piece_bytes, now)[1]


def make_sums(ids: Sequence[str], job: JobFacts, network: Network, clock: Clock, costs: Costs) -> Sums:
    """The sums of a group: around a ring, or through the coordinator where the job's go that way.

    Args:
        ids: of at least two machines, in the order of their ranks.
        job: how much is added up, and how.
        network: between them.
        clock: the time.
        costs: beside the network.
    """
    if not job.streams:
        return Ring(ids, job.gradient_bytes, Traffic(network, ids), clock, costs)
    hub, network = (job.hub, network) if job.hub in ids else (HUB, _with_hub(network, ids))
    return Streams(ids, hub, job.gradient_bytes, Traffic(network, [*ids, hub]), clock, costs)


def sum_seconds(ids: Sequence[str], job: JobFacts, network: Network, costs: Costs) -> float:
    """Of one sum that all ranks enter at once."""
    clock = Clock()
    sums = make_sums(ids, job, network, clock, costs)
    for rank in range(len(ids)):
        sums.enter(rank, _nothing)
    clock.run()
    return clock.now


def _with_hub(network: Network, ids: Sequence[str]) -> Network:
    """The network with a coordinator beside it, which each machine reaches by its best link."""
    links, media = dict(network.links), dict(network.media)
    for machine in ids:
        others = [other for other in ids if other != machine]
        best = max(others, key=lambda other: link_between(network.links, machine, other).bits_per_second)
        links[HUB, machine] = link_between(network.links, machine, best)
        media[HUB, machine] = network.medium(machine, best)
    return dataclasses.replace(network, links=links, media=media)


def _nothing() -> None:
    """Before anybody has asked."""
