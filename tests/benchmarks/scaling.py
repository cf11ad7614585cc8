"""Two ranks, each on one core with one thread: against two runs that need not agree, and against ``mlx.launch``."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import mlx_launch
from tests.benchmarks.figures import Figure
from tests.benchmarks.pinned import copies, cores, fleet, pinned_nodes, together
from tests.benchmarks.workload import (
    WARM_UP,
    Iteration,
    Workload,
    seconds_per_iteration,
    tokens_per_second,
    workload,
)

# Steps of more than half a second, on a core of today.
BATCH = 12
ITERS = WARM_UP + 10
SAME_STEPS = 6


def run(folder: Path, pairs: int) -> list[Figure]:
    """Ratios of real tokens per second, and what becomes of the losses."""
    even, uneven = folder / "even", folder / "uneven"
    for kind in (even, uneven):
        kind.mkdir()
    with pinned_nodes(folder, "anna", "ben") as nodes:
        # Rows of one length: the rest is what agreeing costs.
        work = workload(even, 60, (50, 50))
        against_copies, seconds = [], []
        for pair in range(pairs):
            sides: dict[str, float] = {}
            for side in ("fleet", "copies") if pair % 2 else ("copies", "fleet"):
                place = even / f"{side}{pair}"
                place.mkdir()
                if side == "fleet":
                    ours = fleet(work, place / "adapters", nodes, batch=BATCH, iters=ITERS)
                    sides[side] = tokens_per_second(ours)
                    seconds.append(seconds_per_iteration(ours))
                else:
                    sides[side] = together(copies(work, place, 2, batch=BATCH // 2, iters=ITERS))
            against_copies.append(sides["fleet"] / sides["copies"])

        work = workload(uneven, 64, (10, 120))
        launched: list[float] = []
        by_hand: list[float] = []
        for pair in range(pairs):
            place = uneven / f"pair{pair}"
            place.mkdir()
            ours_rate = tokens_per_second(fleet(work, place / "ours", nodes, batch=BATCH, iters=ITERS))
            for launcher, ratios in ((True, launched), (False, by_hand)):
                theirs = _theirs(work, place / f"theirs{launcher}", launcher=launcher)
                ratios.append(ours_rate / tokens_per_second(theirs))

        one = fleet(work, uneven / "one", nodes[:1], batch=BATCH, iters=SAME_STEPS)
        two = fleet(work, uneven / "two", nodes, batch=BATCH, iters=SAME_STEPS)
        their_one = mlx_launch.train(work, uneven / "their1", ranks=1, batch=BATCH, iters=SAME_STEPS, cores=cores(1))
        their_two = mlx_launch.train(work, uneven / "their2", ranks=2, batch=BATCH, iters=SAME_STEPS, cores=cores(2))
    return [
        Figure("2 ranks / 2 uncoordinated runs, tokens per second", "x", tuple(against_copies), at_least=0.93),
        Figure("step of 2 ranks", "s", tuple(seconds)),
        Figure("2 ranks / mlx.launch -n 2 mlx_lm lora, tokens per second", "x", tuple(launched), at_least=1.1),
        Figure("2 ranks / its 2 ranks without the launcher", "x", tuple(by_hand), at_least=1.1),
        Figure("2 ranks against 1: largest difference of a loss", "", (_apart(one, two),), below=1e-4),
        Figure("mlx.launch -n 2 against 1: largest difference of a loss", "", (_apart(their_one, their_two),)),
    ]


def _theirs(work: Workload, folder: Path, *, launcher: bool) -> list[Iteration]:
    return mlx_launch.train(work, folder, ranks=2, batch=BATCH, iters=ITERS, cores=cores(2), launcher=launcher)


def _apart(one: list[Iteration], two: list[Iteration]) -> float:
    return max(abs(first.loss - second.loss) for first, second in zip(one, two, strict=True))
