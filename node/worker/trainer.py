"""One optimizer step, written for many ranks.

Each rank adds up the sum of token losses and its gradient over its share. A reduction that is passed in adds the ranks
together; then every rank divides by the global number of target tokens, clips, and applies the same update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from node.errors import UserError
from node.events import ComputeStarted, Event, LocalStepDone, ReduceEntered, StepDone
from node.spec import OptimizerSpec, RoundPart, Rows, Share
from node.worker.attention import for_gradients
from node.worker.loss import Batch, TokenLoss, pad
from node.worker.optimizer import Optimizer, learning_rates
from node.worker.prefix import Prefix
from node.worker.randomness import RowContext, row_keys
from node.worker.rounds import (
    Arrays,
    LocalStep,
    Outer,
    RoundSums,
    averaged,
    inner_and_outer,
    weighted_changes,
    weighted_moments,
)

__all__ = ["Arrays", "Compiled", "Published", "Reduction", "RoundReduction", "Trainer", "alone", "to_ask_for"]


class Reduction(Protocol):
    """Adds the ranks' sums together."""

    def __call__(
        self, gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]
    ) -> tuple[Arrays, float, int]:
        """The sums over all ranks of the gradients, the losses and the target tokens.

        Gradients and loss need not be evaluated yet. Gradients come in the order in which a backward pass knows them:
        those of the last block first. Their types are those of the parameters, or fp32, as each rank's number of
        micro-batches has it: what crosses the wire must be cast to one type by the reduction. The mapping that it
        returns belongs to the trainer, which empties it. ``computed`` is to be called once when all is evaluated,
        before other ranks are waited for.
        """


class RoundReduction(Protocol):
    """Adds up what the ranks of a group did in a round of local steps."""

    def close_round(self, changes: Arrays, steps: Sequence[LocalStep]) -> RoundSums:
        """The sums over all ranks. The mapping that is given is emptied.

        Args:
            changes: see ``rounds.weighted_changes``.
            steps: as this rank did them; of the same numbers on every rank.
        """

    def sums(self, arrays: Arrays) -> Iterator[tuple[str, mx.array]]:
        """Of these arrays over all ranks, as fp32, one by one in the mapping's order; the mapping is emptied."""


def alone(gradients: Arrays, loss: mx.array, tokens: int, computed: Callable[[], None]) -> tuple[Arrays, float, int]:
    """The reduction of a single rank: nothing to add."""
    mx.eval(loss, *to_ask_for(gradients.values()))
    computed()
    return gradients, loss.item(), tokens  # type: ignore[return-value]


def to_ask_for(gradients: Iterable[mx.array]) -> list[mx.array]:
    """Gradients in the order in which MLX is to be asked for them at once: that of the first block first.

    Asked for the other way about, it runs all blocks whose outputs were not kept again before it goes on with any.
    """
    return list(gradients)[::-1]


@dataclass(frozen=True)
class Published:
    """The trainable state after a step: evaluated arrays that nobody changes any more.

    Row randomness is a function of (seed, step, row), so the step is all of the random state there is.
    """

    step: int
    parameters: Arrays
    moments: Arrays = field(default_factory=dict)


