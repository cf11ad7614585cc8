"""The peer: ``mlx_lm lora`` under ``mlx.launch``, on the ring, untouched."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.workload import Iteration, Workload
from tests.fixtures.limits import limited

RUN_SECONDS = 1200
ROOT = Path(__file__).resolve().parents[2]


def train(
    work: Workload,
    folder: Path,
    *,
    ranks: int,
    batch: int,
    iters: int,
    cores: Sequence[int] = (),
    launcher: bool = True,
    last: float = 1.0,
    options: Sequence[str] = (),
) -> list[Iteration]:
    """Train, and say how each iteration went.

    Args:
        work: what to train.
        folder: for the adapter.
        ranks: processes.
        batch: rows of an iteration, of all ranks together.
        iters: iterations.
        cores: that the ranks are pinned to, in turn.
        launcher: False starts the ranks without ``mlx.launch``, whose own process is busy all the time.
        last: part of its core's time that the last rank gets; below 1 only without the launcher.
        options: more of them, over these.
    """
    given = [
        "--train", "--model", str(work.model), "--data", str(work.data), "--adapter-path", str(folder),
        "--iters", str(iters), "--batch-size", str(batch), "--num-layers", "-1", "--learning-rate", "1e-5",
        "--steps-per-report", "1", "--steps-per-eval", "100000", "--val-batches", "1", "--save-every", "100000",
        *options,
    ]  # fmt: skip
    rank = [sys.executable, "-m", "tests.benchmarks.mlx_rank", ",".join(map(str, cores)), *given]
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1"}
    if ranks == 1:
        output = _output(rank, environment)
    elif launcher:
        port = _free_ports(ranks)
        start = [str(Path(sys.executable).parent / "mlx.launch"), "-n", str(ranks), "--backend", "ring"]
        output = _output([*start, "--starting-port", str(port), "--", *rank], environment)
    else:
        output = _ring_by_hand(rank, environment, ranks, folder, last)
    return _iterations(output, batch)


def _ring_by_hand(rank: Sequence[str], environment: dict[str, str], ranks: int, folder: Path, last: float) -> str:
    """The same processes with the same environment; what rank 0 printed."""
    port = _free_ports(ranks)
    folder.mkdir(parents=True, exist_ok=True)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + number}"] for number in range(ranks)]))
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(ranks):
            process = subprocess.Popen(
                rank,
                env={**environment, "MLX_RANK": str(number), "MLX_HOSTFILE": str(hosts)},
                cwd=ROOT,
                stdout=subprocess.DEVNULL if number else subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            stack.callback(process.kill)
            started.append(process)
        if last < 1:
            stack.enter_context(limited(started[-1].pid, last))
        output, _ = started[0].communicate(timeout=RUN_SECONDS)
        for process in started:
            if process.wait(timeout=60):
                raise RuntimeError(f"a rank of mlx_lm lora ended with {process.returncode}")
    return output


def _output(command: Sequence[str], environment: dict[str, str]) -> str:
    # mlx.launch polls its stdin all the time and cannot do without one; /dev/null, always readable, would do it harm.
    silence, held = os.pipe()
    try:
        done = subprocess.run(
            command, stdin=silence, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=RUN_SECONDS,
            check=False,
        )  # fmt: skip
    finally:
        os.close(silence)
        os.close(held)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that are free on the loopback."""
    for start in range(33000, 60000, 16):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(start, start + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return start
    raise RuntimeError("no free ports")


def _iterations(output: str, batch: int) -> list[Iteration]:
    found, before = [], 0.0
    for line in output.splitlines():
        if line.startswith('{"at"'):
            said = json.loads(line)
            # It counts one position of the padding of each row that has any.
            tokens = said["trained_tokens"] - before - batch
            before = said["trained_tokens"]
            peak = said["peak_memory"] * 1e9
            found.append(Iteration(said["iteration"], said["at"], said["train_loss"], tokens, peak))
    return found
