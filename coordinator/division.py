"""Who computes which rows of a step: the slowest member's time is made as short as it can be.

Each row costs its padded length. Rows that differ much in length are computed in micro-batches of their own, so what a
member's rows cost is found by cutting them, sorted by length, into groups (``group_rows``). Members get rows that are
neighbours in length, because those pad each other least.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from coordinator.data.padding import FINEST_STEP, RUNGS, SPLIT_COST_POSITIONS, Indices, padded_length
from coordinator.pace import Speed
from node.spec import Int32

# A row goes to the member that prefers it as long as the slowest member's time grows by no more than this.
AFFINITY_SLACK = 1.03
# Up to here every division is tried: 3**rows ways for each member.
EXACT_ROWS = 6
EXACT_MEMBERS = 4
# Up to here every order of the members is tried.
ORDERED_MEMBERS = 3
# Up to here single rows are moved and exchanged afterwards; with more rows a single one weighs little.
REFINED_ROWS = 64
REFINED_MEMBERS = 8
BISECTIONS = 24
REMEMBERED = 64
_RUNGS = np.array(RUNGS, np.int64)

Owners = tuple[int, ...]
_Score = tuple[float, int, float]


def divide(
    lengths: Int32,
    max_seq_length: int | None,
    speeds: Sequence[Speed],
    limits: Sequence[int | None] | None = None,
    affinity: Mapping[int, int] | None = None,
) -> list[Indices]:
    """Divide the rows of a step. The same arguments give the same division.

    Args:
        lengths: (rows,) tokens of each row.
        max_seq_length: tokens that rows were cut to; see ``padded_length``.
        speeds: of each member.
        limits: most input positions of a micro-batch of each member, or None. A longer row is computed alone; it goes
            to a member with room for it where that takes no longer.
        affinity: members that rows would rather go to, by the row's index in ``lengths``.

    Returns:
        For each member the indices of its rows, ascending; every row once; a member may get none.
    """
    if not speeds:
        raise ValueError("rows are divided among at least one member")
    if limits is not None and len(limits) != len(speeds):
        raise ValueError(f"{len(limits)} limits for {len(speeds)} members")
    padded = padded_lengths(lengths, max_seq_length)
    order = np.argsort(-padded, kind="stable")
    descending = tuple(padded[order].tolist())
    owners = _divide_sorted(descending, tuple(speeds), tuple(limits) if limits is not None else (None,) * len(speeds))
    if affinity:
        position_of = {int(row): position for position, row in enumerate(order)}
        wishes = {
            position_of[row]: member
            for row, member in affinity.items()
            if row in position_of and 0 <= member < len(speeds)
        }
        owners = _with_affinity(descending, speeds, owners, wishes)
    owner_array = np.array(owners, np.int64)
    return [np.sort(order[owner_array == member]) for member in range(len(speeds))]


def padded_lengths(lengths: Int32, max_seq_length: int | None) -> Indices:
    """(rows,) input positions of each row when it is padded alone, as ``padded_length`` says."""
    inputs = np.maximum(1, lengths.astype(np.int64) - 1)
    if len(inputs) and int(inputs.max()) > RUNGS[-1]:
        return np.array([padded_length(int(longest), max_seq_length) for longest in inputs], np.int64)
    padded = _RUNGS[np.searchsorted(_RUNGS, inputs)]
    if max_seq_length is not None:
        needed = -(-max(1, max_seq_length - 1) // FINEST_STEP) * FINEST_STEP
        padded = np.minimum(padded, np.maximum(needed, inputs))
    return padded


def group_rows(padded: Sequence[int], limit: int | None = None, most_rows: int | None = None) -> list[int]:
    """Cut rows into micro-batches.

    Args:
        padded: padded length of each row, longest first.
        limit: most input positions of a micro-batch; a single row may exceed it.
        most_rows: most rows of a micro-batch.

    Returns:
        The number of rows of each micro-batch, in order. Each is padded to its first row.
    """
    sizes: list[int] = []
    start = 0
    for size in _group_sizes(padded):
        most = size if most_rows is None else min(size, most_rows)
        if limit is not None:
            most = min(most, max(1, limit // padded[start]))
        pieces = -(-size // most)
        # Pieces of about one size have one or two shapes, and none is a remainder of a single row.
        sizes += [size // pieces + (piece < size % pieces) for piece in range(pieces)]
        start += size
    return sizes


def cost_positions(padded: Sequence[int]) -> int:
    """What rows cost a member, in input positions: with their padding, and with what a further micro-batch costs.

    Args:
        padded: padded length of each row, longest first.
    """
    sizes = _group_sizes(padded)
    starts = itertools.accumulate(sizes, initial=0)
    positions = sum(size * padded[start] for size, start in zip(sizes, starts, strict=False))
    return positions + SPLIT_COST_POSITIONS * max(0, len(sizes) - 1)


def _group_sizes(padded: Sequence[int]) -> list[int]:
    """Rows of each group of the cheapest grouping, where one more group costs SPLIT_COST_POSITIONS."""
    if not padded:
        return []
    if (padded[0] - padded[-1]) * (len(padded) - 1) <= SPLIT_COST_POSITIONS:
        return [len(padded)]
    starts = [i for i, length in enumerate(padded) if i == 0 or length != padded[i - 1]]
    ends = [*starts[1:], len(padded)]
    # cheapest[r]: of the rows before the r-th run of equal lengths; cut[r]: the run with which its last group begins.
    cheapest: list[int] = [0]
    cut: list[int] = []
    for end in ends:
        costs = [
            cheapest[run] + SPLIT_COST_POSITIONS + (end - starts[run]) * padded[starts[run]]
            for run in range(len(cut) + 1)
        ]
        best = min(range(len(costs)), key=costs.__getitem__)
        cheapest.append(costs[best])
        cut.append(best)
    sizes = []
    run = len(starts)
    while run:
        sizes.append(ends[run - 1] - starts[cut[run - 1]])
        run = cut[run - 1]
    return sizes[::-1]


@functools.lru_cache(maxsize=REMEMBERED)
def _divide_sorted(padded: tuple[int, ...], speeds: tuple[Speed, ...], limits: tuple[int | None, ...]) -> Owners:
    """The owner of each row of a step, longest first."""
    if not padded or len(speeds) == 1:
        return (0,) * len(padded)
    tight = not all(_fits(padded, limit, 0) for limit in limits)
    if len(padded) <= EXACT_ROWS and len(speeds) <= EXACT_MEMBERS:
        return _best_of_all(padded, speeds, limits)
    members = sorted(
        range(len(speeds)),
        key=lambda member: (
            not _fits(padded, limits[member], 0),
            speeds[member].seconds_per_position,
            speeds[member].overhead_seconds,
            member,
        ),
    )
    if len(speeds) <= ORDERED_MEMBERS and not tight:
        orders = [list(order) for order in itertools.permutations(members)]
    else:
        orders = [members]
    divisions = [_filled(padded, speeds, order) for order in orders]
    slowest = [_slowest(padded, speeds, owners) for owners in divisions]
    owners = divisions[slowest.index(min(slowest))]
    if len(padded) <= REFINED_ROWS and len(speeds) <= REFINED_MEMBERS:
        owners = _refined(padded, speeds, owners)
    return owners


def _rows_of(owners: Sequence[int], members: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(members)]
    for row, owner in enumerate(owners):
        rows[owner].append(row)
    return rows


def _seconds(padded: Sequence[int], speed: Speed, rows: Sequence[int]) -> float:
    return speed.predict(cost_positions([padded[row] for row in rows]))


def _slowest(padded: Sequence[int], speeds: Sequence[Speed], owners: Sequence[int]) -> float:
    rows = _rows_of(owners, len(speeds))
    return max(_seconds(padded, speed, own) for speed, own in zip(speeds, rows, strict=True))


def _fits(padded: Sequence[int], limit: int | None, row: int) -> bool:
    return limit is None or padded[row] <= limit


def _filled(padded: tuple[int, ...], speeds: Sequence[Speed], order: Sequence[int]) -> Owners:
    """Give the members, in this order, as many of the next longest rows as a time allows; the least such time."""
    # The grouping of the whole step says what a row costs wherever it goes: then a member's part is found by bisection
    # in the running total.
    costs: list[int] = []
    for size in _group_sizes(padded):
        costs += [padded[len(costs)]] * size
    totals = [0, *itertools.accumulate(costs)]
    count = len(padded)

    def ends(seconds: float) -> list[int]:
        """Where each member's rows end."""
        result = []
        end = 0
        for member in order:
            spare = seconds - speeds[member].overhead_seconds
            if spare > 0 and end < count:
                end = bisect.bisect_right(totals, totals[end] + spare / speeds[member].seconds_per_position) - 1
            result.append(end)
        return result

    low = totals[-1] / sum(1 / speed.seconds_per_position for speed in speeds)
    high = min(speed.predict(totals[-1]) for speed in speeds) * (1 + 1e-9)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if ends(middle)[-1] == count:
            high = middle
        else:
            low = middle
        if high - low <= 1e-4 * high:
            break
    owners: list[int] = []
    for member, end in zip(order, ends(high), strict=True):
        owners += [member] * (end - len(owners))
    return tuple(owners)


