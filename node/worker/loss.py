"""The loss of some rows: the sum over target tokens, never a mean, so that parts add up to the whole."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from node.spec import Rows


@dataclass(frozen=True)
class Batch:
    """Padded arrays of one micro-batch.

    Attributes:
        inputs: (rows, length) int32 token ids.
        targets: (rows, length) int32 next tokens.
        mask: (rows, length) bool, true where the target counts.
        lengths: (rows,) int32 input positions of each row without padding.
    """

    inputs: mx.array
    targets: mx.array
    mask: mx.array
    lengths: mx.array


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
    return Batch(
        inputs=mx.array(tokens[:, :-1]),
        targets=mx.array(tokens[:, 1:]),
        mask=mx.array(mask[:, 1:]),
        lengths=mx.array(rows.lengths - 1),
    )


def loss_sum(model: nn.Module, batch: Batch) -> mx.array:
    """Sum of the cross-entropies of the target tokens, an fp32 scalar."""
    losses = nn.losses.cross_entropy(model(batch.inputs), batch.targets)
    return (losses.astype(mx.float32) * batch.mask).sum()
