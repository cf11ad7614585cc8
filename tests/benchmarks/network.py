"""What the network costs a step: two and three hosts on a plain bridge, at 1 Gbit/s, and at 200 Mbit/s with 10 ms.

What is lost is the wait of the rank that the others waited for, as the steps report it: the time of the sum itself,
encryption included. One rank loses nothing.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure
from tests.benchmarks.hosted import Lab, serving
from tests.benchmarks.workload import WARM_UP, Workload, workload
from tests.fixtures.hosts import hosts, switch_available
from tests.fixtures.switch import Switch

RANKS = (2, 3)
BATCH = 6
ITERS = WARM_UP + 6
# Adapters of about 8 MB.
LORA_RANK = 64


@dataclass(frozen=True)
class Link:
    """What a host is connected by.

    Attributes:
        name: for people.
        mbit: that a host sends in a second, or None without a limit.
        delay_seconds: of each frame, one way.
    """

    name: str
    mbit: float | None = None
    delay_seconds: float = 0.0


LINKS = (Link("plain"), Link("1 Gbit/s", 1000), Link("200 Mbit/s with 10 ms", 200, 0.01))


def run(folder: Path, pairs: int) -> list[Figure]:
    """Seconds of a step that are lost, and of the whole step, for each link and number of ranks.

    Raises:
        RuntimeError: there can be no such hosts here.
    """
    if missing := switch_available():
        raise RuntimeError(f"network needs hosts of its own: {missing}")
    work = workload(folder, 64, (20, 20), hidden=512)
    lost: dict[tuple[Link, int], list[float]] = {(link, ranks): [] for link in LINKS for ranks in RANKS}
    whole: dict[tuple[Link, int], list[float]] = {case: [] for case in lost}
    for link in LINKS:
        place = folder / link.name.replace("/", "-")
        place.mkdir()
        with ExitStack() as stack:
            # It carries less than 1 Gbit/s, so that links without delay do without it.
            switch = Switch() if link.delay_seconds else None
            connected = stack.enter_context(hosts(max(RANKS), switch=switch))
            if switch is not None:
                switch.conditions(delay_seconds=link.delay_seconds)
            for host in connected:
                host.shape(link.mbit)
            lab = stack.enter_context(serving(place, connected))
            for pair in range(pairs):
                for ranks in RANKS:
                    waited, seconds = _step(lab, place / f"{ranks}-{pair}", ranks, work)
                    lost[link, ranks].append(waited)
                    whole[link, ranks].append(seconds)
    return [
        figure
        for (link, ranks), values in lost.items()
        for figure in (
            Figure(f"{link.name}, {ranks} ranks: lost to the network per step", "s", tuple(values)),
            Figure(f"{link.name}, {ranks} ranks: step", "s", tuple(whole[link, ranks])),
        )
    ]


def _step(lab: Lab, folder: Path, ranks: int, work: Workload) -> tuple[float, float]:
    """Seconds of a step that were lost, and of the whole step."""
    steps: list[dict[str, Any]] = []
    options = ("--lora-rank", str(LORA_RANK))
    lab.train(work, folder, batch=BATCH, iters=ITERS, ranks=ranks, options=options, follow=steps.append)
    counted = steps[WARM_UP:]
    waited, whole = (statistics.median(step[name] for step in counted) for name in ("wait_seconds", "seconds"))
    return waited, whole
