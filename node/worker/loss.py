"""The loss of some rows: the sum over target tokens, never a mean, so that parts add up to the whole.

The logits of all positions are the largest thing that a step would hold: 4 bytes x vocabulary for each. Here they
exist only at positions that are targets, and only for some of them at a time, forwards and backwards in one go: with a
frozen head the gradient of the hidden states is known as soon as a part's logits are (as in Wijmans et al. 2024,
"Cut your losses in large-vocabulary language models", arXiv 2411.09009). Where a model cannot be cut before its head,
or trains it, the plain way is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from node.logits import rows_at_once
from node.spec import Rows
from node.worker.cut import Cut, close, trains_only_blocks

# Where the models of mlx-lm keep all that comes before the head.
BODIES = (("model",), ("transformer",), ("backbone",), ("language_model", "model"))
# Counts of targets are rounded up, by an eighth at most above 128, so that a run has few shapes.
FINEST_COUNT = 16


@dataclass(frozen=True)
class Batch:
    """Padded arrays of one micro-batch.

    Attributes:
        inputs: (rows, length) int32 token ids.
        lengths: (rows,) int32 input positions of each row without padding.
        positions: (n,) int32 where in the flattened inputs targets are predicted; filled up with zeros.
        targets: (n,) int32 the tokens that follow there.
        weights: (n,) fp32 1 for a target, 0 for what is filled up.
    """

    inputs: mx.array
    lengths: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array


def pad(rows: Rows) -> Batch:
    """Lay flat rows out as padded arrays. Padding is never a target."""
    count, length = len(rows.lengths), rows.padded_length
    tokens = np.zeros((count, length + 1), np.int32)
    mask = np.zeros((count, length + 1), np.bool_)
    token_start = span_start = 0
    for i, (n, spans) in enumerate(zip(rows.lengths.tolist(), rows.span_counts.tolist(), strict=True)):
        tokens[i, :n] = rows.tokens[token_start : token_start + n]
        token_start += n
        for start, end in rows.spans[span_start : span_start + 2 * spans].reshape(-1, 2).tolist():
            mask[i, start:end] = True
        span_start += 2 * spans
    found = np.flatnonzero(mask[:, 1:])
    filled = np.zeros(_rounded(len(found)), np.int32)
    filled[: len(found)] = found
    return Batch(
        inputs=mx.array(tokens[:, :-1]),
        lengths=mx.array(rows.lengths - 1),
        positions=mx.array(filled),
        targets=mx.array(tokens[:, 1:].reshape(-1)[filled]),
        weights=mx.array((np.arange(len(filled)) < len(found)).astype(np.float32)),
    )


def _rounded(count: int) -> int:
    step = max(FINEST_COUNT, 1 << max(0, count.bit_length() - 4))
    return max(1, -(-count // step)) * step


class TokenLoss:
    """Sums of the cross-entropies of target tokens, fp32 scalars.

    Args:
        model: as it is trained or evaluated; what is trainable in it does not change any more.

    Attributes:
        in_parts: whether the logits exist in parts only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = _find_head(model) if trains_only_blocks(model) else None
        self.in_parts = self._head is not None

    def __call__(self, batch: Batch) -> mx.array:
        """The sum, to take gradients of with regard to the model's parameters."""
        if self._head is None:
            return self._plain(batch)
        return _summed(self._head, _picked(self._head, batch), batch.targets, batch.weights)

    def value(self, batch: Batch) -> mx.array:
        """The sum alone."""
        if self._head is None:
            return self._plain(batch)
        hidden, total = _picked(self._head, batch), mx.array(0.0)
        for part in self._head.parts(hidden):
            logits = self._head(mx.depends([hidden[:, part]], [total])[0])
            losses, *_ = _cross_entropy(logits[0], batch.targets[part])
            total = total + (losses * batch.weights[part]).sum()
        return total

    def _plain(self, batch: Batch) -> mx.array:
        logits = self._model(batch.inputs)
        picked = logits.reshape(-1, logits.shape[-1])[batch.positions]
        return (nn.losses.cross_entropy(picked.astype(mx.float32), batch.targets) * batch.weights).sum()


