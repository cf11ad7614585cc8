"""A model in two parts, cut at the output of one of its modules.

Nothing here knows an architecture. While a part is computed, something stands in for the module at the cut: it notes
what the module gives, or it gives what it is told; all else is the model's own code, with its scales, caps and biases.
MLX computes nothing that is not asked for: what the other part would have done is described, and never runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class _StandIn:
    """In a module's place: its attributes are the module's, and calls are passed to ``call``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Reached(Exception):
    """The module at the cut has given its output: the way out of the model's code."""


class _Recorder(_StandIn):
    """Notes what the module gives; nothing follows it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.module(*args, **kwargs)
        raise _Reached


class _Given(_StandIn):
    """Gives ``output`` whatever it is asked."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.output


class Cut:
    """A model, cut where a module ends.

    Args:
        model: called with (rows, length) int32 token ids.
        parent: the module or list that holds the module.
        name: of the module in it.
        before: further places in ``parent`` that need not run after the cut, such as the blocks before one.
    """

    def __init__(self, model: nn.Module, parent: Any, name: Any, before: Sequence[Any] = ()) -> None:
        self._model = model
        self._parent = parent
        self._name = name
        self._before = before

    @classmethod
    def at(cls, model: nn.Module, path: Sequence[str]) -> Cut:
        """A cut where a module ends that lies on a path of names.

        Raises:
            KeyError: there is no module of this name.
        """
        *parents, name = path
        parent: Any = model
        for step in parents:
            parent = parent[step]
        if not isinstance(parent[name], nn.Module):
            raise KeyError(f"{'.'.join(path)} is no module")
        return cls(model, parent, name)

    @classmethod
    def at_block(cls, model: nn.Module, index: int) -> Cut:
        """A cut where one of the model's blocks ends, counted from 0.

        Raises:
            KeyError: the model holds its blocks in no list.
        """
        block = model.layers[index]  # which may be a part of the list, made for whoever asks
        for _, module in model.named_modules():
            for held in module.values():
                for place, item in enumerate(held if isinstance(held, list) else ()):
                    if item is block:
                        return cls(model, held, place, range(place))
        raise KeyError(f"block {index} is in no list")

    def before(self, inputs: mx.array) -> mx.array:
        """What the module gives for (rows, length) token ids."""
        recorder = _Recorder(self._parent[self._name])
        with self._in_place({self._name: recorder}), contextlib.suppress(_Reached):
            self._model(inputs)
        return recorder.output

    def after(self, output: mx.array) -> mx.array:
        """What the model makes of the module's ``output``, (rows, length, features)."""
        with self.given(output):
            return self._model(mx.zeros(output.shape[:2], mx.int32))

    @contextlib.contextmanager
    def given(self, output: mx.array) -> Iterator[None]:
        """Have the module give ``output``, whatever the model is called with: only its shape must fit."""
        stand_ins: dict[Any, _StandIn] = {}
        for name in (*self._before, self._name):
            stand_ins[name] = _Given(self._parent[name])
            stand_ins[name].output = output
        with self._in_place(stand_ins):
            yield

    @contextlib.contextmanager
    def _in_place(self, stand_ins: dict[Any, _StandIn]) -> Iterator[None]:
        # As items: as attributes, what is no module would leave the tree of parameters.
        for name, stand_in in stand_ins.items():
            self._parent[name] = stand_in
        try:
            yield
        finally:
            for name, stand_in in stand_ins.items():
                self._parent[name] = stand_in.module

    def holds(self, tokens: mx.array) -> bool:
        """Whether both parts together are the model, for (1, length) token ids, up to rounding."""
        # Of the model as it is: its code may ask what a block is, and a stand-in is none.
        whole, output = self._model(tokens), self.before(tokens)
        if not isinstance(output, mx.array) or output.ndim != 3:
            return False
        return close(self.after(output), whole)


def trains_only_blocks(model: nn.Module) -> bool:
    """Whether nothing outside the model's blocks is trained: neither what the head is made of, nor the embedding."""
    inside = {id(array) for block in model.layers for _, array in tree_flatten(block.trainable_parameters())}
    return all(id(array) in inside for _, array in tree_flatten(model.trainable_parameters()))


# What rounding may do where the same product is computed for another number of rows.
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2


def close(one: mx.array, other: mx.array) -> bool:
    """Whether two arrays are the same up to rounding; never where one of them is not finite."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    tolerance = TOLERANCE if one.dtype == mx.float32 else HALF_TOLERANCE
    most = mx.abs(other.astype(mx.float32)).max()
    difference = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max()
    return bool((difference <= tolerance * most).item())
