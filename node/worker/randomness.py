"""Randomness that touches rows, keyed so that it does not depend on how a batch is divided.

Dropout and NEFTune noise are functions of (seed, step, row, position, layer). A row gets the same noise whether its
batch runs whole, in micro-batches, or on several machines, and however much padding its neighbours need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from node.errors import TandemError
from node.spec import Int32


class RowContext:
    """Which rows the model is looking at: set by the loss for each micro-batch, read by the layers below.

    Attributes:
        keys: (rows, 2) uint32 key of each row, or None outside training.
        lengths: (rows,) input positions of each row without padding.
    """

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.lengths: mx.array | None = None

    def position_keys(self, length: int, layer: int) -> mx.array:
        """One key for each position of each row, (rows, length, 2) uint32, different in every layer."""
        assert self.keys is not None
        rows = self.keys.shape[0]
        first = self.keys[:, 0:1] + mx.arange(length, dtype=mx.uint32)[None]
        second = mx.broadcast_to(self.keys[:, 1:2] + mx.array(layer, mx.uint32), (rows, length))
        return mx.stack([first, second], axis=-1)


def row_keys(seed: int, step: int, ids: Int32) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Keys of rows, (rows, 2) uint32, from the seed, the step and each row's place in the step's global batch."""
    digests = [hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest() for row in ids.tolist()]
    return np.frombuffer(b"".join(digests), "<u4").reshape(-1, 2)


def _draw(keys: mx.array, sample: Callable[[mx.array], mx.array]) -> mx.array:
    """``sample`` at each of (rows, length) keys."""
    return mx.vmap(mx.vmap(sample))(keys)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of the row and the position (Srivastava et al. 2014)."""

    def __init__(self, context: RowContext, probability: float, layer: int) -> None:
        super().__init__()
        self._context = context
        self._keep = 1.0 - probability
        self._layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements of ``x``: (rows, length, features), or the same with rows and length in one axis."""
        context = self._context
        if not self.training or context.keys is None:
            return x
        rows, features = context.keys.shape[0], x.shape[-1]
        length = x.size // (rows * features)
        if x.shape[:-1] not in ((rows, length), (rows * length,)):
            raise TandemError(f"--lora-dropout: a layer sees {x.shape}, which has no row axis; use 0 for this model")
        keys = context.position_keys(length, self._layer)
        mask = _draw(keys, lambda key: mx.random.bernoulli(self._keep, (features,), key=key))
        return x * mask.reshape(x.shape).astype(x.dtype) * (1.0 / self._keep)


def key_dropout(model: nn.Module, context: RowContext, probability: float) -> list[str]:
    """Put keyed dropout into every adapter layer, in place.

    Returns:
        Names of expert layers, whose inputs are sorted by expert and no longer by row: they get no dropout.
    """
    unkeyed = []
    adapters = [(name, module) for name, module in model.named_modules() if "lora_a" in module]
    for layer, (name, module) in enumerate(sorted(adapters, key=lambda item: item[0])):
        experts = module.lora_a.ndim > 2 or "Switch" in type(module).__name__
        if experts:
            unkeyed.append(name)
        module.dropout = nn.Identity() if experts or probability <= 0 else KeyedDropout(context, probability, layer)
    return unkeyed


def add_embedding_noise(model: nn.Module, context: RowContext, alpha: float) -> None:
    """Give the token embedding NEFTune's noise while training (Jain et al. 2023, arXiv 2310.05914), in place.

    The noise is uniform in ±alpha / sqrt(length · features). The module keeps its parameters and their names: only
    its class is replaced by a subclass, so that checkpoints look the same.
    """
    embeddings = [m for _, m in model.named_modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    if not embeddings:
        raise TandemError("--neftune-alpha: this model has no embedding layer to add noise to")
    embedding = max(embeddings, key=lambda module: module.weight.shape[0])
    plain = type(embedding)

    def noisy(self: nn.Module, tokens: mx.array) -> mx.array:
        x = plain.__call__(self, tokens)
        if not self.training or context.keys is None or context.lengths is None:
            return x
        length, features = x.shape[1], x.shape[2]
        # Layer numbers of dropout count from 0, so this stream is none of theirs.
        keys = context.position_keys(length, 1 << 30)
        noise = _draw(keys, lambda key: mx.random.uniform(-1.0, 1.0, (features,), key=key))
        amplitude = alpha / mx.sqrt(context.lengths.astype(mx.float32) * features)
        return x + (noise * amplitude[:, None, None]).astype(x.dtype)

    embedding.__class__ = type(plain.__name__, (plain,), {"__call__": noisy})
