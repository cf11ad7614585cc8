"""Rounds of local steps: the rule against one written out here, on real workers that add up as they do in a fleet."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from node.errors import TandemError, UserError
from node.events import Copied, Joined, LocalStepDone, ReduceEntered, RingFailed, StepDone, Synchronised
from node.info import Backend, GradientDtype
from node.spec import CopyState, JobSpec, ModelSpec, OptimizerSpec, RoundPart, Share, TrainStep, TuningSpec
from node.worker.rounds import OUTER, OUTER_MOMENTUM, OUTER_RATE, LocalStep, Outer, RoundSums
from node.worker.trainer import Published
from tests.fixtures.models import tiny_model
from tests.fixtures.ranks import Ranks, ranks, ring_specs
from tests.fixtures.training import InProcess, as_rows, random_batches

ADAM = OptimizerSpec(learning_rate=1e-3, max_grad_norm=1.0)
LORA = TuningSpec(num_layers=-1, rank=4, scale=10.0, dropout=0.2)
# Rows of each rank; the second has none in every other step.
COUNTS = {1: [4, 2, 2], 0: [5, 0, 3]}
# Steps of rounds of at most three: the second is a short one.
PARTS: list[RoundPart] = ["open", "open", "close", "open", "close"]
BATCHES = random_batches(len(PARTS), rows=8, masked=True, seed=6)
Weights = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def share(step: int, rank: int) -> tuple[int, int]:
    """First row of a rank's part of a step, and the one after the last."""
    counts = COUNTS[step % 2]
    return sum(counts[:rank]), sum(counts[: rank + 1])


def parts(step: int, size: int = 3) -> list[tuple[object, ...]]:
    found = []
    for rank in range(size):
        first, end = share(step, rank)
        found.append((as_rows(BATCHES[step - 1][first:end], first),) if end > first else ())
    return found  # type: ignore[return-value]


def arrays_of(found: dict[str, mx.array]) -> Weights:
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


class Oracle:
    """Three trainers that know nothing of each other, and the outer rule by hand."""

    def __init__(self, model: Path) -> None:
        self.ranks = [InProcess(model, LORA, ADAM) for _ in range(3)]
        self.began = self.start = arrays_of(self.ranks[0].weights)
        self.momentum = {name: np.zeros_like(array) for name, array in self.start.items()}
        self.losses: list[float] = []

    def run(self) -> Oracle:
        tokens = np.zeros(3)
        for step, part in enumerate(PARTS, start=1):
            loss = 0.0
            for rank, runner in enumerate(self.ranks):
                first, end = share(step, rank)
                if end > first:
                    done = runner.step(as_rows(BATCHES[step - 1][first:end], first))
                    loss, tokens[rank] = loss + done.loss_sum, tokens[rank] + done.tokens
                else:
                    runner.trainer.step = step
            self.losses.append(loss)
            if part == "close":
                self._close(step, tokens / tokens.sum())
                tokens = np.zeros(3)
        return self

    def _close(self, step: int, weight: npt.NDArray[np.float64]) -> None:
        start, self.start = self.start, {}
        for name, began in start.items():
            ends = [np.array(runner.weights[name].astype(mx.float32)) for runner in self.ranks]
            change = sum(part * (end - began) for part, end in zip(weight, ends, strict=True))
            self.momentum[name] = 0.5 * self.momentum[name] + change
            self.start[name] = (began + 0.7 * (change + 0.5 * self.momentum[name])).astype(np.float32)
        for runner in self.ranks:
            moments = runner.trainer.published().moments
            runner.trainer.restore(Published(step, {name: mx.array(a) for name, a in self.start.items()}, moments))


async def state_of(group: Ranks, folder: Path, rank: int, step: int) -> tuple[Weights, Weights]:
    """Weights and moments of a worker."""
    await group.workers[rank].send(CopyState(step))
    copied = await group.until(rank, Copied)
    assert copied.step == step
    found = [mx.load(str(folder / str(rank) / ref.name)) for ref in (copied.weights, copied.optimizer)]
    assert all(isinstance(one, dict) for one in found)
    return arrays_of(found[0]), arrays_of(found[1])  # type: ignore[arg-type]


