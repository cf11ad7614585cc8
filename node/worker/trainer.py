"""One optimizer step, written for many ranks.

Each rank adds up the sum of token losses and its gradient over its share. A reduction that is passed in adds the ranks
together; then every rank divides by the global number of target tokens, clips, and applies the same update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from node.errors import UserError
from node.events import ComputeStarted, Event, ReduceEntered, StepDone
from node.spec import OptimizerSpec, Rows, Share
from node.worker.loss import Batch, TokenLoss, pad
from node.worker.optimizer import Optimizer, learning_rates
from node.worker.prefix import Prefix
from node.worker.randomness import RowContext, row_keys

Arrays = dict[str, mx.array]


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

    Attributes:
        reduce: may be replaced between two steps, as when the ranks change.
        step: the last one applied.
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
    ) -> None:
        self._model = model
        self._spec = spec
        self._seed = seed
        self._context = context
        self._emit = emit
        self.reduce = reduce
        self._clear_cache_threshold = clear_cache_threshold
        self._rate_at = learning_rates(spec)
        self.loss = TokenLoss(model)
        self.prefix = Prefix.find(model, prefix_folder)
        self._parameters: dict[str, Any] = model.trainable_parameters()
        self._optimizer = Optimizer(spec, self._parameters)
        # On the CPU, compiling starts a C++ compiler for each shape and gains next to nothing.
        gradient = mx.value_and_grad(self._loss)
        self._gradient = Compiled(gradient) if mx.default_device().type == mx.gpu else gradient
        self.step = 0
        mx.eval(self._parameters, self._optimizer.arrays())

    def published(self) -> Published:
        """The state after the last applied step."""
        return Published(self.step, dict(tree_flatten(self._parameters)), self._optimizer.arrays())

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
        self._optimizer.restore(state.moments)
        self._parameters = tree_unflatten(list(state.parameters.items()))
        self._model.update(self._parameters)
        self.step = state.step
        mx.eval(self._parameters, self._optimizer.arrays())

    def run(self, share: Share) -> StepDone:
        """Apply one step: this rank's share of the global batch, summed with the other ranks'."""
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