@dataclass(frozen=True)
class _Head:
    """What makes logits of hidden states, with the model that it ends.

    Attributes:
        cut: of the model, before the head.
        rows_at_once: of which the logits may exist at a time.
    """

    cut: Cut
    rows_at_once: int

    def __call__(self, hidden: mx.array) -> mx.array:
        """(1, n, vocabulary) logits of (1, n, features) hidden states."""
        return self.cut.after(hidden)

    def parts(self, hidden: mx.array) -> list[slice]:
        """Slices of the rows, whose logits are to exist one after the other."""
        count, size = hidden.shape[1], self.rows_at_once
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _picked(head: _Head, batch: Batch) -> mx.array:
    """(1, n, features) hidden states at the positions that predict targets."""
    hidden = head.cut.before(batch.inputs)
    return hidden.reshape(-1, hidden.shape[-1])[batch.positions][None]


def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(n,) losses, and the probabilities as (n, vocabulary) exponentials over (n, 1) sums; all fp32."""
    logits = logits.astype(mx.float32)
    highest = logits.max(-1, keepdims=True)
    exponentials = mx.exp(logits - highest)
    sums = exponentials.sum(-1, keepdims=True)
    chosen = mx.take_along_axis(logits, targets[:, None], -1)
    return (mx.log(sums) + highest - chosen)[:, 0], exponentials, sums


def _summed(head: _Head, hidden: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """The sum of weighted losses of (1, n, features) hidden states, whose gradient is computed along with it."""
    parts = head.parts(hidden)

    def one(hidden: mx.array, part: slice) -> tuple[mx.array, mx.array]:
        def surrogate(hidden: mx.array) -> tuple[mx.array, mx.array]:
            # Its gradient is the loss's: the logits' own gradient is known in closed form, and taken as given.
            logits = head(hidden)
            losses, exponentials, sums = _cross_entropy(mx.stop_gradient(logits)[0], targets[part])
            weight = weights[part]
            rows = mx.arange(weight.shape[0])
            gradient = (exponentials * (weight[:, None] / sums)).at[rows, targets[part]].add(-weight)
            return (mx.stop_gradient(gradient.astype(logits.dtype)[None]) * logits).sum(), (losses * weight).sum()

        (_, loss), gradient = mx.value_and_grad(surrogate)(hidden)
        return loss, gradient

    @mx.custom_function
    def summed(hidden: mx.array) -> tuple[mx.array, mx.array]:
        total = mx.array(0.0)
        gradients: list[mx.array] = []
        for part in parts:
            piece = hidden[:, part]
            if gradients:
                # Without this all parts are described as independent, and live at once.
                piece = mx.depends([piece], [total, gradients[-1]])[0]
            loss, gradient = one(piece, part)
            total = total + loss
            gradients.append(gradient)
        return total, mx.concatenate(gradients, axis=1)

    @summed.vjp
    def _(primals: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
        return (outputs[1] * cotangents[0]).astype(primals.dtype)

    outputs: Any = summed(hidden)
    return outputs[0]


def _find_head(model: nn.Module) -> _Head | None:
    """The model's head, where logits of hidden states are found to be those that the whole model gives."""
    tokens = mx.arange(1, 9, dtype=mx.int32)[None]
    logits = model(tokens)
    for path in BODIES:
        try:
            cut = Cut.at(model, path)
        except KeyError:
            continue
        hidden = cut.before(tokens)
        if not isinstance(hidden, mx.array) or hidden.ndim != 3:
            continue
        # Of some positions in another order: nothing that the head does may depend on where a position stands.
        chosen = mx.array([6, 1, 4])
        if close(cut.after(hidden[:, chosen]), logits[:, chosen]):
            return _Head(cut, rows_at_once(logits.shape[-1], gpu=mx.default_device().type == mx.gpu))
    return None
