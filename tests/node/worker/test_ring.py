"""Several real workers as one group: the numbers of one, and a word when there is no sum.

What holds however they add up is tested for a real ring and for streams, which the test serves as a coordinator does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from node.errors import WorkerLost
from node.events import Copied, Heartbeat, Joined, Ready, ReduceEntered, RingFailed, StepDone, Synchronised
from node.info import Backend, GradientDtype
from node.reducer import LOG_NAME
from node.spec import (
    CopyState,
    JobSpec,
    Join,
    Leave,
    ModelSpec,
    OptimizerSpec,
    Probe,
    Rows,
    Setup,
    Share,
    TrainStep,
    TuningSpec,
)
from node.worker.adder import Limit, ReductionFailed, Rounding
from node.worker.reducer import Interrupt, ReducerAdder
from node.worker.ring import Ring, _bits, _from_bits, _Reader, _runs
from tests.fixtures.models import tiny_model
from tests.fixtures.ranks import Ranks, ranks, ring_specs
from tests.fixtures.training import as_rows, random_batches

LORA = TuningSpec(num_layers=-1, rank=4, scale=10.0, dropout=0.3, neftune_alpha=5.0)
ADAM = OptimizerSpec(learning_rate=1e-4, max_grad_norm=1.0)
STEPS = 3
BATCHES = random_batches(STEPS, rows=8, masked=True, seed=4)
DIVISIONS = {1: [8], 2: [6, 2], 3: [5, 0, 3]}
BACKENDS: tuple[Backend, ...] = ("ring", "grpc")
GRADIENT_DTYPES: tuple[GradientDtype, ...] = ("fp32", "bf16")
Parts = list[tuple[Rows, ...]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def divided(step: int, counts: list[int]) -> Parts:
    """The rows of a step, so many for each rank."""
    rows = BATCHES[(step - 1) % STEPS]
    parts: Parts = []
    first = 0
    for count in counts:
        parts.append((as_rows(rows[first : first + count], first),) if count else ())
        first += count
    return parts


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def reducers(group: Ranks, rank: int) -> list[int]:
    """Process ids of a worker's reducers."""
    listing = subprocess.run(
        ["ps", "--ppid", str(group.workers[rank].pid), "-o", "pid=,args="], capture_output=True, text=True, check=False
    ).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if "node.reducer" in line]


# Whose gradient travels in several runs.
LARGE = replace(LORA, rank=256, scale=1.0)


def test_a_large_gradient_is_cut_where_equal_parts_end() -> None:
    sizes = {f"{block}.{name}": size << 16 for block in (2, 1, 0) for name, size in (("a", 1), ("b", 3))}
    assert _runs(sizes, 1 << 30) == [["2.a", "2.b"], ["1.a", "1.b"], ["0.a", "0.b"]]
    assert _runs({name: 8 * size for name, size in sizes.items()}, 1 << 30) == [
        ["2.a", "2.b"], ["1.a", "1.b"], ["0.a"], ["0.b"]
    ]  # fmt: skip
    assert _runs(sizes, sum(sizes.values()) - 1) == [list(sizes)], "no room for all of it"
    assert _runs({name: size >> 3 for name, size in sizes.items()}, 1 << 30) == [list(sizes)], "too small"
    assert _runs({}, 1 << 30) == [[]]


