"""Rounds of local steps: the rule against one written out here, on real workers that add up as they do in a fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from node.errors import UserError
from node.events import Copied, Joined, LocalStepDone, ReduceEntered, RingFailed, StepDone, Synchronised
from node.info import Backend, GradientDtype
from node.spec import CopyState, OptimizerSpec, RoundPart, Share, TrainStep, TuningSpec
from node.worker.rounds import OUTER, OUTER_MOMENTUM, OUTER_RATE, Outer, RoundSums
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
            self.momentum[name] = 0.9 * self.momentum[name] + change
            self.start[name] = (began + 0.7 * (change + 0.9 * self.momentum[name])).astype(np.float32)
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


def test_where_a_round_is_settled_all_ranks_hold_one_state(model: Path, tmp_path: Path) -> None:
    async def moments_of(group: Ranks) -> list[Weights]:
        return [(await state_of(group, tmp_path, rank, 3))[1] for rank in range(3)]

    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, local_steps=3) as group:
            await group.join(ring_specs(3))
            done = await train(group, range(1, 4))
            own = await moments_of(group)
            weight = np.zeros(3)
            for step in range(1, 4):
                weight += [sum(rows.target_tokens for rows in part) for part in parts(step)]  # type: ignore[attr-defined]
            assert weight.sum() == sum(one.tokens for one in done[0])
            await group.set_up()
            await group.join(ring_specs(3))
            await train(group, range(1, 4), settle=True)
            settled = await moments_of(group)
            for name, array in settled[0].items():
                assert all((other[name] == array).all() for other in settled[1:]), name
                average = sum(part * other[name] for part, other in zip(weight / weight.sum(), own, strict=True))
                assert np.allclose(
                    array, np.round(average) if name.endswith("step") else average, rtol=1e-4, atol=1e-9
                ), name

    run(work)


def test_a_rank_that_differs_is_put_right_in_the_midst_of_a_round(model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with ranks(3, tmp_path, model, LORA, ADAM, seeds=[0, 0, 1], local_steps=3) as group:
            await group.join(ring_specs(3))
            await train(group, range(1, 4), check=True)
            told = [[event for event in heard if isinstance(event, Synchronised)] for heard in group.heard]
            assert [len(events) for events in told] == [0, 0, 1]
            assert len({digested.sha256 for digested in await group.digests()}) == 1
            await train(group, range(4, 6), check=True)
            assert sum(isinstance(event, Synchronised) for heard in group.heard for event in heard) == 1

    run(work)


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
    first = rule.update(start, RoundSums({"w": mx.array([10.0, 0.0])}, [0.0], [10]))
    assert np.allclose(np.array(first["w"]), [1 + OUTER_RATE * (1 + OUTER_MOMENTUM), 2])
    assert np.allclose(np.array(rule.arrays()[f"{OUTER}w"]), [1, 0])
    second = rule.update(first, RoundSums({"w": mx.zeros((2,))}, [0.0], [0]))
    assert np.allclose(np.array(second["w"] - first["w"]), [OUTER_RATE * OUTER_MOMENTUM**2, 0])
    with pytest.raises(UserError, match="does not fit"):
        rule.restore({f"{OUTER}other": mx.zeros((2,))})
