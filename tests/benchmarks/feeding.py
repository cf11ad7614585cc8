"""What a large fleet costs the coordinator, on one core: dividing and encoding, and whole steps of simulated nodes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from coordinator.checkpoint import Checkpoints
from coordinator.copies import Kept
from coordinator.crew import Crew, Member
from coordinator.data.batches import Batches
from coordinator.data.tokenset import TokenisedChunk, TokenSet, TokenSetWriter
from coordinator.engine import Engine, Work
from coordinator.pace import Pace, Speed
from coordinator.program import Program
from coordinator.runfolder import RunFolder
from coordinator.shares import StepSource
from coordinator.stream import StepFinished
from node.client import NodeClient
from node.errors import TandemError
from node.events import Ready
from node.info import RingPart
from node.spec import TrainStep
from node.wire import encode_request
from tests.benchmarks.figures import Figure

NODES = 64
BATCH_SIZE = 256
ROWS = 20_000
MAX_SEQ_LENGTH = 2048
STEPS = 60
GOAL_MILLISECONDS = 50.0
WHOLE_STEPS = 500
WARM_STEPS = 100


def run(folder: Path, pairs: int) -> list[Figure]:
    """Planning alone, then everything between the data and the wire."""
    return [*measure(folder, pairs), *whole(folder, WHOLE_STEPS * pairs)]


def whole(folder: Path, steps: int) -> list[Figure]:
    """Steps per second of engine, crew, clients and gRPC with 64 nodes that answer at once, and growth of memory."""
    tokens = _tokens(folder / "whole")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.simulated"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nodes:
        assert nodes.stdout is not None
        assert nodes.stdin is not None
        address = f"127.0.0.1:{int(nodes.stdout.readline())}"
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(nodes.pid, cores[1:] or cores)
        os.sched_setaffinity(0, cores[:1])
        try:
            watch = asyncio.run(_train(folder, tokens, address, steps))
        finally:
            os.sched_setaffinity(0, cores)
            nodes.stdin.close()
    rate = (len(watch.times) - WARM_STEPS) / (watch.times[-1] - watch.times[WARM_STEPS])
    busy = (watch.cpu[-1] - watch.cpu[WARM_STEPS]) / (watch.times[-1] - watch.times[WARM_STEPS])
    grown = (watch.memory[-1] - watch.memory[len(watch.memory) // 4]) / 2**20
    return [
        Figure(f"steps a second, {NODES} simulated nodes, batch {BATCH_SIZE}", "1/s", (rate,), at_least=20.0),
        Figure("of one core", "", (busy,)),
        Figure(f"memory gained over the last three quarters of {steps} steps", "MB", (grown,)),
    ]


@dataclasses.dataclass
class _Watch:
    """A reader that notes when each step was done, and what the process had taken by then."""

    times: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)

    def handle(self, event: object) -> None:
        if isinstance(event, StepFinished):
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())
            if len(self.times) % 50 == 0:
                self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    def close(self) -> None:
        pass


class _Muster:
    """Simulated nodes as a crew."""

    awaited = ""

    def __init__(self, address: str, stop: asyncio.Event) -> None:
        self._clients = [NodeClient(address, f"node {index}") for index in range(NODES)]
        self._stop = stop

    async def assemble(self) -> Crew:
        links = await asyncio.gather(*(client.open_worker("run", "benchmark") for client in self._clients))
        ready = Ready("cpu", "llama", 1, 1, 1, 1, quantized=False, load_seconds=0.0, active_memory_bytes=0)
        random = np.random.default_rng(2)
        return Crew(
            [
                Member(client.name, client.name, link, ready, Pace(Speed(0.005, float(random.uniform(5e-5, 5e-4)))))
                for client, link in zip(self._clients, links, strict=True)
            ],
            self._stop,
        )

    def attend(self, wake: Callable[[], None]) -> None:
        del wake

    def arrivals(self) -> list[Member]:
        return []

    def lost(self, member: Member, error: TandemError | None, largest: int) -> None:
        raise AssertionError(f"{member.name} is lost: {error}, {largest}")

    def sum_seconds(self, ids: Sequence[str], *, streams: bool) -> float:
        del ids, streams
        return 0.0

    async def kept(self) -> list[Kept]:
        return []

    async def rest(self) -> None:
        pass

    def order(self, ids: tuple[str, ...]) -> list[str]:
        return list(ids)

    def ring(self, crew: Crew, *, streams: bool) -> list[RingPart]:
        assert not streams
        return [
            RingPart(rank, len(crew), "ring", bytes(16), bytes(16), ("127.0.0.1:1",), 1, 10.0, 10.0)
            for rank in range(len(crew))
        ]

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


async def _train(folder: Path, tokens: TokenSet, address: str, steps: int) -> _Watch:
    program = Program(steps, 1, 10**6, 10**6, 10, validates=False)
    work = Work(
        folder=folder,
        program=program,
        steps=StepSource(tokens, Batches(tokens.lengths, BATCH_SIZE, 1), program),
        validation=None,
        samples=(),
        decode=lambda _: "",
        early_stop=None,
        save_best=False,
        data_digest="",
    )
    watch, stop = _Watch(), asyncio.Event()
    muster = _Muster(address, stop)
    # The last step would be saved, and simulated nodes have nothing to save.
    engine = Engine(work, muster, Checkpoints(RunFolder(folder / "run"), None), watch, None, stop)
    engine._pending.pop()
    try:
        await engine.prepare()
        await engine.run()
    finally:
        await engine.close()
        await muster.close()
    return watch


def measure(folder: Path, repetitions: int) -> list[Figure]:
    """Milliseconds of a step for 64 nodes whose paces change all the time: below 50 feeds 20 steps a second."""
    tokens = _tokens(folder / "feeding")
    source = StepSource(
        tokens, Batches(tokens.lengths, BATCH_SIZE, 1), Program(10**6, 1, 100, 100, 10, validates=False)
    )
    random = np.random.default_rng(2)
    paces = [Pace(Speed(0.005, float(speed))) for speed in random.uniform(5e-5, 5e-4, NODES)]
    divided, encoded = [], []
    step = 0
    for repetition in range(repetitions + 1):
        division_seconds = encoding_seconds = 0.0
        for _ in range(STEPS):
            step += 1
            began = time.perf_counter()
            shares = source.shares(step, paces)
            after = time.perf_counter()
            for share in shares:
                encode_request(TrainStep(share), 1)
            encoding_seconds += time.perf_counter() - after
            paces = [
                pace.observed(share.positions, pace.speed.predict(share.positions) * float(random.lognormal(0, 0.1)))
                for pace, share in zip(paces, shares, strict=True)
            ]
            division_seconds += after - began
        if repetition:
            divided.append(1000 * division_seconds / STEPS)
            encoded.append(1000 * encoding_seconds / STEPS)
    both = tuple(a + b for a, b in zip(divided, encoded, strict=True))
    return [
        Figure(f"divide and gather a step, {NODES} nodes", "ms", tuple(divided)),
        Figure(f"encode a step, {NODES} nodes", "ms", tuple(encoded)),
        Figure(f"feed a step, {NODES} nodes, batch {BATCH_SIZE}", "ms", both, below=GOAL_MILLISECONDS),
    ]


def _tokens(folder: Path) -> TokenSet:
    """Rows as of chats: many short ones, a few long."""
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(5.5, 0.8, ROWS), 8, MAX_SEQ_LENGTH).astype(np.int32)
    folder.mkdir()
    writer = TokenSetWriter(folder, MAX_SEQ_LENGTH)
    writer.add(
        TokenisedChunk(
            tokens=random.integers(0, 32_000, int(lengths.sum())).astype(np.int32),
            lengths=lengths,
            spans=np.stack([np.ones_like(lengths), lengths], axis=1).ravel(),
            span_counts=np.ones_like(lengths),
            lines=np.arange(ROWS, dtype=np.int64),
            cut=0,
            dropped=0,
        )
    )
    writer.finish()
    return TokenSet(folder)