@dataclass
class _Round:
    """Local steps whose round is not closed.

    Attributes:
        start: the state that it began with.
        began: when, by ``time.perf_counter``.
        steps: done so far.
    """

    start: Published
    began: float
    steps: list[LocalStep] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Target tokens of this rank."""
        return sum(step.tokens for step in self.steps)


class Compiled:
    """A function of arrays, compiled for the first few combinations of shapes that it is called with.

    Each combination holds buffers on the GPU as long as the program runs; without a bound long runs on rows of many
    lengths end in "Resource limit (499000) exceeded" (ml-explore/mlx issue 4464).

    Args:
        function: its first argument is a tree of arrays, always of the same shapes.
    """

    MOST = 32

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._compiled = mx.compile(function)
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, tree: Any, *arrays: mx.array) -> Any:
        """What the function gives."""
        shapes = tuple(array.shape for array in arrays)
        if shapes not in self.shapes:
            if len(self.shapes) >= self.MOST:
                return self._plain(tree, *arrays)
            self.shapes.add(shapes)
        return self._compiled(tree, *arrays)


class Trainer:
    """Holds what is trained and applies steps to it.

    Args:
        model: made trainable by ``tuning.make_trainable``.
        spec: the update rule.
        seed: keys the rows' randomness.
        context: the one that was given to ``make_trainable``.
        emit: takes the phase events.
        reduce: adds up the ranks; see ``Reduction``.
        clear_cache_threshold: bytes of cached memory above which the cache is cleared after a step; 0 never.
        prefix_folder: where outputs of the frozen blocks are kept for the next epoch; None keeps none.
        local_steps: most steps of a round; 1 where there are no rounds.

    Attributes:
        reduce: may be replaced between two steps, as when the ranks change.
        rounds: adds up rounds of local steps; None for a machine alone.
        local_steps: as given.
        step: the last one applied; of a round, when it is closed.
        loss: of the model's rows.
        prefix: the model's frozen blocks, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        seed: int,
        context: RowContext,
        *,
        emit: Callable[[Event], None],
        reduce: Reduction = alone,
        clear_cache_threshold: int = 0,
        prefix_folder: Path | None = None,
        local_steps: int = 1,
    ) -> None:
        self._model = model
        self._spec = spec
        self._seed = seed
        self._context = context
        self._emit = emit
        self.reduce = reduce
        self.rounds: RoundReduction | None = None
        self.local_steps = local_steps
        self._clear_cache_threshold = clear_cache_threshold
        self._rate_at = learning_rates(spec)
        self.loss = TokenLoss(model)
        self.prefix = Prefix.find(model, prefix_folder)
        self._parameters: dict[str, Any] = model.trainable_parameters()
        self._optimizer = Optimizer(spec, self._parameters)
        self._outer = Outer(dict(tree_flatten(self._parameters))) if local_steps > 1 else None
        self._round: _Round | None = None
        # On the CPU, compiling starts a C++ compiler for each shape and gains next to nothing.
        gradient = mx.value_and_grad(self._loss)
        self._gradient = Compiled(gradient) if mx.default_device().type == mx.gpu else gradient
        self.step = 0
        mx.eval(self._parameters, self._moments())

    @property
    def next_step(self) -> int:
        """The only step that may follow."""
        return (self._round.steps[-1].step if self._round is not None else self.step) + 1

    def published(self) -> Published:
        """The state after the last applied step; in a round, the one that it began with."""
        if self._round is not None:
            return self._round.start
        return Published(self.step, dict(tree_flatten(self._parameters)), self._moments())

    def shared(self) -> Published:
        """What of the state is the same on all ranks: with local steps not the inner rule's moments."""
        state = self.published()
        if self._outer is None:
            return state
        return Published(state.step, state.parameters, inner_and_outer(state.moments)[1])

    def adopt(self, shared: Published) -> None:
        """Take what others have in place of what ``shared`` gave; a round goes on, as one that began with it.

        Raises:
            UserError: as ``restore``.
        """
        if self._outer is None:
            self.restore(shared)
            return
        running = self._round
        start = self.published()
        local = self._parameters, self._optimizer.arrays()
        self.restore(Published(shared.step, shared.parameters, {**inner_and_outer(start.moments)[0], **shared.moments}))
        if running is not None:
            self._round = _Round(self.published(), running.began, running.steps)
            self._parameters = local[0]
            self._optimizer.restore(local[1])

    def is_over(self, part: RoundPart) -> bool:
        """Whether a round has as many steps as it can have, and this one would go on with it."""
        return part == "open" and self._round is not None and len(self._round.steps) >= self.local_steps - 1

    def abandon_round(self) -> None:
        """Go back to where the round began, if there is one."""
        if self._round is not None:
            self.restore(self._round.start)

    def _moments(self) -> Arrays:
        outer = self._outer.arrays() if self._outer is not None else {}
        return {**self._optimizer.arrays(), **outer}

    def restore(self, state: Published) -> None:
        """Go back (or on) to another step's state.

        Raises:
            UserError: the state belongs to other trained layers or another optimizer.
        """
        now = dict(tree_flatten(self._parameters))
        if set(now) != set(state.parameters) or any(now[name].shape != state.parameters[name].shape for name in now):
            raise UserError("the saved weights do not fit the layers that are trained here")
        for name, parameter in state.parameters.items():
            if not mx.issubdtype(parameter.dtype, mx.floating):
                raise UserError(f"the saved weights do not fit: {name} is of type {parameter.dtype}")
        inner, outer = inner_and_outer(state.moments)
        self._optimizer.restore(inner)
        if self._outer is not None:
            self._outer.restore(outer)
        self._parameters = tree_unflatten(list(state.parameters.items()))
        self._model.update(self._parameters)
        self.step = state.step
        self._round = None
        mx.eval(self._parameters, self._moments())

    def run(self, share: Share) -> StepDone:
        """Apply one step: this rank's share of the global batch, summed with the other ranks'."""
        if self._outer is not None:
            self._outer.rest_alone()
        started = computed = time.perf_counter()

        def entered() -> None:
            nonlocal computed
            computed = time.perf_counter()
            self._emit(ReduceEntered(share.step))

        self._emit(ComputeStarted(share.step))
        gradients, loss, tokens = self._accumulate(share)
        gradients, total_loss, total_tokens = self.reduce(gradients, loss, tokens, entered)
        reduced = time.perf_counter()
        learning_rate = self._rate_at(share.step)
        grad_norm = self._apply(gradients, total_tokens, learning_rate)
        self.step = share.step
        if 0 < self._clear_cache_threshold < mx.get_cache_memory():
            mx.clear_cache()
        return StepDone(
            step=share.step,
            loss_sum=total_loss,
            tokens=total_tokens,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            seconds=time.perf_counter() - started,
            compute_seconds=computed - started,
            wait_seconds=reduced - computed,
            peak_memory_bytes=mx.get_peak_memory(),
            padded_tokens=sum(len(rows.lengths) * rows.padded_length for rows in share.micro_batches),
        )

    def run_local(self, share: Share) -> tuple[StepDone, ...]:
        """Apply one step of a round to this rank's own weights; where it is the last, bring the ranks together.

        Returns:
            All steps of the round when it is closed; nothing before.

        Raises:
            Whatever ``rounds`` raises; then the state is the one that the round began with.
        """
        started = time.perf_counter()
        if self._round is None:
            self._round = _Round(self.published(), started)
        self._emit(ComputeStarted(share.step))
        gradients, loss, tokens = self._accumulate(share)
        mx.eval(loss, *to_ask_for(gradients.values()))
        seconds = time.perf_counter() - started
        rate, norm = self._rate_at(share.step), 0.0
        if tokens:  # without any, the rule would only forget
            norm = self._apply(gradients, tokens, rate)
        padded = sum(len(rows.lengths) * rows.padded_length for rows in share.micro_batches)
        value: float = loss.item()  # type: ignore[assignment]
        self._round.steps.append(LocalStep(share.step, value, tokens, rate, norm, seconds, padded))
        if 0 < self._clear_cache_threshold < mx.get_cache_memory():
            mx.clear_cache()
        if share.round == "open":
            self._emit(LocalStepDone(share.step, seconds, padded))
            return ()
        self._emit(ReduceEntered(share.step))
        try:
            return self._close_round(self._round, settle=share.settle)
        except BaseException:
            self.abandon_round()
            raise

    def _close_round(self, closing: _Round, *, settle: bool) -> tuple[StepDone, ...]:
        """Apply the average change of all ranks; with ``settle`` take the average of their moments, too."""
        assert self._outer is not None
        assert self.rounds is not None
        entered, began, steps, mine = time.perf_counter(), closing.began, closing.steps, closing.tokens
        own = dict(tree_flatten(self._parameters))
        sums = self.rounds.close_round(weighted_changes(closing.start.parameters, own, mine), steps)
        del own, closing
        total = sum(sums.tokens)
        if settle:
            inner = self._optimizer.arrays()
            parts = weighted_moments(inner, mine / total if total else 1 / sums.ranks)
            self._optimizer.restore({name: averaged(sum_, inner[name]) for name, sum_ in self.rounds.sums(parts)})
            del inner, parts
        waited = time.perf_counter() - entered
        start = self.published()  # the others' where this rank had another one
        length = sum((mx.abs(change).sum() for change in sums.changes.values()), mx.array(0.0))
        self._parameters = tree_unflatten(list(self._outer.update(start.parameters, sums).items()))
        del start
        self._round, self.step = None, steps[-1].step
        self._model.update(self._parameters)
        mx.eval(length, self._parameters, self._moments())
        # What is no number on any rank is none on all from here on; the norms are each rank's own.
        spoilt = not math.isfinite(length.item())  # type: ignore[arg-type]
        # Ranks drift apart within a round, and are together only at its ends: a step's time is its part of the whole.
        seconds = (time.perf_counter() - began) / max(total, 1)
        return tuple(
            StepDone(
                step=done.step,
                loss_sum=loss,
                tokens=tokens,
                learning_rate=done.learning_rate,
                grad_norm=math.nan if spoilt and done is steps[-1] else done.grad_norm,
                seconds=seconds * tokens,
                compute_seconds=done.seconds,
                wait_seconds=waited if done is steps[-1] else 0.0,
                peak_memory_bytes=mx.get_peak_memory(),
                padded_tokens=done.padded_tokens,
            )
            for done, loss, tokens in zip(steps, sums.losses, sums.tokens, strict=True)
        )

    def time(self, share: Share) -> float:
        """Seconds to compute a share's gradient; nothing is applied, nothing is kept."""
        started = time.perf_counter()
        gradients, loss, _ = self._accumulate(share, keep=False)
        mx.eval(loss, *to_ask_for(gradients.values()))
        return time.perf_counter() - started

    def _accumulate(self, share: Share, *, keep: bool = True) -> tuple[Arrays, mx.array, int]:
        """Sums of gradients (fp32 where there is more than one part), losses and target tokens of a share.

        The last part is not evaluated: who adds the ranks up may want some of it sooner than all.
        """
        loss = mx.array(0.0)
        gradients: Any = None
        self._model.train()
        for rows in share.micro_batches:
            if gradients is not None:
                mx.eval(loss, *to_ask_for(array for _, array in tree_flatten(gradients)))
            part_loss, part = self._micro_batch(share.step, rows, keep=keep)
            loss = loss + part_loss
            if len(share.micro_batches) > 1:
                part = tree_map(lambda g: g.astype(mx.float32), part)
            gradients = part if gradients is None else tree_map(mx.add, gradients, part)
            del part  # an array that somebody still refers to keeps its memory for itself
        # The gradient function leaves its own arrays in the model; the parameters are ours.
        self._model.update(self._parameters)
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self._parameters)
        # A tree's order depends on its history, and sums over all of it must round alike on every rank.
        named = dict(sorted(tree_flatten(gradients), key=lambda item: _last_block_first(item[0])))
        return named, loss, sum(rows.target_tokens for rows in share.micro_batches)

    def _micro_batch(self, step: int, rows: Rows, *, keep: bool) -> tuple[mx.array, Any]:
        batch = pad(rows)
        keys = mx.array(row_keys(self._seed, step, rows.ids))
        arrays = [batch.inputs, batch.lengths, batch.positions, batch.targets, batch.weights, keys]
        try:
            if self.prefix is not None:
                self._context.keys, self._context.lengths = keys, batch.lengths
                arrays.append(self.prefix.outputs(rows, batch.inputs, keep=keep))
            with for_gradients():
                result: tuple[mx.array, Any] = self._gradient(self._parameters, *arrays)
        finally:
            # Not before: with checkpointing the backward pass runs layers again, and they must draw the same noise.
            self._context.keys = self._context.lengths = None
        return result

    def _loss(self, parameters: Any, *arrays: mx.array) -> mx.array:
        batch, (keys, *below) = Batch(*arrays[:5]), arrays[5:]
        self._model.update(parameters)
        self._context.keys, self._context.lengths = keys, batch.lengths
        if self.prefix is None:
            return self.loss(batch)
        with self.prefix.cut.given(below[0]):
            return self.loss(batch)

    def _apply(self, gradients: Arrays, tokens: int, learning_rate: float) -> float:
        """Divide by the global token count, clip, update; one synchronisation with the device.

        MLX computes a result in its operand's memory where nothing else refers to the operand. So that gradients, old
        parameters and old moments give theirs, ``gradients`` is emptied, and no name here outlives its use.
        """
        types = {name: parameter.dtype for name, parameter in tree_flatten(self._parameters)}
        scale = 1.0 / max(tokens, 1)
        norm = scale * mx.sqrt(sum((mx.square(g.astype(mx.float32)).sum() for g in gradients.values()), mx.array(0.0)))
        factor = mx.array(scale)
        if self._spec.max_grad_norm > 0:
            factor = factor * mx.minimum(1.0, self._spec.max_grad_norm / (norm + 1e-6))
        means = {}
        for name in list(gradients):
            gradient = gradients.pop(name)
            means[name] = (gradient * factor).astype(_update_type(types[name]))
            del gradient
        updated = self._optimizer.update(self._parameters, tree_unflatten(list(means.items())), learning_rate)
        del means
        self._parameters = tree_map(lambda new, old: new.astype(old.dtype), updated, self._parameters)
        del updated
        self._model.update(self._parameters)
        mx.eval(norm, self._parameters, self._optimizer.arrays())
        return norm.item()  # type: ignore[return-value]


def _last_block_first(name: str) -> tuple[int, str]:
    """To sort names of parameters by: as a backward pass comes to them."""
    block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return -block, name


def _update_type(parameter: mx.Dtype) -> mx.Dtype:
    """The type to compute an update in: in fp16 Adam's epsilon and small squares are zero, and 0 / 0 follows."""
    return mx.float32 if parameter == mx.float16 else parameter
