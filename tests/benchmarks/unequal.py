"""Two ranks of which one has a third of its core's time: what the fleet makes of them, and how soon it follows."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks import mlx_launch
from tests.benchmarks.figures import Figure
from tests.benchmarks.pinned import cores, fleet, pinned_nodes, together
from tests.benchmarks.workload import WARM_UP, Iteration, Workload, tokens_per_second, workload
from tests.fixtures.limits import limited
from tests.fixtures.nodes import ServingNode

BATCH = 32
PART = 1 / 3
# Two epochs of the fleet, and of the whole machine as long as the limited one needs for one.
ITERS = WARM_UP + 16
ITERS_ALONE = {"anna": WARM_UP + 24, "ben": WARM_UP + 8}
MOVED_AFTER = 12
MOVING_ITERS = MOVED_AFTER + 24
# Of the share that the new speeds ask for.
CLOSE = 0.1


def run(folder: Path, pairs: int) -> list[Figure]:
    """Parts of what both can do alone, and steps until shares fit after the limit has moved."""
    work = workload(folder, 8 * BATCH, (12, 30), hidden=256)
    shared, equal, steps = [], [], []
    with pinned_nodes(folder, "anna", "ben") as (anna, ben):
        for pair in range(pairs):
            place = folder / f"pair{pair}"
            place.mkdir()
            sides: dict[str, float] = {}
            with limited(ben.process.pid, PART):
                for side in ("both", "alone") if pair % 2 else ("alone", "both"):
                    if side == "alone":
                        sides[side] = _each_alone(work, place, anna, ben)
                    else:
                        sides[side] = tokens_per_second(
                            fleet(work, place / "both", [anna, ben], batch=BATCH, iters=ITERS)
                        )
            shared.append(sides["both"] / sides["alone"])
            equal.append(_equal_split(work, place))
            steps.append(float(_steps_to_follow(work, place / "moving", anna, ben)))
    return [
        Figure("unequal ranks together / sum of both alone", "x", tuple(shared), at_least=0.9),
        Figure("equal split (mlx_lm, 2 ranks) / sum of both alone", "x", tuple(equal)),
        Figure("steps until shares fit after the limit moved", "", tuple(steps), below=10),
    ]


def _each_alone(work: Workload, place: Path, *nodes: ServingNode) -> float:
    """Tokens per second of runs that know nothing of each other.

    At the same time, as two machines work: two cores of one share caches, memory and clock, and either would be faster
    while the other rests.
    """

    def one(node: ServingNode) -> list[Iteration]:
        return fleet(work, place / node.name, [node], batch=BATCH, iters=ITERS_ALONE[node.name])

    with ThreadPoolExecutor(len(nodes)) as pool:
        return together(list(pool.map(one, nodes)))


def _equal_split(work: Workload, place: Path) -> float:
    def rate(name: str, **options: Any) -> float:
        return tokens_per_second(mlx_launch.train(work, place / name, batch=BATCH, iters=ITERS, **options))

    # A rank that has a third of the time does a third of the work.
    alone = rate("their-one", ranks=1, cores=cores(1)) * (1 + PART)
    return rate("their-two", ranks=2, cores=cores(2), launcher=False, last=PART) / alone


def _steps_to_follow(work: Workload, folder: Path, anna: ServingNode, ben: ServingNode) -> int:
    """Steps after the limit moved from ben to anna until ben's share fits, and stays for two steps."""
    shares: list[float] = []
    limits = contextlib.ExitStack()

    def follow(event: dict[str, Any]) -> None:
        positions = {name: figures["positions"] for name, figures in event["per_node"].items()}
        shares.append(positions["ben"] / sum(positions.values()))
        if event["step"] == MOVED_AFTER:
            limits.close()
            limits.enter_context(limited(anna.process.pid, PART))

    with limits:
        limits.enter_context(limited(ben.process.pid, PART))
        fleet(work, folder, [anna, ben], batch=BATCH, iters=MOVING_ITERS, follow=follow)
    wanted = 1 / (1 + PART)
    fits = [abs(share - wanted) <= CLOSE * wanted for share in shares[MOVED_AFTER:]]
    return next((step for step in range(1, len(fits)) if fits[step - 1] and fits[step]), len(fits))
