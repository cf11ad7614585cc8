"""What a reduction costs around a ring, and in which order machines stand in it: slow links are kept out of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from node.runs import BUCKET_FLOATS

BUCKET_BYTES = 4 * BUCKET_FLOATS
EVERY_ORDER_MEMBERS = 8


@dataclass(frozen=True)
class Link:
    """How fast two machines can talk, by the better of their paths.

    Attributes:
        bits_per_second: in the slower direction; 0 where they cannot reach each other.
        latency_seconds: one way.
        text: the link in words, ``Studio ↔ Air: en3 21 Gbit/s 0.4 ms``, or "".
    """

    bits_per_second: float
    latency_seconds: float
    text: str = ""


Links = Mapping[tuple[str, str], Link]
"""By the ids of two machines, in either order."""

# For pairs that nobody measured: a poor network, so that a measured link is preferred.
ASSUMED_LINK = Link(100e6, 0.002)


def link_between(links: Links, a: str, b: str) -> Link:
    """The link of two machines; an assumed, slow one where it was not measured."""
    return links.get((a, b)) or links.get((b, a)) or ASSUMED_LINK


def turn_seconds(link: Link, members: int, reduced_bytes: int) -> float:
    """One of the ``2 * (members - 1)`` turns of a ring all-reduce over this link; infinite where it is cut."""
    if link.bits_per_second <= 0:
        return math.inf
    buckets = max(1, -(-reduced_bytes // BUCKET_BYTES))
    return 8 * reduced_bytes / members / link.bits_per_second + buckets * link.latency_seconds


def ring_seconds(order: Sequence[str], links: Links, reduced_bytes: int, fixed_seconds: float) -> float:
    """Seconds of one all-reduce of so many bytes; all turns take as long as the slowest link.

    Args:
        order: ids around the ring; a single one needs no reduction.
        links: between them.
        reduced_bytes: that every rank contributes.
        fixed_seconds: of each reduction, whatever its size.
    """
    members = len(order)
    if members < 2:
        return 0.0
    slowest = max(turn_seconds(link, members, reduced_bytes) for link in ring_links(order, links))
    return 2 * (members - 1) * slowest + max(1, -(-reduced_bytes // BUCKET_BYTES)) * fixed_seconds


def streams_seconds(ids: Sequence[str], links: Links, hub: str, reduced_bytes: int, fixed_seconds: float) -> float:
    """Seconds of one sum that goes through the coordinator: each machine sends it all of its numbers, and gets as many.

    Args:
        ids: of the machines; a single one needs no sum.
        links: between them.
        hub: the one that the coordinator runs on, whose own link carries all of it; "" where it is none of them. Then
            each machine's link to it is taken to be its best one.
        reduced_bytes: that every machine contributes.
        fixed_seconds: of each sum, whatever its size.
    """
    if len(ids) < 2:
        return 0.0
    seconds = latency = 0.0
    for machine in ids:
        if machine == hub:
            continue
        ways = [hub] if hub else [other for other in ids if other != machine]
        best = max((link_between(links, machine, other) for other in ways), key=lambda link: link.bits_per_second)
        if best.bits_per_second <= 0:
            best = ASSUMED_LINK  # the coordinator reaches it, whoever else does not
        seconds += 2 * 8 * reduced_bytes / best.bits_per_second
        latency = max(latency, best.latency_seconds)
    return seconds + max(1, -(-reduced_bytes // BUCKET_BYTES)) * (2 * latency + fixed_seconds)


def ring_links(order: Sequence[str], links: Links) -> list[Link]:
    """The links that a ring in this order uses; one for two machines, none for one."""
    return [link_between(links, a, b) for a, b in ring_pairs(order)]


def ring_pairs(order: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbours around the ring."""
    if len(order) < 3:
        return list(itertools.pairwise(order))
    return [(order[i], order[(i + 1) % len(order)]) for i in range(len(order))]


def best_order(ids: Sequence[str], links: Links, reduced_bytes: int) -> list[str]:
    """An order in which the slowest link used is as fast as possible, and the others are fast, too.

    Args:
        ids: of the machines; the first stays first.
        links: between them.
        reduced_bytes: that every rank contributes.
    """
    members = len(ids)
    if members <= 3:
        return list(ids)
    cost = [
        [turn_seconds(link_between(links, a, b), members, reduced_bytes) if a != b else 0.0 for b in ids] for a in ids
    ]
    order = _best_of_all(cost) if members <= EVERY_ORDER_MEMBERS else _improved(cost, _nearest(cost))
    return [ids[index] for index in order]


def _weight(cost: Sequence[Sequence[float]], order: Sequence[int]) -> tuple[float, float]:
    edges = [cost[order[i - 1]][order[i]] for i in range(len(order))]
    return max(edges), sum(edges)


def _best_of_all(cost: Sequence[Sequence[float]]) -> list[int]:
    # A ring read backwards is the same ring.
    orders = ([0, *rest] for rest in itertools.permutations(range(1, len(cost))) if rest[0] < rest[-1])
    return min(orders, key=lambda order: _weight(cost, order))


def _nearest(cost: Sequence[Sequence[float]]) -> list[int]:
    order = [0]
    left = set(range(1, len(cost)))
    while left:
        order.append(min(left, key=lambda index: (cost[order[-1]][index], index)))
        left.remove(order[-1])
    return order


def _improved(cost: Sequence[Sequence[float]], order: list[int]) -> list[int]:
    """2-opt on the slowest link: turn a stretch round wherever that replaces it by two faster ones."""
    count = len(order)
    for _ in range(count * count):
        at = max(range(count), key=lambda i: cost[order[i - 1]][order[i]])
        order = order[at:] + order[:at]  # now the slowest link joins the last to the first
        slowest = cost[order[-1]][order[0]]
        found: tuple[float, int] | None = None
        for end in range(1, count - 1):
            # Turning order[0 .. end] round replaces (last, first) and (end, end + 1).
            worse = max(cost[order[-1]][order[end]], cost[order[0]][order[end + 1]])
            if worse < (found[0] if found else slowest):
                found = (worse, end)
        if found is None:
            break
        end = found[1] + 1
        order = order[:end][::-1] + order[end:]
    first = order.index(0)
    return order[first:] + order[:first]
