"""Random faults, one after the other, from a printed seed: the run ends with the loss of one that nothing disturbed.

deploy/run pytest -m slow tests/faults/test_soak.py -s
TANDEM_SOAK_STEPS=30000 TANDEM_SOAK_SEED=7 deploy/run pytest -m slow tests/faults/test_soak.py -s
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.specs import MOST_REPLAYED_STEPS
from tests.faults.harness import arguments, end, make_inputs
from tests.fixtures.nodes import ServingNode
from tests.fixtures.processes import descendants
from tests.fixtures.runs import Run, wait_for_end

STEPS = int(os.environ.get("TANDEM_SOAK_STEPS", "1200"))
SEED = int(os.environ.get("TANDEM_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 10_000)
EVERY_SECONDS = (8.0, 16.0)
FROZEN_SECONDS = 5.0
NAMES = ("anna", "ben", "cleo")
MOST_MEMORY_GAINED = 64 << 20
MOST_FILES_GAINED = 24


class Troublemaker:
    """Does something to one of three nodes now and then; each node comes back at its own address.

    Args:
        folder: of the nodes' homes.
        seed: of what it does.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._environment = {"TANDEM_BONJOUR": "off"}
        self.nodes = {name: self._serve(name) for name in NAMES}
        self._ports = {name: node.port for name, node in self.nodes.items()}
        self.done: list[str] = []

    def _serve(self, name: str, port: int = 0) -> ServingNode:
        home = self._folder / f"home-{name}"
        return ServingNode(name, home, environment=self._environment, arguments=("--port", str(port)))

    def trouble(self) -> None:
        """One fault."""
        name = self._random.choice(NAMES)
        kind = self._random.choice(("kill worker", "kill node", "freeze worker", "freeze node", "leave"))
        self.done.append(f"{kind} {name}")
        print(f"{kind}: {name}", flush=True)
        node = self.nodes[name]
        match kind:
            case "kill worker":
                self._signal(node.worker_pids(), signal.SIGKILL)
            case "kill node":
                node.kill()
                self._replace(name)
            case "leave":
                node.stop()
                self._replace(name)
            case "freeze worker":
                self._freeze(node.worker_pids())
            case "freeze node":
                self._freeze([node.process.pid, *node.worker_pids()])

    def _replace(self, name: str) -> None:
        self.nodes[name]._errors.close()
        self.nodes[name] = self._serve(name, self._ports[name])

    def _freeze(self, pids: list[int]) -> None:
        self._signal(pids, signal.SIGSTOP)
        time.sleep(FROZEN_SECONDS)
        self._signal(pids, signal.SIGCONT)

    @staticmethod
    def _signal(pids: list[int], what: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def pause(self) -> float:
        """Seconds until the next fault."""
        return self._random.uniform(*EVERY_SECONDS)

    def close(self) -> None:
        """End all nodes."""
        for node in self.nodes.values():
            if node.process.poll() is None:
                node.kill()
            node._errors.close()


def _usage(pid: int) -> tuple[int, int]:
    """Bytes of memory and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.slow
@pytest.mark.timeout(1200 + STEPS // 8)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see what processes use")
def test_faults_one_after_the_other(tmp_path: Path) -> None:
    print(f"seed {SEED}, {STEPS} steps")
    inputs = make_inputs(tmp_path, iters=STEPS)
    maker = Troublemaker(tmp_path, SEED)
    over = threading.Event()

    def make_trouble() -> None:
        while not over.wait(maker.pause()):
            maker.trouble()

    making: Future[None] | None = None
    pool = ThreadPoolExecutor(1)
    try:
        adapter = tmp_path / "disturbed"
        run = Run(*arguments(inputs, adapter, list(maker.nodes.values()), iters=STEPS))
        run.until_step(STEPS // 20)
        making = pool.submit(make_trouble)
        run.until_step(STEPS // 4)
        early = _usage(run.process.pid)
        run.until_step(STEPS - 5)
        late = _usage(run.process.pid)
        over.set()
        outcome = end(run, adapter)
        making.result()
        outcome.check(inputs, replayed=MOST_REPLAYED_STEPS * len(maker.done))
        seconds = [repair["seconds"] for repair in outcome.repairs]
        if seconds:
            print(f"{len(seconds)} repairs: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")
        print(f"coordinator: {(late[0] - early[0]) / 2**20:+.1f} MB, {late[1] - early[1]:+d} files")
        assert late[0] - early[0] < MOST_MEMORY_GAINED
        assert late[1] - early[1] < MOST_FILES_GAINED
        assert len(maker.done) >= 1
        for node in maker.nodes.values():
            # A node that was frozen a moment ago may be seeing its worker out yet.
            for pid in descendants(node.process.pid):
                wait_for_end(pid)
    finally:
        over.set()
        pool.shutdown()
        maker.close()
