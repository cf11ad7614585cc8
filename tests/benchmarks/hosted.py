"""Our runs over hosts of their own, each with a node that is pinned to a core; the first host asks for the runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.pinned import Follower, cores, followed
from tests.benchmarks.workload import Iteration, Workload
from tests.fixtures.hosts import Host
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair


@dataclass(frozen=True)
class Lab:
    """Hosts that serve.

    Attributes:
        hosts: of the nodes.
        nodes: one on each host.
        home: of the coordinator, which all of them trust.
    """

    hosts: Sequence[Host]
    nodes: Sequence[ServingNode]
    home: Path

    def train(
        self,
        work: Workload,
        folder: Path,
        *,
        batch: int,
        iters: int,
        ranks: int,
        options: Sequence[str] = (),
        follow: Follower = lambda _: None,
    ) -> list[Iteration]:
        """Train on the first hosts.

        Args:
            work: what to train.
            folder: of the adapter.
            batch: rows of an iteration.
            iters: iterations.
            ranks: hosts that take part.
            options: more of them.
            follow: is given each step as it is reported.

        Raises:
            RuntimeError: it failed.
        """
        members = list(zip(self.hosts, self.nodes, strict=True))[:ranks]
        addresses = ",".join(f"{host.address}:{node.port}" for host, node in members)
        command = [
            *self.hosts[0].prefix, str(Path(sys.executable).parent / "coordinator"), "train", "--json",
            "--model", str(work.model), "--data", str(work.data), "--adapter-path", str(folder),
            "--iters", str(iters), "--batch-size", str(batch), "--num-layers", "-1", "--learning-rate", "1e-5",
            "--warmup", "0", "--val-batches", "0", "--save-every", "100000", "--reduce", "ring",
            "--nodes", addresses, "--no-local", "--force-all", "--min-nodes", str(ranks), *options,
        ]  # fmt: skip
        return followed(command, _environment(self.home), follow)


@contextlib.contextmanager
def serving(folder: Path, hosts: Sequence[Host], environment: Mapping[str, str] | None = None) -> Iterator[Lab]:
    """A node on each host. Where there are more of them than cores, some share one.

    Args:
        folder: for their homes.
        hosts: connected ones.
        environment: more of it, for the nodes.
    """
    usable = cores(2)
    homes = [folder / f"home{number}" for number in range(len(hosts))]
    asking = folder / "home-of-coordinator"
    for home in homes:
        pair(home, asking)
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                ServingNode(
                    home.name,
                    home,
                    environment={**_environment(home), **(environment or {})},
                    prefix=(*host.prefix, "taskset", "--cpu-list", str(usable[number % len(usable)])),
                )
            )
            for number, (host, home) in enumerate(zip(hosts, homes, strict=True))
        ]
        yield Lab(hosts, nodes, asking)


def _environment(home: Path) -> dict[str, str]:
    return {"OPENBLAS_NUM_THREADS": "1", "TANDEM_BONJOUR": "off", "TANDEM_HOME": str(home)}
