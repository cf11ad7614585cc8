"""What the simulator makes of three machines from steps of two and of one, against the three themselves.

The machines are hosts of their own on links of 40 Mbit/s. Computing a share takes each as long as on a machine of its
speed: it sleeps after it has computed, so that three ranks do not take two cores from each other.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coordinator.data.batches import Batches
from coordinator.data.tokenset import TokenSet
from coordinator.planner import Candidate, JobFacts, Plan, plan
from coordinator.program import Program
from coordinator.ring_order import Link
from coordinator.running.measured import past_run
from coordinator.shares import StepSource
from coordinator.simulation.calibration import calibrate
from coordinator.simulation.network import Network
from coordinator.simulation.past import PastRun
from coordinator.simulation.steps import Machine, Outcome, simulate
from tests.benchmarks.figures import Figure
from tests.benchmarks.pinned import followed
from tests.benchmarks.workload import WARM_UP, Workload, seconds_per_iteration, workload
from tests.faults.harness import injected
from tests.fixtures.hosts import Host, hosts, hosts_available
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair

LINK_MBIT = 40
BATCH = 16
ITERS = WARM_UP + 12
OVERHEAD_SECONDS = 0.05
# So slow that what is really computed is a small part of it, even while the machine does other things, too.
SECONDS_PER_POSITION = {"anna": 4.0e-3, "ben": 6.0e-3, "carl": 9.0e-3}


def run(folder: Path, pairs: int) -> list[Figure]:
    """Predicted over measured seconds of a step.

    Raises:
        RuntimeError: there can be no hosts here.
    """
    if missing := hosts_available():
        raise RuntimeError(f"simulation needs three hosts: {missing}")
    work = workload(folder, 96, (10, 30), hidden=128)
    ratios, measured, networks, planned, stretched = [], [], [], [], []
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(hosts(3))
        asking = folder / "home-of-coordinator"
        fleet = []
        for host, (name, pace) in zip(lab, SECONDS_PER_POSITION.items(), strict=True):
            host.shape(LINK_MBIT)
            home = folder / name
            pair(home, asking)
            fault = {"do": "pace", "overhead": OVERHEAD_SECONDS, "per_position": pace}
            environment = {"OPENBLAS_NUM_THREADS": "1", **injected(folder, [fault], name)}
            node = ServingNode(name, home, environment=environment, prefix=host.prefix)
            stack.callback(node.stop)
            fleet.append((host, node))
        for number in range(pairs):
            place = folder / f"pair{number}"
            place.mkdir()
            two, _ = _train(work, asking, place / "two", fleet[:2])
            one, _ = _train(work, asking, place / "one", fleet[2:])
            three, seconds = _train(work, asking, place / "three", fleet)
            predicted, by_plan = _predict(two, one, _typical_steps(asking))
            ratios.append(predicted.step_seconds / seconds)
            planned.append(by_plan.step_seconds / seconds)
            measured.append(seconds)
            stretched.append(_stretched(three))
            networks.append(predicted.network_seconds / _network_seconds(three))
    return [
        Figure("step of 3 ranks, predicted from 1 and 2 / measured", "x", tuple(ratios), at_least=0.9, at_most=1.1),
        Figure("its sum, predicted / measured", "x", tuple(networks)),
        Figure("the same step, by the plan / measured", "x", tuple(planned)),
        Figure("step of 3 ranks", "s", tuple(measured)),
        Figure("their computing / as long as it should take", "x", tuple(stretched), below=1.1),
    ]


def _predict(two: PastRun, one: PastRun, steps: Sequence[np.ndarray]) -> tuple[Outcome, Plan]:
    """Steps of the machines of both runs together, with links such as those between the two; and the plan's."""
    assert two.gradient_bytes is not None, "it has saved its weights"
    job = JobFacts(tuple(steps), two.max_seq_length, BATCH, 1, two.gradient_bytes)
    link = next(iter(two.links.values()))
    names = list(SECONDS_PER_POSITION)
    network = Network({(a, b): Link(link.bits_per_second, link.latency_seconds) for a in names for b in names if a < b})
    known = calibrate([(two.steps, job), (one.steps, job)], network)
    machines = [
        Machine(Candidate(name, name, None, 0, None, known.machines[name].speed), known.machines[name].noise)
        for name in names
    ]
    by_plan = plan([machine.candidate for machine in machines], job, network.links, force_all=True)
    return simulate(machines, job, network, known.costs, steps=ITERS, warm_up=WARM_UP, everyone=True), by_plan


def _stretched(run: PastRun) -> float:
    """How much longer shares took than they should: above 1 where cores were fought for, and nothing can be said."""
    return statistics.fmean(
        step.compute_seconds[name] / (OVERHEAD_SECONDS + positions * SECONDS_PER_POSITION[name])
        for step in run.steps
        for name, positions in step.positions.items()
        if positions
    )


def _network_seconds(run: PastRun) -> float:
    return statistics.fmean(step.split.network_seconds for step in run.steps)


def _typical_steps(home: Path) -> list[np.ndarray]:
    """Lengths of the rows of each step, from the tokens that the run left in its cache."""
    rows = max((TokenSet(path.parent) for path in home.rglob("header.json")), key=lambda tokens: len(tokens.lengths))
    source = StepSource(rows, Batches(rows.lengths, BATCH, 0), Program(ITERS, 1, 10**6, 10**6, 10**6, validates=False))
    return [source.lengths(step) for step in range(1, ITERS + 1)]


def _train(
    work: Workload, home: Path, folder: Path, fleet: Sequence[tuple[Host, ServingNode]]
) -> tuple[PastRun, float]:
    """Train on these hosts, asked from the first one; and how long a step took by the wall's clock."""
    command = [
        *fleet[0][0].prefix, str(Path(sys.executable).parent / "coordinator"), "train", "--json", "--reduce", "ring",
        "--model", str(work.model), "--data", str(work.data), "--adapter-path", str(folder), "--iters", str(ITERS),
        "--batch-size", str(BATCH), "--num-layers", "-1", "--fine-tune-type", "full", "--learning-rate", "1e-5",
        "--warmup", "0", "--val-batches", "0", "--save-every", "100000", "--seed", "0", "--no-local", "--force-all",
        "--nodes", ",".join(f"{host.address}:{node.port}" for host, node in fleet), "--min-nodes", str(len(fleet)),
    ]  # fmt: skip
    found = followed(command, {"TANDEM_HOME": str(home), "TANDEM_BONJOUR": "off"})
    return past_run(folder), seconds_per_iteration(found)