def inner(state: tuple[Weights, Weights]) -> Weights:
    """Moments that are the rank's own."""
    return {name: array for name, array in state[1].items() if not name.startswith(OUTER)}


async def train(group: Ranks, steps: range, **options: bool) -> list[list[StepDone]]:
    """What each rank reports of these steps."""
    for step in steps:
        part = PARTS[step - 1]
        closes = part == "close"
        told = {name: value for name, value in options.items() if closes}
        await group.send_step(step, parts(step), part=part, **told)  # type: ignore[arg-type]
    # One after the other, as sums over streams are served while all of them are listened to.
    rounds = [await group.all(StepDone) for _ in steps]
    return [list(mine) for mine in zip(*rounds, strict=True)]


def run(work: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(work())  # type: ignore[arg-type]


def apart(one: Weights, other: Weights) -> float:
    """Length of the difference."""
    assert set(one) == set(other)
    return float(np.sqrt(sum(np.square(one[name] - other[name]).sum() for name in one)))


@pytest.mark.parametrize("backend", ["ring", "grpc"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_rounds_do_what_is_written(
    backend: Backend, dtype: GradientDtype, tolerance: float, model: Path, tmp_path: Path
) -> None:
    oracle = Oracle(model).run()

    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, local_steps=3) as group:
            await group.join(ring_specs(3, backend=backend, gradient_dtype=dtype))
            done = await train(group, range(1, 6), check=True)
            assert [[(one.step, one.loss_sum, one.tokens) for one in mine] for mine in done[1:]] == [
                [(one.step, one.loss_sum, one.tokens) for one in done[0]]
            ] * 2, "all ranks report the same sums"
            assert [one.step for one in done[0]] == [1, 2, 3, 4, 5]
            assert [one.loss_sum for one in done[0]] == pytest.approx(oracle.losses, rel=tolerance)
            assert [one.tokens for one in done[0]] == [
                sum(rows.target_tokens for part in parts(step) for rows in part)  # type: ignore[attr-defined]
                for step in range(1, 6)
            ]
            assert [one.wait_seconds > 0 for one in done[0]] == [part == "close" for part in PARTS]
            assert len({digested.sha256 for digested in await group.digests()}) == 1
            assert not any(isinstance(event, Synchronised) for heard in group.heard for event in heard)
            told = [type(event) for event in group.heard[0] if isinstance(event, LocalStepDone | ReduceEntered)]
            assert told == [LocalStepDone, LocalStepDone, ReduceEntered, LocalStepDone, ReduceEntered]
            weights, moments = await state_of(group, tmp_path, 0, 5)
            moved = apart(oracle.start, oracle.began)
            assert apart(weights, oracle.start) < tolerance * moved
            outer = {name.removeprefix(OUTER): array for name, array in moments.items() if name.startswith(OUTER)}
            assert apart(outer, oracle.momentum) < tolerance * moved

    run(work)


def test_a_round_that_is_cut_off_is_done_again_from_its_beginning(model: Path, tmp_path: Path) -> None:
    oracle = Oracle(model).run()

    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, local_steps=3) as group:
            await group.join(ring_specs(3))
            await train(group, range(1, 4))
            await group.send_step(4, parts(4), part="open")  # type: ignore[arg-type]
            await group.all(LocalStepDone)
            assert {digested.step for digested in await group.digests()} == {3}, "what is held is the last round's end"
            # One rank never comes to the end.
            (rows,) = parts(5)[0]
            await group.workers[0].send(TrainStep(Share(5, (rows,), wait_seconds=1.0, round="close")))  # type: ignore[arg-type]
            failed = await group.until(0, RingFailed)
            assert failed.step == 5
            joined = await group.join(ring_specs(3))
            assert all(isinstance(event, Joined) for event in joined)
            await train(group, range(4, 6), check=True)
            assert not any(isinstance(event, Synchronised) for heard in group.heard for event in heard)
            weights, _ = await state_of(group, tmp_path, 1, 5)
            assert apart(weights, oracle.start) < 1e-4 * apart(oracle.start, oracle.began)

    run(work)


RULES = {name: OptimizerSpec(name=name, learning_rate=1e-3) for name in ("adafactor", "muon", "adamw", "sgd")}


def settled(backend: Backend, dtype: GradientDtype, optimizer: OptimizerSpec, name: str, *marks: Any) -> Any:
    return pytest.param(backend, dtype, optimizer, id=f"{name}, {dtype} over {backend}", marks=marks)


@pytest.mark.parametrize(
    ("backend", "dtype", "optimizer"),
    [
        settled("ring", "fp32", ADAM, "adam"),
        settled("grpc", "bf16", ADAM, "adam"),
        settled("ring", "bf16", replace(ADAM, loraplus_ratio=4.0), "LoRA+", pytest.mark.slow),
        settled("grpc", "fp32", RULES["sgd"], "sgd", pytest.mark.slow),
        *(settled("ring", "fp32", RULES[name], name, pytest.mark.slow) for name in ("adafactor", "muon", "adamw")),
    ],
)
def test_where_a_round_is_settled_all_ranks_hold_one_state(
    backend: Backend, dtype: GradientDtype, optimizer: OptimizerSpec, model: Path, tmp_path: Path
) -> None:
    async def states(group: Ranks, step: int) -> list[tuple[Weights, Weights]]:
        return [await state_of(group, tmp_path, rank, step) for rank in range(3)]

    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, optimizer, local_steps=3) as group:
            specs = partial(ring_specs, 3, backend=backend, gradient_dtype=dtype)
            await group.join(specs())
            done = await train(group, range(1, 4))
            own = [moments for _, moments in await states(group, 3)]
            weight = np.zeros(3)
            for step in range(1, 4):
                weight += [sum(rows.target_tokens for rows in part) for part in parts(step)]  # type: ignore[attr-defined]
            assert weight.sum() == sum(one.tokens for one in done[0])
            await group.set_up()
            await group.join(specs())
            await train(group, range(1, 4), settle=True)
            (weights, moments), *others = await states(group, 3)
            for other, theirs in others:
                assert apart(weights, other) == apart(moments, theirs) == 0
            for name, array in moments.items():
                average = sum(part * other[name] for part, other in zip(weight / weight.sum(), own, strict=True))
                expected = np.round(average) if name.endswith("step") else average
                tolerance = 2e-2 if dtype == "bf16" and name.startswith(OUTER) else 1e-4
                assert np.allclose(array, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()), name
            await train(group, range(4, 6), settle=True, check=True)
            assert not any(isinstance(event, Synchronised) for heard in group.heard for event in heard)

    run(work)


