"""Seconds from the command to the first step: ours here and on two warm nodes, against ``mlx_lm lora`` alone.

The model is small, so what is measured is starting: imports, reading and tokenising the data, loading, measuring. Both
sides validate one batch before, and nothing is kept from an earlier run but what a node keeps: its service, the model.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from tests.benchmarks import mlx_launch
from tests.benchmarks.figures import Figure
from tests.benchmarks.pinned import alone, fleet, pinned_nodes
from tests.benchmarks.workload import workload

BATCH = 4
ITERS = 2
MOST_SECONDS = 2.0


def run(folder: Path, pairs: int) -> list[Figure]:
    """Seconds each, and how much longer ours take."""
    work = workload(folder, 400, (20, 60), hidden=64)
    theirs: list[float] = []
    ours: list[float] = []
    two: list[float] = []
    known: list[float] = []
    options = ("--val-batches", "1")
    with pinned_nodes(folder, "anna", "ben") as nodes:
        fleet(work, folder / "warm", nodes, batch=BATCH, iters=ITERS)
        for pair in range(pairs):
            place = folder / f"pair{pair}"
            place.mkdir()
            began = time.monotonic()
            theirs.append(mlx_launch.train(work, place / "theirs", ranks=1, batch=BATCH, iters=ITERS)[0].at - began)
            for seconds in (ours, known):
                began = time.monotonic()
                # Not pinned, as theirs is not: what can be done at the same time may be.
                steps = alone(work, place / "ours", batch=BATCH, iters=ITERS, options=options, pinned=False)
                seconds.append(steps[0].at - began)
                # The second time, its home knows the tokens.
                shutil.rmtree(place / "ours")
            began = time.monotonic()
            two.append(fleet(work, place / "two", nodes, batch=BATCH, iters=ITERS)[0].at - began)
    return [
        Figure("mlx_lm lora: command to first step", "s", tuple(theirs)),
        Figure("ours alone: command to first step, more than that", "s", _more(ours, theirs), below=MOST_SECONDS),
        Figure("the same, tokens known from before", "s", _more(known, theirs), below=MOST_SECONDS),
        Figure("two warm nodes: command to first step, more than that", "s", _more(two, theirs), below=MOST_SECONDS),
    ]


def _more(ours: list[float], theirs: list[float]) -> tuple[float, ...]:
    return tuple(one - other for one, other in zip(ours, theirs, strict=True))
