"""Real reducer processes, driven over their sockets without a worker."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.reducer import shared
from node.reducer.__main__ import WORKER_GONE
from node.reducer.ring import NOBODY, environment
from node.spec import RingSpec
from tests.fixtures.ranks import ring_specs

FLOATS = 1000
SECONDS = 30.0


class Reducer:
    """A reducer and its worker's end of everything."""

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        memory = shared.create(4 * FLOATS)
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(SECONDS)
        with theirs:
            arguments = ["--fd", str(theirs.fileno()), "--memory", str(memory), "--bytes", str(4 * FLOATS)]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "node.reducer", *arguments],
                pass_fds=[theirs.fileno(), memory],
                stderr=self._output,
            )
        self.numbers = np.frombuffer(shared.attach(memory, 4 * FLOATS), np.float32)
        self._lines = self.connection.makefile("rb")

    def tell(self, **command: object) -> None:
        self.connection.sendall(json.dumps(command).encode() + b"\n")

    def form(self, spec: RingSpec, layout: int = 7) -> None:
        self.tell(form=dataclasses.asdict(spec), layout=layout)

    def answer(self) -> Any:
        """The next answer; None when there is none any more."""
        line = self._lines.readline()
        return json.loads(line) if line else None

    def output(self) -> str:
        """What it has written."""
        self._output.seek(0)
        return self._output.read()

    def leave(self) -> None:
        """What the worker's end does to the socket."""
        self._lines.close()
        self.connection.close()

    def close(self) -> None:
        self.leave()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(SECONDS)
        self._output.close()


@pytest.fixture
def reducers() -> Iterator[list[Reducer]]:
    found = [Reducer() for _ in range(2)]
    yield found
    for reducer in found:
        reducer.close()


def formed(reducers: Sequence[Reducer], specs: Sequence[RingSpec]) -> None:
    for reducer, spec in zip(reducers, specs, strict=True):
        reducer.form(spec)
    assert [reducer.answer() for reducer in reducers] == [{"formed": True}] * len(specs)


def test_sums_replace_the_first_numbers_of_the_memory(reducers: list[Reducer]) -> None:
    formed(reducers, ring_specs(2))
    for count in (3, FLOATS):
        reducers[0].numbers[:] = np.arange(FLOATS)
        reducers[1].numbers[:] = 0.5
        for reducer in reducers:
            reducer.tell(sum=count, first=0)
        assert [reducer.answer() for reducer in reducers] == [{"summed": count}] * 2
        for reducer in reducers:
            assert (reducer.numbers[:count] == np.arange(count) + 0.5).all()
        assert (reducers[1].numbers[count:] == 0.5).all()


def test_a_neighbour_that_is_killed_is_told_and_ends_the_process(reducers: list[Reducer]) -> None:
    formed(reducers, ring_specs(2))
    reducers[0].tell(sum=FLOATS, first=0)
    reducers[1].process.kill()
    said = reducers[0].answer()
    assert "lost" in said["error"]
    assert "\n" not in said["error"]
    assert reducers[0].process.wait(SECONDS) == 1


def test_ranks_that_train_other_arrays_are_refused(reducers: list[Reducer]) -> None:
    for index, (reducer, spec) in enumerate(zip(reducers, ring_specs(2), strict=True)):
        reducer.form(spec, layout=7 + index)
    for reducer in reducers:
        assert "do not train the same arrays" in reducer.answer()["error"]


def test_a_group_of_another_size_is_refused(reducers: list[Reducer]) -> None:
    one, other = ring_specs(2, form_seconds=2.0)
    reducers[0].form(one)
    # It takes the two for neighbours in a ring of three.
    reducers[1].form(dataclasses.replace(other, size=3, rank=2))
    for reducer in reducers:
        said = reducer.answer()
        assert said is None or "error" in said
        assert reducer.process.wait(SECONDS) in (1, -signal.SIGALRM)


def test_an_address_of_another_machine_is_an_answer_of_one_line(reducers: list[Reducer]) -> None:
    spec, _ = ring_specs(2)
    reducers[0].form(dataclasses.replace(spec, listen=("192.0.2.1:1",)))
    assert "bind" in reducers[0].answer()["error"]


