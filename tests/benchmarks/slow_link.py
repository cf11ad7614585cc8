"""Two hosts at 200 Mbit/s with 10 ms each way: what rounding gradients gains, and adding them up in runs.

Adapters of about 10 MB, and ranks that compute for about as long as those take to cross the link plainly: as fp32, all
at once, after all of them are computed. A rank waits while it would compute, as where a GPU does that: the network,
which is made of this machine's processors, has them to itself.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure
from tests.benchmarks.hosted import Lab, serving
from tests.benchmarks.workload import WARM_UP, Workload, workload
from tests.faults.harness import Fault, injected
from tests.fixtures.hosts import hosts, switch_available
from tests.fixtures.switch import Switch

MBIT, DELAY_SECONDS = 200, 0.01
RANKS = 2
BATCH = 2
ROW_WORDS = 6
COMPUTE_SECONDS = 0.5
ITERS = WARM_UP + 8
LORA_RANK = 80
AT_ONCE, IN_RUNS = "at once", "in runs"
ROUNDED = ("--gradient-dtype", "bf16")


def run(folder: Path, pairs: int) -> list[Figure]:
    """How many times as fast a step is.

    Raises:
        RuntimeError: there can be no such hosts here.
    """
    if missing := switch_available():
        raise RuntimeError(f"slow-link needs hosts of its own: {missing}")
    work = workload(folder, 64, (ROW_WORDS, ROW_WORDS), hidden=512)
    plain: list[dict[str, float]] = []
    steps: dict[str, list[float]] = {"bf16, at once": [], "fp32, in runs": [], "bf16, in runs": []}
    with ExitStack() as stack:
        switch = Switch()
        connected = stack.enter_context(hosts(RANKS, switch=switch))
        switch.conditions(delay_seconds=DELAY_SECONDS)
        for host in connected:
            host.shape(MBIT)
        labs = {}
        device: Fault = {"do": "device", "seconds": COMPUTE_SECONDS}
        ways: dict[str, list[Fault]] = {AT_ONCE: [device, {"do": "one run"}], IN_RUNS: [device]}
        for name, faults in ways.items():
            place = folder / name.replace(" ", "-")
            place.mkdir()
            labs[name] = stack.enter_context(serving(place, connected, injected(place, faults)))
        for pair in range(pairs):
            plain.append(_step(labs[AT_ONCE], folder / f"plain-{pair}", work))
            for name, seconds in steps.items():
                dtype, way = name.split(", ")
                options = ROUNDED if dtype == "bf16" else ()
                seconds.append(_step(labs[way], folder / f"{name.replace(' ', '-')}-{pair}", work, options)["seconds"])
    goals = {"bf16, in runs": 1.6}
    return [
        Figure("fp32, at once: step", "s", tuple(step["seconds"] for step in plain)),
        Figure("its computing / its sum", "x", tuple(step["compute_seconds"] / step["wait_seconds"] for step in plain)),
        *(
            Figure(
                f"{name}: steps per second, to fp32 at once",
                "x",
                tuple(one["seconds"] / other for one, other in zip(plain, seconds, strict=True)),
                at_least=goals.get(name),
            )
            for name, seconds in steps.items()
        ),
    ]


def _step(lab: Lab, folder: Path, work: Workload, options: tuple[str, ...] = ()) -> dict[str, float]:
    """Medians of a step's seconds."""
    steps: list[dict[str, Any]] = []
    more = ("--lora-rank", str(LORA_RANK), *options)
    lab.train(work, folder, batch=BATCH, iters=ITERS, ranks=RANKS, options=more, follow=steps.append)
    names = ("seconds", "compute_seconds", "wait_seconds")
    return {name: statistics.median(step[name] for step in steps[WARM_UP:]) for name in names}