def test_a_rank_that_differs_is_put_right_in_the_midst_of_a_round(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, seeds=[0, 0, 1], local_steps=3) as group:
            await group.join(ring_specs(3))
            await train(group, range(1, 4), check=True)
            put_right = inner(await state_of(group, tmp_path, 2, 3))
            told = [[event for event in heard if isinstance(event, Synchronised)] for heard in group.heard]
            assert [len(events) for events in told] == [0, 0, 1]
            assert len({digested.sha256 for digested in await group.digests()}) == 1
            await train(group, range(4, 6), check=True)
            assert sum(isinstance(event, Synchronised) for heard in group.heard for event in heard) == 1
            # The same rank without a comparison: what it has for itself is what its own steps gave.
            await group.set_up()
            await group.join(ring_specs(3))
            await train(group, range(1, 4))
            left = inner(await state_of(group, tmp_path, 2, 3))
            assert apart(put_right, left) == 0

    run(work)


def test_a_round_takes_as_long_as_its_ranks_are_at_it(model: Path, tmp_path: Path) -> None:
    """Each rank is the slow one in another step: what the steps took adds up to the time of the clock."""

    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, local_steps=3) as group:
            await group.join(ring_specs(3))
            await train(group, range(1, 4))
            began = time.monotonic()
            done = await train(group, range(4, 6))
            wall = time.monotonic() - began
            for mine in done:
                assert 0.5 * wall < sum(one.seconds for one in mine) <= wall
                assert mine[0].seconds / mine[1].seconds == pytest.approx(mine[0].tokens / mine[1].tokens)

    run(work)