@pytest.mark.parametrize(
    ("tuning", "optimizer"),
    [
        pytest.param(LORA, ADAM, id="adam"),
        pytest.param(LARGE, ADAM, id="adam, in runs"),
        pytest.param(LORA, OptimizerSpec(name="sgd", learning_rate=1e-3), id="sgd", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_gives_the_same_numbers(
    tuning: TuningSpec, optimizer: OptimizerSpec, model: Path, tmp_path: Path
) -> None:
    losses: dict[tuple[int, str], list[float]] = {}

    async def curve(group: Ranks, size: int) -> list[float]:
        found = []
        for step in range(1, STEPS + 1):
            done = await group.step(step, divided(step, DIVISIONS[size]), check=step == 2)
            assert len({(report.loss_sum, report.tokens, report.grad_norm) for report in done}) == 1
            found += [done[0].loss_sum / done[0].tokens, done[0].grad_norm]
        assert len({digested.sha256 for digested in await group.digests()}) == 1
        assert not any(isinstance(event, Synchronised) for heard in group.heard for event in heard)
        return found

    async def curves(size: int) -> None:
        async with ranks(size, tmp_path / str(size), model, tuning, optimizer) as group:
            if size == 1:
                losses[size, ""] = await curve(group, size)
            for backend in BACKENDS if size > 1 else ():
                await group.set_up()
                joined = await group.join(ring_specs(size, backend=backend))
                assert [(event.rank, event.size) for event in joined if isinstance(event, Joined)] == [
                    (rank, size) for rank in range(size)
                ]
                assert bool(reducers(group, 0)) == (backend == "ring")
                losses[size, backend] = await curve(group, size)

    for size in DIVISIONS:
        asyncio.run(curves(size))
    for size in (2, 3):
        for backend in BACKENDS:
            assert losses[size, backend] == pytest.approx(losses[1, ""], abs=1e-5, rel=1e-5)
    assert losses[2, "grpc"] == losses[2, "ring"], "a sum of two is the same in any order"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_accumulation_and_empty_shares_change_nothing(dtype: str, tolerance: float, tmp_path: Path) -> None:
    small = tiny_model(tmp_path / "model", "qwen2", dtype=dtype)
    tuning = replace(LORA, fine_tune_type="full", dropout=0.0)
    losses: dict[int, list[float]] = {}

    def parts(step: int, size: int) -> Parts:
        """The rows in micro-batches of two, dealt out in turn; the last rank of three gets none."""
        rows = BATCHES[step - 1]
        pairs = [as_rows(rows[first : first + 2], first, extra_padding=first) for first in range(0, len(rows), 2)]
        busy = min(size, 2)
        return [tuple(pairs[rank::busy]) if rank < busy else () for rank in range(size)]

    async def curve(size: int) -> None:
        async with ranks(size, tmp_path / str(size), small, tuning, ADAM) as group:
            if size > 1:
                await group.join(ring_specs(size))
            done = [(await group.step(step, parts(step, size), check=True))[0] for step in range(1, STEPS + 1)]
            assert len({digested.sha256 for digested in await group.digests()}) == 1
            assert not any(isinstance(event, Synchronised) for heard in group.heard for event in heard)
            losses[size] = [report.loss_sum / report.tokens for report in done]
            assert [report.tokens for report in done] == [
                sum(rows.target_tokens for share in parts(step, 1) for rows in share) for step in range(1, STEPS + 1)
            ]

    for size in (1, 2, 3):
        asyncio.run(curve(size))
    assert losses[2] == pytest.approx(losses[1], abs=tolerance)
    assert losses[3] == pytest.approx(losses[1], abs=tolerance)


@pytest.mark.parametrize("tuning", [pytest.param(LORA, id="at once"), pytest.param(LARGE, id="in runs")])
def test_rounded_gradients_change_little_and_no_loss_or_count(tuning: TuningSpec, model: Path, tmp_path: Path) -> None:
    """SGD without momentum: weights are the sum of all gradients, from which nothing may be missing in the end."""
    steps, sgd = 6, OptimizerSpec(name="sgd", learning_rate=1e-2)
    losses: dict[str, list[float]] = {}
    weights: dict[str, dict[str, mx.array]] = {}

    async def curve(name: str, group: Ranks, size: int) -> None:
        done = []
        for step in range(1, steps + 1):
            # A comparison of states makes the head longer, and must move no gradient from its place.
            reports = await group.step(step, divided(step, DIVISIONS[size]), check=step == 3, settle=step == steps)
            assert len({(report.loss_sum, report.tokens, report.grad_norm) for report in reports}) == 1
            assert reports[0].tokens == sum(rows.target_tokens for rows in divided(step, [8])[0])
            done.append(reports[0].loss_sum / reports[0].tokens)
        assert len({digested.sha256 for digested in await group.digests()}) == 1
        assert not any(isinstance(event, Synchronised) for heard in group.heard for event in heard)
        losses[name] = done
        await group.workers[0].send(CopyState(steps))
        copied = await group.until(0, Copied)
        arrays = mx.load(str(tmp_path / str(size) / "0" / copied.weights.name))
        assert isinstance(arrays, dict)
        weights[name] = arrays

    async def curves(size: int) -> None:
        async with ranks(size, tmp_path / str(size), model, tuning, sgd) as group:
            if size == 1:
                await curve("alone", group, size)
            for backend in BACKENDS if size > 1 else ():
                await group.set_up()
                await group.join(ring_specs(size, backend=backend, gradient_dtype="bf16"))
                await curve(f"{backend} {size}", group, size)

    for size in DIVISIONS:
        asyncio.run(curves(size))
    exact = weights.pop("alone")
    for name, found in weights.items():
        assert losses[name][0] == pytest.approx(losses["alone"][0], rel=1e-6)
        assert losses[name] == pytest.approx(losses["alone"], rel=1e-4)
        assert losses[name] != losses["alone"]
        moved = max(float(mx.abs(array).max().item()) for key, array in exact.items() if key.endswith("lora_b"))
        apart = max(float(mx.abs(array - exact[key]).max().item()) for key, array in found.items())
        assert apart < moved * 2**-9, name


def test_ranks_that_round_and_ranks_that_do_not_are_no_group(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            for backend in BACKENDS:
                one, other = ring_specs(2, backend=backend)
                failed = await group.join([one, replace(other, gradient_dtype="bf16")])
                assert all(isinstance(event, RingFailed) for event in failed)
                assert any("same arrays" in event.reason for event in failed if isinstance(event, RingFailed))

    run(work)


def test_a_rank_that_differs_is_put_right_before_the_update(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, seeds=[0, 0, 1]) as group:
            for backend, dtype in itertools.product(BACKENDS, GRADIENT_DTYPES):
                await group.set_up()
                await group.join(ring_specs(3, backend=backend, gradient_dtype=dtype))
                before = [digested.sha256 for digested in await group.digests()]
                assert before[0] == before[1] != before[2]
                group.heard = [[] for _ in group.workers]
                await group.step(1, divided(1, [3, 3, 2]), check=True)
                told = [[event for event in heard if isinstance(event, Synchronised)] for heard in group.heard]
                assert [len(events) for events in told] == [0, 0, 1]
                assert told[2][0].step == 1
                assert told[2][0].difference > 0.1
                assert len({digested.sha256 for digested in await group.digests()}) == 1
                await group.step(2, divided(2, [3, 3, 2]))
                assert len({digested.sha256 for digested in await group.digests()}) == 1, "moments are the same, too"

    run(work)


@pytest.mark.parametrize(
    ("tuning", "dtype"),
    [
        pytest.param(LORA, "fp32", id="fp32"),
        pytest.param(LORA, "bf16", id="bf16"),
        pytest.param(LARGE, "bf16", id="bf16, in runs"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_rank_fails_the_step_on_all_others_and_they_go_on_without_it(
    number: signal.Signals, tuning: TuningSpec, dtype: GradientDtype, model: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        async with ranks(3, tmp_path, model, tuning, ADAM) as group:
            await group.join(ring_specs(3, gradient_dtype=dtype))
            await group.step(1, divided(1, [3, 3, 2]))
            # Frozen or dead before its share comes: the others are in the reduction, and nothing tells them.
            for pid in (*reducers(group, 2), group.workers[2].pid):
                os.kill(pid, number)
            for rank, rows in enumerate(divided(2, [3, 3, 2])[:2]):
                await group.workers[rank].send(TrainStep(Share(2, rows, wait_seconds=3.0)))
                await group.workers[rank].send(TrainStep(Share(3, rows, wait_seconds=3.0)))
            failed = await group.all(RingFailed, among=[0, 1])
            assert {event.step for event in failed} == {2}
            assert not any(reducers(group, rank) for rank in (0, 1))
            joined = await group.join(ring_specs(2, gradient_dtype=dtype), among=[0, 1])
            assert all(isinstance(event, Joined) for event in joined), "the step after the failed one is passed over"
            for rank, rows in enumerate(divided(2, [4, 4])):
                await group.workers[rank].send(TrainStep(Share(2, rows)))
            assert {done.step for done in await group.all(StepDone, among=[0, 1])} == {2}

    run(work)


def test_a_newer_generation_ends_a_wait_at_once(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            for backend in BACKENDS:
                await group.set_up()
                await group.join(ring_specs(2, backend=backend, wait_seconds=1000.0))
                (rows, _) = divided(1, [8, 0])
                await group.workers[0].send(TrainStep(Share(1, rows)))
                await group.until(0, ReduceEntered)
                group.workers[0].cancel()
                await group.workers[0].send(Leave())
                failed = await group.until(0, RingFailed)
                assert (failed.step, failed.reason) == (1, "a newer generation")
                await group.workers[0].send(TrainStep(Share(1, rows)))
                assert (await group.until(0, StepDone)).step == 1, "alone, from the state before the step"

    run(work)


def test_a_sum_has_a_deadline(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            for step, backend in enumerate(BACKENDS, start=1):
                await group.join(ring_specs(2, backend=backend, wait_seconds=1000.0))
                (rows, _) = divided(step, [8, 0])
                await group.workers[0].send(TrainStep(Share(step, rows, wait_seconds=1.0)))
                failed = await group.until(0, RingFailed)
                assert (failed.step, failed.reason) == (step, "no sum within 1 s")
                joined = await group.join(ring_specs(2, backend=backend))
                assert all(isinstance(event, Joined) for event in joined), "what was left of the sum is dropped"
                await group.step(step, divided(step, [4, 4]))

    run(work)


def test_a_newer_generation_ends_the_forming_of_a_group(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(1, tmp_path, model, LORA, ADAM) as group:
            worker = group.workers[0]
            seen: set[int] = set()
            for _ in range(2):  # the first is given up for the second, the second for training alone
                worker.cancel()
                await worker.send(Join(ring_specs(2, form_seconds=1000.0)[0]))
                while not (new := set(reducers(group, 0)) - seen):
                    await group.until(0, Heartbeat)
                seen |= new
            worker.cancel()
            await worker.send(Leave())
            await worker.send(TrainStep(Share(1, *divided(1, [8]))))
            assert (await group.until(0, StepDone)).step == 1
            failed = [event for event in group.heard[0] if isinstance(event, RingFailed)]
            assert failed == [RingFailed(0, "a newer generation")] * 2
            assert not reducers(group, 0)

    run(work)


def test_ranks_that_train_something_else_are_refused(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            spec = TuningSpec(num_layers=-1, rank=5)
            job = JobSpec("job", str(tmp_path / "1"), ModelSpec(str(model)), 0, spec, ADAM)
            await group.workers[1].send(Setup(job))
            await group.until(1, Ready)
            for backend in BACKENDS:
                failed = await group.join(ring_specs(2, backend=backend))
                assert all(isinstance(event, RingFailed) for event in failed)
                assert any("same arrays" in event.reason for event in failed if isinstance(event, RingFailed))

    run(work)


def test_a_new_setup_leaves_the_group(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            await group.join(ring_specs(2))
            job = JobSpec("job", str(tmp_path / "0"), ModelSpec(str(model)), 0, LORA, ADAM)
            await group.workers[0].send(Setup(job))
            await group.until(0, Ready)
            assert not reducers(group, 0)
            await group.workers[1].send(TrainStep(Share(1, *divided(1, [8]))))
            assert (await group.until(1, RingFailed)).step == 1

    run(work)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint64, mx.int8, mx.bool_])
def test_any_array_survives_being_carried_in_floats(dtype: mx.Dtype) -> None:
    for shape in ((), (1,), (3, 5)):
        bits = np.random.default_rng(1).integers(0, 256, int(np.prod(shape)) * dtype.size, dtype=np.uint8)
        data = bits % 2 if dtype == mx.bool_ else bits
        array = mx.array(data).view(dtype).reshape(shape)
        back = _from_bits(_bits(array) + 0.0, array)
        assert (back.shape, back.dtype) == (array.shape, array.dtype)
        assert bytes(memoryview(back.reshape(-1).view(mx.uint8))) == data.tobytes()  # type: ignore[arg-type]


class Recording:
    """Adds nothing to what it is given, and remembers what it was asked for.

    Attributes:
        begun: first number, count and bytes in use above those before, of each sum.
    """

    def __init__(self, count: int) -> None:
        self.numbers = np.zeros(count, np.float32)
        self.begun: list[tuple[int, int, int]] = []
        self.finished = 0
        self.before = mx.get_active_memory()

    def begin(self, first: int, count: int, step: int, rounding: Rounding | None = None) -> None:
        assert (step, rounding) == (3, None)
        self.begun.append((first, count, mx.get_active_memory() - self.before))

    def finish(self, limit: Limit) -> None:
        assert limit.left > 0
        self.finished += 1


@pytest.mark.parametrize(("device", "ahead"), [(mx.cpu, 0), (mx.gpu, 1)], ids=["processor", "as on a GPU"])
def test_a_run_is_handed_over_before_all_are_computed(
    device: mx.DeviceType, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=device))
    size, blocks = 1 << 20, 4
    adder: Any = Recording(blocks * size + 3)
    ring = Ring(replace(ring_specs(2)[0], wait_seconds=9.0), adder, None, pytest.fail)  # type: ignore[arg-type]
    ring.prepare(Share(3, ()))
    gradients = {f"{block}.a": mx.full((2, size // 2), float(block)) for block in reversed(range(blocks))}
    computed: list[int] = []
    sums, loss, tokens = ring(gradients, mx.array(0.5), 5000, lambda: computed.append(adder.finished))
    assert [begun[:2] for begun in adder.begun] == [
        (0, size + 3),
        *((3 + run * size, size) for run in range(1, blocks)),
    ]
    assert all(used < (2 + ahead) * 4 * size for *_, used in adder.begun), "no more runs than these are there at a time"
    assert computed == [0], "who waits for others has told that it waits"
    assert adder.finished == blocks
    assert (loss, tokens, gradients) == (0.5, 5000, {})
    assert all(mx.array_equal(total, mx.full((2, size // 2), float(name[0]))) for name, total in sums.items())


def test_a_reducer_that_has_ended_has_said_why(tmp_path: Path) -> None:
    adder = ReducerAdder(9, Interrupt(os.open(os.devnull, os.O_RDONLY), lambda: False), tmp_path / "log")
    mine, theirs = socket.socketpair()
    adder._connection.close()
    adder._connection = mine
    try:
        theirs.sendall(b'{"summed": 4}\n{"error": "the link to a peer was lost"}\n')
        theirs.close()
        with pytest.raises(ReductionFailed, match=r"^the link to a peer was lost$"):
            adder.begin(4, 5, 1)
    finally:
        adder.kill()


def test_runs_of_numbers_are_taken_across_pieces_that_are_used_again() -> None:
    memory = np.zeros(4, np.float32)

    def pieces() -> Iterator[npt.NDArray[np.float32]]:
        for first in (0, 4, 8):
            memory[:] = np.arange(first, first + 4)
            yield memory[: 4 if first < 8 else 2]

    reader = _Reader(pieces())
    assert [reader.take(count).tolist() for count in (1, 2, 5, 0, 2)] == [[0], [1, 2], [3, 4, 5, 6, 7], [], [8, 9]]


def test_ranks_of_different_groups_do_not_become_one(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            for backend in BACKENDS:
                one, other = ring_specs(2, backend=backend)
                events = await group.join([one, replace(other, token=one.token + 5)])
                assert all(isinstance(event, RingFailed) for event in events)
                assert any("somebody else" in event.reason for event in events if isinstance(event, RingFailed))

    run(work)


def test_forming_has_a_limit_and_leaves_nobody_behind(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(1, tmp_path, model, LORA, ADAM) as group:
            for backend in BACKENDS:
                (event,) = await group.join(ring_specs(2, backend=backend, form_seconds=1.0)[:1])
                assert isinstance(event, RingFailed)
                assert event.reason == "the group did not form in 1 s"
                assert not reducers(group, 0)

    run(work)


@pytest.mark.parametrize("forming", [False, True])
def test_a_reducer_does_not_outlive_its_worker(forming: bool, model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            if forming:
                await group.workers[0].send(Join(ring_specs(2, form_seconds=3.0)[0]))
                while not reducers(group, 0):
                    await group.until(0, Heartbeat)
            else:
                await group.join(ring_specs(2))
            (reducer,) = reducers(group, 0)
            handle = os.pidfd_open(reducer)
            output = os.readlink(f"/proc/{reducer}/fd/2")
            os.kill(group.workers[0].pid, signal.SIGKILL)
            await _ended(handle)
            os.close(handle)
            # It has a log of its own, so that nothing in it passes for the worker's last words.
            assert output == str(tmp_path / "0" / LOG_NAME)
            with pytest.raises(WorkerLost, match=r"^the worker was killed by SIGKILL$"):
                await group.until(0, Joined)

    run(work)


async def _ended(handle: int) -> None:
    """Wait until the process behind a descriptor is gone."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(handle, ended.set)
    try:
        async with asyncio.timeout(20):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(handle)


def test_a_probe_leaves_no_trace(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM) as group:
            (rows,) = divided(1, [8])
            await group.workers[1].send(Probe(Share(1, rows), 2))
            for step in (1, 2):
                for worker in group.workers:
                    await worker.send(TrainStep(Share(step, *divided(step, [8]))))
            done = await group.all(StepDone)
            assert done[0].loss_sum == done[1].loss_sum
            first, second = await group.digests()
            assert first.sha256 == second.sha256

    run(work)
