"""The first sum of a group proves who is in it, and that all are about to add up the same.

Two known numbers come from each rank: who it is, and what it trains. No way of adding up asks for either: a ring sums
whatever arrives.
"""

from __future__ import annotations

from collections.abc import Sequence


def proof(rank: int, size: int, token: int, layout: int) -> list[float]:
    """What a rank adds to the first sum: ``2 * size`` numbers that fp32 holds exactly.

    Args:
        rank: whose.
        size: of the group.
        token: the group's, below 2**20.
        layout: a number below 2**24 that stands for the names, shapes and types of what will be added up.
    """
    mine = [0.0] * (2 * size)
    mine[rank], mine[size + rank] = float(token + rank), float(layout)
    return mine


def refutation(sums: Sequence[float], size: int, token: int, layout: int) -> str:
    """What the first sum gives away, on one line; "" when it is that of the group's ranks."""
    if list(sums[:size]) != [float(token + index) for index in range(size)]:
        return "somebody else is in the group: the first sum is not that of its ranks"
    if list(sums[size:]) != [float(layout)] * size:
        return "the ranks do not train the same arrays: their models, options or versions differ"
    return ""