def _best_of_all(padded: Sequence[int], speeds: Sequence[Speed], limits: Sequence[int | None]) -> Owners:
    """The best of all divisions of a few rows: by sets of rows, one more member at a time."""
    everything = (1 << len(padded)) - 1
    sets = [[row for row in range(len(padded)) if chosen >> row & 1] for chosen in range(everything + 1)]
    positions = [cost_positions([padded[row] for row in rows]) for rows in sets]
    # (slowest seconds, rows over a member's limit, sum of seconds): the sum spares work where time is the same.
    best: dict[int, tuple[_Score, Owners]] = {0: ((0.0, 0, 0.0), (0,) * len(padded))}
    for member, (speed, limit) in enumerate(zip(speeds, limits, strict=True)):
        over = [sum(not _fits(padded, limit, row) for row in rows) for rows in sets]
        seconds = [speed.predict(cost) for cost in positions]
        last = member == len(speeds) - 1
        found: dict[int, tuple[_Score, Owners]] = {}
        for taken, ((slowest, score_over, total), owners) in best.items():
            free = everything & ~taken
            chosen = free
            while True:
                union = taken | chosen
                score = (max(slowest, seconds[chosen]), score_over + over[chosen], total + seconds[chosen])
                if union not in found or score < found[union][0]:
                    found[union] = (score, tuple(member if chosen >> i & 1 else o for i, o in enumerate(owners)))
                if chosen == 0 or last:
                    break
                chosen = (chosen - 1) & free
        best = found
    return best[everything][1]