def test_steps_that_belong_to_no_round_of_the_group_are_refused(model: Path, tmp_path: Path) -> None:
    async def refused(group: Ranks, rank: int, *shares: Share) -> None:
        for share in shares:
            await group.workers[rank].send(TrainStep(share))
        failed = await group.until(rank, RingFailed)
        assert failed.step == shares[-1].step
        assert failed.reason == "a step of another kind than those of this group"

    async def work() -> None:
        async with ranks(2, tmp_path, model, LORA, ADAM, local_steps=3) as group:
            rows: Any = parts(1)[0]
            await refused(group, 0, Share(1, rows, round="close"))
            await group.join(ring_specs(2))
            await refused(group, 0, Share(1, rows, round="open"), Share(2, rows))
            await group.join(ring_specs(2))
            await refused(group, 1, *(Share(step, rows, round="open") for step in (1, 2, 3)))

    run(work)
    with pytest.raises(TandemError, match="no part of a round"):
        Share(1, (), round="ajar")  # type: ignore[arg-type]
    with pytest.raises(TandemError, match="at most 500"):
        JobSpec("job", "", ModelSpec("m"), local_steps=501)


def test_what_is_no_number_on_one_rank_is_told_by_all(model: Path) -> None:
    class Spoilt:
        def close_round(self, changes: dict[str, mx.array], steps: Sequence[LocalStep]) -> RoundSums:
            name = next(iter(changes))
            changes[name] = changes[name] * math.nan  # of another rank
            return RoundSums(dict(changes), [step.loss for step in steps], [step.tokens for step in steps], 2)

        def sums(self, arrays: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
            yield from arrays.items()

    runner = InProcess(model, LORA, ADAM, local_steps=2)
    runner.trainer.rounds = Spoilt()
    rows = as_rows(BATCHES[0])
    assert runner.trainer.run_local(Share(1, (rows,), round="open")) == ()
    first, last = runner.trainer.run_local(Share(2, (rows,), round="close"))
    assert math.isfinite(first.grad_norm)
    assert math.isnan(last.grad_norm)


def test_steps_alone_forget_the_momentum_of_a_group(model: Path) -> None:
    runner = InProcess(model, LORA, ADAM, local_steps=2)
    plain = InProcess(model, LORA, ADAM)
    state = runner.trainer.published()
    moving = {name: mx.ones_like(array) if name.startswith(OUTER) else array for name, array in state.moments.items()}
    runner.trainer.restore(replace(state, moments=moving))
    runner.run(BATCHES[:2])
    plain.run(BATCHES[:2])
    assert runner.losses == plain.losses
    left = {name: array for name, array in runner.trainer.published().moments.items() if name.startswith(OUTER)}
    assert left
    assert all(mx.abs(array).max().item() == 0 for array in left.values())
    # A state from before there were rounds is as good as one without momentum.
    runner.trainer.restore(plain.trainer.published())
    assert runner.trainer.published().moments.keys() == state.moments.keys()


def test_the_outer_rule() -> None:
    rule = Outer({"w": mx.zeros((2,))})
    start = {"w": mx.array([1.0, 2.0])}
    first = rule.update(start, RoundSums({"w": mx.array([10.0, 0.0])}, [0.0], [10], 1))
    assert np.allclose(np.array(first["w"]), [1 + OUTER_RATE * (1 + OUTER_MOMENTUM), 2])
    assert np.allclose(np.array(rule.arrays()[f"{OUTER}w"]), [1, 0])
    second = rule.update(first, RoundSums({"w": mx.zeros((2,))}, [0.0], [0], 1))
    assert np.allclose(np.array(second["w"] - first["w"]), [OUTER_RATE * OUTER_MOMENTUM**2, 0])
    with pytest.raises(UserError, match="does not fit"):
        rule.restore({f"{OUTER}other": mx.zeros((2,))})
