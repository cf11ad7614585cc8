"""A model for three machines at once, from one whose uplink carries 200 Mbit/s: hosts are network namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.figures import Figure
from tests.fixtures.hosts import Host, hosts, hosts_available
from tests.fixtures.nodes import ServingNode
from tests.fixtures.stores import described, model_folder

UPLINK_MBIT = 200.0
MODEL_BYTES = 64_000_000
RECEIVERS = 3


def run(folder: Path, pairs: int) -> list[Figure]:
    """Time for three over the time for one, and how well the uplink is used meanwhile."""
    if reason := hosts_available():
        print(f"distribution: left out, {reason}")
        return []
    model = model_folder(folder / "model", sizes=(MODEL_BYTES // 2,) * 2)
    size = described(model).size
    one, three, sent = [], [], []
    with hosts(RECEIVERS + 1) as (source, *receivers):
        source.shape(UPLINK_MBIT)
        for pair in range(pairs):
            seconds, _ = send(folder / f"one{pair}", model, source, receivers[:1])
            one.append(seconds)
            seconds, count = send(folder / f"three{pair}", model, source, receivers)
            three.append(seconds)
            sent.append(count / size)
    ratios = tuple(many / single for many, single in zip(three, one, strict=True))
    used = tuple(size * 8 / seconds / (UPLINK_MBIT * 1e6) for seconds in three)
    return [
        Figure(f"model to {RECEIVERS} nodes / to one, time", "x", ratios, below=1.4),
        Figure("share of the source's uplink used", "x", used, at_least=0.8),
        Figure("bytes that left the source / size of the model", "x", tuple(sent)),
        Figure("model to one node", "s", tuple(one)),
    ]


def send(folder: Path, model: Path, source: Host, receivers: list[Host]) -> tuple[float, int]:
    """Seconds to get the model from the source to nodes that have nothing; bytes that left the source's interface."""
    environment = {"TANDEM_BONJOUR": "off", "HF_HUB_CACHE": str(folder / "no-cache")}
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                ServingNode(
                    f"n{i}",
                    folder / f"home{i}",
                    environment=environment,
                    prefix=host.prefix,
                    friends=[folder / f"home{before}" for before in range(i)],
                )
            )
            for i, host in enumerate([source, *receivers])
        ]
        addresses = [f"{host.address}:{node.port}" for host, node in zip([source, *receivers], nodes, strict=True)]
        before = _sent(source)
        command = [sys.executable, "-m", "tests.benchmarks.sending", str(model), str(nodes[0].home), *addresses]
        done = subprocess.run([*source.prefix, *command], check=True, stdout=subprocess.PIPE, text=True)
        return float(json.loads(done.stdout)["seconds"]), _sent(source) - before


def _sent(host: Host) -> int:
    return int(host.run("cat", "/sys/class/net/eth0/statistics/tx_bytes").stdout)