def _refined(padded: Sequence[int], speeds: Sequence[Speed], owners: Sequence[int]) -> Owners:
    """Take single rows from the slowest member, or exchange them, while its time gets shorter."""
    rows = _rows_of(owners, len(speeds))
    seconds = [_seconds(padded, speed, own) for speed, own in zip(speeds, rows, strict=True)]
    for _ in range(len(padded)):
        slowest = max(range(len(speeds)), key=lambda member: (seconds[member], -member))
        best: tuple[float, int, list[int], list[int]] | None = None
        for other in range(len(speeds)):
            if other == slowest:
                continue
            for mine, theirs in _exchanges(padded, rows[slowest], rows[other]):
                rest = sorted([*(row for row in rows[slowest] if row != mine), *theirs])
                more = sorted([*(row for row in rows[other] if row not in theirs), mine])
                worse = max(_seconds(padded, speeds[slowest], rest), _seconds(padded, speeds[other], more))
                if worse < (best[0] if best else seconds[slowest] * (1 - 1e-9)):
                    best = (worse, other, rest, more)
        if best is None:
            break
        _, other, rows[slowest], rows[other] = best
        for member in (slowest, other):
            seconds[member] = _seconds(padded, speeds[member], rows[member])
    result = [0] * len(padded)
    for member, own in enumerate(rows):
        for row in own:
            result[row] = member
    return tuple(result)


def _exchanges(padded: Sequence[int], mine: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Rows to give away, each with what to take for it: nothing, or the next shorter row of the other member."""
    found: list[tuple[int, list[int]]] = []
    lengths_seen = set()
    for row in mine:
        if padded[row] in lengths_seen:
            continue
        lengths_seen.add(padded[row])
        found.append((row, []))
        shorter = next((other for other in theirs if padded[other] < padded[row]), None)
        if shorter is not None:
            found.append((row, [shorter]))
    return found


def _with_affinity(padded: Sequence[int], speeds: Sequence[Speed], owners: Owners, wishes: Mapping[int, int]) -> Owners:
    """Move rows where they would rather be, alone or for another row, within AFFINITY_SLACK."""
    result = list(owners)
    rows = _rows_of(owners, len(speeds))
    most = AFFINITY_SLACK * _slowest(padded, speeds, owners)

    def try_change(row: int, wanted: int, back: int | None) -> bool:
        owner = result[row]
        taken = sorted([*(own for own in rows[wanted] if own != back), row])
        left = sorted([*(own for own in rows[owner] if own != row), *([] if back is None else [back])])
        if _seconds(padded, speeds[wanted], taken) > most or _seconds(padded, speeds[owner], left) > most:
            return False
        rows[wanted], rows[owner] = taken, left
        result[row] = wanted
        if back is not None:
            result[back] = owner
        return True

    for row, wanted in sorted(wishes.items()):
        if result[row] == wanted:
            continue
        # An exchange first: it leaves room for the wishes that follow.
        strangers = [other for other in rows[wanted] if wishes.get(other) != wanted]
        nearest = min(
            strangers,
            key=lambda other: (abs(padded[other] - padded[row]), wishes.get(other) != result[row], other),
            default=None,
        )
        if nearest is None or not try_change(row, wanted, nearest):
            try_change(row, wanted, None)
    return tuple(result)
