"""Our runs with each rank on a core of its own: as a fleet, and as copies that know nothing of each other."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.workload import WARM_UP, Iteration, Workload, reported
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair

Follower = Callable[[dict[str, Any]], None]


def cores(count: int) -> list[int]:
    """So many cores that this process may use.

    Raises:
        RuntimeError: there are fewer.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < count:
        raise RuntimeError(f"needs {count} cores, and {len(usable)} can be used")
    return usable[:count]


def _on(core: int) -> tuple[str, ...]:
    return ("taskset", "--cpu-list", str(core))


@contextlib.contextmanager
def pinned_nodes(folder: Path, *names: str) -> Iterator[list[ServingNode]]:
    """A node on each of as many cores, with a thread each."""
    environment = {"OPENBLAS_NUM_THREADS": "1", "TANDEM_BONJOUR": "off"}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(ServingNode(name, folder / f"home-{name}", environment=environment, prefix=_on(core)))
            for name, core in zip(names, cores(len(names)), strict=True)
        ]


def fleet(
    work: Workload,
    folder: Path,
    nodes: Sequence[ServingNode],
    *,
    batch: int,
    iters: int,
    follow: Follower = lambda event: None,
) -> list[Iteration]:
    """Train on these nodes, all of them, and not here.

    Args:
        work: what to train.
        folder: of the adapter.
        nodes: ranks.
        batch: rows of an iteration.
        iters: iterations.
        follow: is given each step as it is reported.
    """
    addresses = ",".join(node.address for node in nodes)
    more = ("--nodes", addresses, "--no-local", "--force-all", "--min-nodes", str(len(nodes)))
    for node in nodes:
        pair(node.home, _home(folder))
    return _train(work, folder, batch, iters, more, (), follow)


def _home(folder: Path) -> Path:
    """Of the coordinator that writes to this folder."""
    return folder.parent / f"home-of-{folder.name}"


def copies(work: Workload, folder: Path, count: int, *, batch: int, iters: int) -> list[list[Iteration]]:
    """Train on this machine so many times at the same time, each run on a core of its own, ``batch`` rows each."""

    def one(number: int, core: int) -> list[Iteration]:
        return _train(work, folder / str(number), batch, iters, ("--nodes", "local"), _on(core), lambda event: None)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count), cores(count)))


def alone(
    work: Workload,
    folder: Path,
    *,
    batch: int,
    iters: int,
    options: Sequence[str] = (),
    follow: Follower = lambda _: None,
    pinned: bool = True,
) -> list[Iteration]:
    """Train on this machine's first core, or on all of them, with these options over the benchmark's own."""
    more = ("--nodes", "local", *options)
    return _train(work, folder, batch, iters, more, _on(cores(1)[0]) if pinned else (), follow)


def together(runs: Sequence[Sequence[Iteration]]) -> float:
    """Tokens per second of runs at the same time: of each, in the time that all of them were training."""
    first = max(run[WARM_UP - 1].at for run in runs)
    last = min(run[-1].at for run in runs)
    total = 0.0
    for run in runs:
        inside = [iteration for iteration in run if first <= iteration.at <= last]
        total += sum(iteration.tokens for iteration in inside[1:]) / (inside[-1].at - inside[0].at)
    return total


def _train(
    work: Workload,
    folder: Path,
    batch: int,
    iters: int,
    more: Sequence[str],
    prefix: Sequence[str],
    follow: Follower,
) -> list[Iteration]:
    command = [
        *prefix, str(Path(sys.executable).parent / "coordinator"), "train", "--json",
        "--model", str(work.model), "--data", str(work.data), "--adapter-path", str(folder), "--iters", str(iters),
        "--batch-size", str(batch), "--num-layers", "-1", "--learning-rate", "1e-5", "--warmup", "0",
        "--lora-scale", "20", "--val-batches", "0", "--save-every", "100000", *more,
    ]  # fmt: skip
    return followed(command, {"TANDEM_HOME": str(_home(folder)), "TANDEM_BONJOUR": "off"}, follow)


def followed(
    command: Sequence[str], environment: Mapping[str, str], follow: Follower = lambda _: None
) -> list[Iteration]:
    """Run a ``coordinator train --json`` to its end.

    Args:
        command: with its options.
        environment: over this process's own.
        follow: is given each step as it is reported.

    Raises:
        RuntimeError: it failed.
    """
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                found.append(reported(event))
                follow(event)
    if process.returncode:
        raise RuntimeError(f"coordinator train ended with {process.returncode}")
    return found
