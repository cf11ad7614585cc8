"""Causal attention for gradients: queries in parts, each against no more keys than it may see.

Where gradients are traced, MLX computes scores of all pairs of positions, half of which the mask then takes away, and
does the same on the way back. Of parts of the queries, the keys up to each part's last position are enough, and so is
the memory for those. The weights are kept; with the sum of output times its gradient in place of a sum over all of
them, as in Dao et al. 2022, "FlashAttention" (arXiv 2205.14135).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from node.attention import query_parts

# Without gradients MLX's own attention is better: it never holds scores on a GPU.
_for_gradients = ContextVar("for_gradients", default=False)
MOST_MASKS = 32


@contextlib.contextmanager
def for_gradients() -> Iterator[None]:
    """What is described in here is differentiated."""
    token = _for_gradients.set(True)
    try:
        yield
    finally:
        _for_gradients.reset(token)


def attend_in_parts(model: nn.Module) -> None:
    """Have the model's code call ``attention`` where it calls the function of ``mlx_lm`` that all its models share.

    In this process all models of these architectures do from now on; ``attention`` gives what that function does.
    """
    # A model's own file (``trust_remote_code``) is no module that Python knows; its functions have its names.
    namespaces = [getattr(type(module).__call__, "__globals__", {}) for _, module in model.named_modules()]
    for names in namespaces:
        if names.get("scaled_dot_product_attention") is base.scaled_dot_product_attention:
            names["scaled_dot_product_attention"] = attention


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """What ``mlx_lm.models.base.scaled_dot_product_attention`` gives, and by it where parts are of no use.

    Args:
        queries: (rows, heads, length, features).
        keys: (rows, key heads, length, features); each serves ``heads / key heads`` heads in a row.
        values: as the keys, of any width.
        cache: None while training.
        scale: of the scores.
        mask: ``causal``, or any other.
        sinks: scores of what nobody attends to.

    Returns:
        (rows, heads, length, features) of the values' width.
    """
    causal = isinstance(mask, str) and mask == "causal"
    if _for_gradients.get() and causal and cache is None and sinks is None:
        same = queries.dtype == keys.dtype == values.dtype and queries.shape[2] == keys.shape[2]
        parts = query_parts(queries.shape[2], gpu=mx.default_device().type == mx.gpu)
        if same and len(parts) > 1:
            return _in_parts(queries, keys, values, scale, parts)
    result: mx.array = base.scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )
    return result


def _in_parts(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, parts: list[tuple[int, int]]
) -> mx.array:
    rows, heads = queries.shape[:2]
    groups = keys.shape[1]

    def part_of(array: mx.array, start: int, end: int) -> mx.array:
        """(rows, groups, heads / groups x part, features): all that attend to the same keys are one matrix."""
        return array[:, :, start:end].reshape(rows, groups, -1, array.shape[-1])

    def by_head(array: mx.array) -> mx.array:
        return array.reshape(rows, heads, -1, array.shape[-1])

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        # They come as transposed views, which each product would copy again.
        queries, keys, values = scale * queries, mx.contiguous(keys), mx.contiguous(values)
        outputs, weights = [], []
        for start, end in parts:
            scores = part_of(queries, start, end) @ keys[:, :, :end].swapaxes(-1, -2)
            masked = scores.reshape(rows, groups, -1, end - start, end) + _mask(start, end, scores.dtype)
            weights.append(mx.softmax(masked, axis=-1, precise=True).reshape(scores.shape))
            outputs.append(by_head(weights[-1] @ values[:, :, :end]))
        return mx.concatenate(outputs, axis=2), *weights

    @attend.vjp
    def _(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        queries, (keys, values) = scale * primals[0], map(mx.contiguous, primals[1:])
        attended, weights = outputs[0], outputs[1:]
        gradient = mx.contiguous(cotangents[0])
        # Of each query: the sum over its keys of weights times their gradients.
        common = (gradient * attended).astype(mx.float32).sum(-1, keepdims=True).astype(gradient.dtype)
        of_queries: list[mx.array] = []
        of_keys = of_values = None
        # From the last part, whose keys are all of them: the sums have their full size from the start.
        for (start, end), weight in reversed(list(zip(parts, weights, strict=True))):
            given = part_of(gradient, start, end)
            of_weight = given @ values[:, :, :end].swapaxes(-1, -2)
            of_scores = weight * (of_weight - part_of(common, start, end))
            of_queries.append(by_head(of_scores @ keys[:, :, :end]))
            of_keys = _added(of_keys, of_scores.swapaxes(-1, -2) @ part_of(queries, start, end))
            of_values = _added(of_values, weight.swapaxes(-1, -2) @ given)
        assert of_keys is not None
        assert of_values is not None
        return scale * mx.concatenate(of_queries[::-1], axis=2), of_keys, of_values

    outputs: Any = attend(queries, keys, values)
    result: mx.array = outputs[0]
    return result


def _added(whole: mx.array | None, first: mx.array) -> mx.array:
    """The sum, where ``first`` is of the first positions only."""
    if whole is None:
        return first
    end = first.shape[2]
    return mx.concatenate([whole[:, :, :end] + first, whole[:, :, end:]], axis=2)


@functools.lru_cache(MOST_MASKS)
def _mask(start: int, end: int, dtype: mx.Dtype) -> mx.array:
    """(end - start, end) to add to the scores of queries from ``start`` on."""
    seen = np.arange(start, end)[:, None] >= np.arange(end)[None]
    # Evaluated: where a function is being compiled it is a constant, of that function and of the next.
    mask = mx.array(np.where(seen, 0, -np.inf).astype(np.float32)).astype(dtype)
    mx.eval(mask)
    return mask
