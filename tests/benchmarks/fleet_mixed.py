"""Two ranks on rows of mixed lengths against two of ``mlx_lm lora``: equal cores, and one with a third of its time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks import mlx_launch
from tests.benchmarks.figures import Figure
from tests.benchmarks.one_machine import BATCH, SMALL_VOCABULARY, Case, workload_of
from tests.benchmarks.pinned import cores, fleet, pinned_nodes
from tests.benchmarks.workload import WARM_UP, Workload, tokens_per_second
from tests.fixtures.limits import limited
from tests.fixtures.nodes import ServingNode

RANKS = 2
# As many rows for each rank as one machine gets; two epochs after the first steps.
ROWS = 32
HIDDEN = 256
FLEET_BATCH = RANKS * BATCH
ITERS = WARM_UP + 2 * ROWS // FLEET_BATCH
PART = 1 / 3


def run(folder: Path, pairs: int) -> list[Figure]:
    """Ratios of real tokens per second: ours over ``mlx.launch``, over its ranks without it, and of unequal ranks."""
    work = workload_of(folder / "work", Case("mixed lengths", ROWS, 0, SMALL_VOCABULARY), hidden=HIDDEN)
    launched: list[float] = []
    by_hand: list[float] = []
    unequal: list[float] = []
    with pinned_nodes(folder, "anna", "ben") as nodes:
        for pair in range(pairs):
            place = folder / f"pair{pair}"
            place.mkdir()
            # Ours stands between the two that it is compared with.
            first = _theirs(work, place / "launched", launcher=True)
            ours = _ours(work, place / "ours", nodes)
            launched.append(ours / first)
            by_hand.append(ours / _theirs(work, place / "by-hand", launcher=False))
            slowed = _ours(work, place / "ours-unequal", nodes, last=PART)
            unequal.append(slowed / _theirs(work, place / "unequal", launcher=False, last=PART))
    return [
        Figure(
            "mixed lengths, 2 ranks / mlx.launch -n 2 mlx_lm lora, tokens per second",
            "x",
            tuple(launched),
            at_least=2.0,
        ),
        Figure("mixed lengths, 2 ranks / its 2 ranks without the launcher", "x", tuple(by_hand), at_least=2.0),
        Figure("mixed lengths, one rank with a third of its time / its same ranks", "x", tuple(unequal)),
    ]


def _ours(work: Workload, folder: Path, nodes: list[ServingNode], last: float = 1.0) -> float:
    with ExitStack() as stack:
        if last < 1:
            stack.enter_context(limited(nodes[-1].process.pid, last))
        return tokens_per_second(fleet(work, folder, nodes, batch=FLEET_BATCH, iters=ITERS))


def _theirs(work: Workload, folder: Path, *, launcher: bool, last: float = 1.0) -> float:
    return tokens_per_second(
        mlx_launch.train(
            work, folder, ranks=RANKS, batch=FLEET_BATCH, iters=ITERS, cores=cores(RANKS), launcher=launcher, last=last
        )
    )