@pytest.mark.parametrize("when", ["idle", "adding up", "forming"])
def test_it_ends_when_its_worker_is_gone(when: str, reducers: list[Reducer]) -> None:
    specs = ring_specs(2, form_seconds=1.5 if when == "forming" else SECONDS)
    if when == "forming":
        # MLX waits for the neighbour and lets no thread of Python run: the timer is all there is.
        reducers[0].form(specs[0])
        _wait_for_listener(specs[0].listen[0])
    else:
        formed(reducers, specs)
    if when == "adding up":
        reducers[0].tell(sum=FLOATS, first=0)
    reducers[0].leave()
    code = reducers[0].process.wait(SECONDS)
    assert code == (-signal.SIGALRM if when == "forming" else WORKER_GONE)
    assert reducers[0].output() == ""


def test_a_worker_that_was_killed_is_no_matter_for_words(reducers: list[Reducer]) -> None:
    for reducer, spec in zip(reducers, ring_specs(2), strict=True):
        reducer.form(spec)
    # With its answer unread the connection is reset; the other one finds half a command before the end.
    assert select.select([reducers[0].connection], [], [], SECONDS)[0]
    reducers[1].answer()
    reducers[1].connection.sendall(b'{"sum": 1')
    for reducer in reducers:
        reducer.leave()
        assert reducer.process.wait(SECONDS) == WORKER_GONE
        assert reducer.output() == ""


def _wait_for_listener(address: str) -> None:
    """Wait until a ring listens there, without connecting to it: that would make us its neighbour."""
    entry = f"0100007F:{int(address.rpartition(':')[2]):04X}"
    if not Path("/proc/net/tcp").exists():
        pytest.skip("only Linux lists who listens")
    done = threading.Event()
    while not done.wait(0.01):
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        if any(line[1] == entry and line[3] == "0A" for line in lines):
            done.set()


def test_a_frozen_neighbour_leaves_the_worker_free_to_kill(reducers: list[Reducer]) -> None:
    formed(reducers, ring_specs(2))
    os.kill(reducers[1].process.pid, signal.SIGSTOP)
    reducers[0].tell(sum=FLOATS, first=0)
    # There is no word of it from MLX, so the worker's deadline must do.
    assert not select.select([reducers[0].connection], [], [], 0.5)[0]
    reducers[0].process.kill()
    assert reducers[0].process.wait(SECONDS) == -signal.SIGKILL


def test_it_loads_mlx_and_nothing_else_that_is_large() -> None:
    code = "import sys, node.reducer.__main__, node.reducer.ring; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "'mlx.core'" in done.stdout
    assert not [name for name in ("numpy", "mlx_lm", "mlx.nn", "grpc", "google.protobuf") if f"'{name}'" in done.stdout]


def test_a_host_file_names_the_two_addresses_that_count(tmp_path: Path) -> None:
    spec = RingSpec(2, 3, "ring", ("127.0.0.1:5", "127.0.0.1:6"), ("127.0.0.1:7", "127.0.0.1:8"), 1, 1.0, 1.0)
    found = environment(dataclasses.asdict(spec), tmp_path)
    assert found["MLX_RANK"] == "2"
    hosts = json.loads(Path(found["MLX_HOSTFILE"]).read_text())
    assert hosts == [["127.0.0.1:7", "127.0.0.1:8"], [NOBODY, NOBODY], ["127.0.0.1:5", "127.0.0.1:6"]]


def test_jaccl_gets_the_devices_as_a_matrix(tmp_path: Path) -> None:
    spec = RingSpec(1, 2, "jaccl", (), (), 1, 1.0, 1.0, ("", "rdma_en5", "rdma_en4", ""), "10.0.0.1:4000")
    found = environment(dataclasses.asdict(spec), tmp_path)
    assert found["MLX_RANK"] == "1"
    assert found["MLX_JACCL_COORDINATOR"] == "10.0.0.1:4000"
    assert json.loads(Path(found["MLX_IBV_DEVICES"]).read_text()) == [[None, "rdma_en5"], ["rdma_en4", None]]
    assert set(found) == {"MLX_RANK", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"}


def test_shared_memory_is_the_same_for_all_who_attach_it() -> None:
    descriptor = shared.create(4096)
    one, other = shared.attach(os.dup(descriptor), 4096), shared.attach(descriptor, 4096)
    one[:5] = b"hello"
    assert other[:5] == b"hello"
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)
    one.close()
    other.close()
