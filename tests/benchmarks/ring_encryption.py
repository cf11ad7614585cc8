"""Training over an encrypted ring against a plain one: two hosts of their own on a link of 1 Gbit/s, side by side."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.figures import Figure
from tests.benchmarks.hosted import serving
from tests.benchmarks.workload import WARM_UP, seconds_per_iteration, workload
from tests.fixtures.hosts import hosts, hosts_available

LINK_MBIT = 1000
# Of rank 8, in steps of at least half a second on a core of today.
BATCH = 12
ITERS = WARM_UP + 12


def run(folder: Path, pairs: int) -> list[Figure]:
    """Ratio of the two rates, and how long a step was.

    Raises:
        RuntimeError: there can be no hosts here.
    """
    if missing := hosts_available():
        raise RuntimeError(f"ring-encryption needs two hosts: {missing}")
    work = workload(folder, 64, (50, 50))
    ratios, seconds = [], []
    with hosts(2) as connected:
        for host in connected:
            host.shape(LINK_MBIT)
        with serving(folder, connected) as lab:
            for number in range(pairs):
                sides = {}
                for encryption in ("on", "off") if number % 2 else ("off", "on"):
                    options = ("--ring-encryption", encryption, "--lora-rank", "8")
                    place = folder / f"{encryption}{number}"
                    sides[encryption] = seconds_per_iteration(
                        lab.train(work, place, batch=BATCH, iters=ITERS, ranks=len(connected), options=options)
                    )
                ratios.append(sides["off"] / sides["on"])
                seconds.append(sides["off"])
    return [
        Figure("encrypted ring / plain ring at 1 Gbit/s, training speed", "x", tuple(ratios), at_least=0.95),
        Figure("step of 2 hosts over the plain ring", "s", tuple(seconds), at_least=0.5),
    ]
