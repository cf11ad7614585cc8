"""Training over an encrypted ring against a plain one: two hosts of their own on a link of 1 Gbit/s, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.figures import Figure
from tests.benchmarks.pinned import cores
from tests.benchmarks.workload import WARM_UP, Iteration, Workload, reported, seconds_per_iteration, workload
from tests.fixtures.hosts import Host, hosts, hosts_available
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair

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
    with hosts(2) as lab:
        for host in lab:
            host.shape(LINK_MBIT)
        homes = [folder / f"home{number}" for number in range(len(lab))]
        asking = folder / "home-of-coordinator"
        for home in homes:
            pair(home, asking)
        nodes = [
            ServingNode(home.name, home, environment=_environment(home), prefix=(*host.prefix, *_on(core)))
            for host, home, core in zip(lab, homes, cores(2), strict=True)
        ]
        try:
            addresses = ",".join(f"{host.address}:{node.port}" for host, node in zip(lab, nodes, strict=True))
            for number in range(pairs):
                sides = {}
                for encryption in ("on", "off") if number % 2 else ("off", "on"):
                    place = folder / f"{encryption}{number}"
                    sides[encryption] = seconds_per_iteration(
                        _train(work, lab[0], asking, place, addresses, encryption)
                    )
                ratios.append(sides["off"] / sides["on"])
                seconds.append(sides["off"])
        finally:
            for node in nodes:
                node.stop()
    return [
        Figure("encrypted ring / plain ring at 1 Gbit/s, training speed", "x", tuple(ratios), at_least=0.95),
        Figure("step of 2 hosts over the plain ring", "s", tuple(seconds), at_least=0.5),
    ]


def _on(core: int) -> tuple[str, ...]:
    return ("taskset", "--cpu-list", str(core))


def _environment(home: Path) -> dict[str, str]:
    return {"OPENBLAS_NUM_THREADS": "1", "TANDEM_BONJOUR": "off", "TANDEM_HOME": str(home)}


def _train(work: Workload, host: Host, home: Path, folder: Path, addresses: str, encryption: str) -> list[Iteration]:
    """Train on both hosts, asked from the first one."""
    command = [
        *host.prefix, str(Path(sys.executable).parent / "coordinator"), "train", "--json", "--reduce", "ring",
        "--ring-encryption", encryption, "--model", str(work.model), "--data", str(work.data),
        "--adapter-path", str(folder), "--iters", str(ITERS), "--batch-size", str(BATCH), "--num-layers", "-1",
        "--lora-rank", "8", "--learning-rate", "1e-5", "--warmup", "0", "--val-batches", "0", "--save-every", "100000",
        "--nodes", addresses, "--no-local", "--force-all", "--min-nodes", "2",
    ]  # fmt: skip
    found = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **_environment(home)}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                found.append(reported(event))
    if process.returncode:
        raise RuntimeError(f"coordinator train ended with {process.returncode}")
    return found
