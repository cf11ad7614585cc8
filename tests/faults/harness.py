"""A fleet of real nodes with faults built in, and what must be true of a run on it however it was disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.api import train
from coordinator.config import TrainConfig
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.processes import descendants
from tests.fixtures.runs import Run, assert_same_losses, losses, metrics, notes, write_chat_data

INJECTED = Path(__file__).parent / "injected"
ITERS = 120
BATCH = 6
TOLERANCE = 1e-4
LONGEST_RECOVERY_SECONDS = 30.0
"""Far above what is promised on a quiet machine: these tests run beside others. The soak prints the true figures."""

Fault = Mapping[str, Any]


@dataclass
class Inputs:
    """A model, rows, and the losses of a run that nothing disturbs."""

    folder: Path
    losses: list[tuple[int, float]]


def make_inputs(folder: Path, iters: int = ITERS) -> Inputs:
    """A tiny model and few rows, trained once on this machine alone."""
    tiny_model(folder / "model", "llama")
    write_chat_data(folder / "data", train=60)
    adapter = folder / "adapters"
    train(
        TrainConfig(
            model=str(folder / "model"),
            data=str(folder / "data"),
            adapter_path=str(adapter),
            iters=iters,
            batch_size=BATCH,
            learning_rate=1e-4,
            num_layers=-1,
            lora_dropout=0.1,
            save_every=1000,
            val_batches=1,
            steps_per_eval=50,
            nodes="local",
        )
    )
    return Inputs(folder, losses(adapter))


def arguments(inputs: Inputs, adapter: Path, nodes: Sequence[ServingNode], *more: str, iters: int = ITERS) -> list[str]:
    """A run on these nodes and not here."""
    return [
        "train", "--model", str(inputs.folder / "model"), "--data", str(inputs.folder / "data"),
        "--adapter-path", str(adapter), "--iters", str(iters), "--batch-size", str(BATCH), "--learning-rate", "1e-4",
        "--num-layers", "-1", "--lora-dropout", "0.1", "--save-every", "1000", "--val-batches", "1",
        "--steps-per-eval", "50", "--force-all", "--no-local", "--nodes", ",".join(node.address for node in nodes),
        *more,
    ]  # fmt: skip


def local(inputs: Inputs, adapter: Path, *more: str) -> list[str]:
    """The same run on this machine alone."""
    command = [*arguments(inputs, adapter, (), *more), "--nodes", "local"]
    command.remove("--no-local")
    return command


def injected(folder: Path, faults: Sequence[Fault], name: str = "here") -> dict[str, str]:
    """The environment in which workers have these faults."""
    done = folder / f"faults-{name}"
    done.mkdir()
    return {
        "TANDEM_BONJOUR": "off",
        "PYTHONPATH": os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")]),
        "TANDEM_TEST_FAULTS": json.dumps(list(faults)),
        "TANDEM_TEST_FAULTS_DONE": str(done),
    }


class Cable:
    """A port of this machine that leads to another one, until it is cut; then it serves new connections again.

    Args:
        port: that it leads to.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._uncut = 0  # from here on
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        """Of this end."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                with self._lock:
                    self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._carry, args=(one, other), daemon=True))
                    self._threads[-1].start()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is cut
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End all connections at once."""
        with self._lock:
            ends, self._uncut = self._ends[self._uncut :], len(self._ends)
        for connection in ends:
            with contextlib.suppress(OSError):  # its other end has gone
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Cable:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # macOS: it is not connected
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for connection in self._ends:
            connection.close()


@contextlib.contextmanager
def faulty(
    folder: Path, faults: Mapping[str, Sequence[Fault]], prefixes: Mapping[str, Sequence[str]] | None = None
) -> Iterator[dict[str, ServingNode]]:
    """Nodes by name, each with its faults; whatever became of them, nothing is left at the end."""
    nodes: dict[str, ServingNode] = {}
    started: set[int] = set()
    try:
        for name, own in faults.items():
            environment = injected(folder, own, name)
            prefix = (prefixes or {}).get(name, ())
            nodes[name] = ServingNode(name, folder / f"home-{name}", environment=environment, prefix=prefix)
        yield nodes
    finally:
        for node in nodes.values():
            started |= {node.process.pid, *descendants(node.process.pid)}
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for node in nodes.values():
            if node.process.poll() is None:
                node.kill()
            else:
                assert node.process.stdout is not None
                node.process.stdout.close()
            node._errors.close()


def tell_recovery(fault: str, seconds: float) -> None:
    """One line for each fault that was survived, in one form: ``pytest -s … | grep ^recovery``."""
    print(f"\nrecovery: {seconds:.1f} s after: {fault}")


@dataclass
class Outcome:
    """A run that has ended."""

    code: int
    errors: str
    folder: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def repairs(self) -> list[dict[str, Any]]:
        """What was lost and repaired, as events."""
        return notes(self.folder, "restarted")

    @property
    def replayed(self) -> int:
        """Steps that were computed again."""
        return sum(repair["replayed_steps"] for repair in self.repairs)

    def nodes(self) -> list[int]:
        """Ranks of each step."""
        return [entry["nodes"] for entry in metrics(self.folder) if "loss" in entry]

    def check(self, inputs: Inputs, *, replayed: int = 0, seconds: float = LONGEST_RECOVERY_SECONDS) -> None:
        """Every step once, every loss right, no more computed again than this, and one line for each fault."""
        assert self.code == 0, self.errors
        assert_same_losses(losses(self.folder), inputs.losses, TOLERANCE)
        assert self.replayed <= replayed, self.repairs
        for repair in self.repairs:
            tell_recovery(repair["message"].partition("; went on")[0], repair["seconds"])
            assert repair["seconds"] < seconds, repair
        digests = {"ended with the same weights" in value for _, value in self.events[-1]["summary"] if "rows" in value}
        if self.nodes()[-1] > 1:
            assert digests == {True}, self.events[-1]
        assert not notes(self.folder, "different")


def end(run: Run, folder: Path) -> Outcome:
    """Let a run end."""
    code, errors = run.wait()
    return Outcome(code, errors, folder, run.events)


def run_through(
    inputs: Inputs, folder: Path, faults: Mapping[str, Sequence[Fault]], *more: str, iters: int = ITERS
) -> Outcome:
    """A whole run on nodes with these faults."""
    adapter = folder / "adapters"
    with faulty(folder, faults) as nodes:
        return end(Run(*arguments(inputs, adapter, list(nodes.values()), *more, iters=iters)), adapter)
