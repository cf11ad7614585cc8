"""A model in two parts, cut at the output of one of its modules.

Nothing here knows an architecture. While a part is computed, something stands in for the module at the cut: it notes
what the module gives, or it gives what it is told; all else is the model's own code, with its scales, caps and biases.
MLX computes nothing that is not asked for: what the other part would have done is described, and never runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _StandIn:
    """In a module's place: its attributes are the module's, and calls are passed to ``call``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Recorder(_StandIn):
    """Notes what the module gives."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.module(*args, **kwargs)
        return self.output


class _Given(_StandIn):
    """Gives ``output`` whatever it is asked."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.output


class Cut:
    """A model, cut where a module ends.

    Args:
        model: called with (rows, length) int32 token ids.
        path: names from the model down to the module.

    Raises:
        KeyError: there is no module of this name.
    """

    def __init__(self, model: nn.Module, path: tuple[str, ...]) -> None:
        self._model = model
        *parents, self._name = path
        parent: Any = model
        for name in parents:
            parent = parent[name]
        self._parent = parent
        if not isinstance(parent[self._name], nn.Module):
            raise KeyError(f"{'.'.join(path)} is no module")

    def both(self, inputs: mx.array) -> tuple[Any, Any]:
        """What the module and what the whole model give for (rows, length) token ids."""
        recorder = _Recorder(self._parent[self._name])
        with self._in_place(recorder):
            whole = self._model(inputs)
        return recorder.output, whole

    def before(self, inputs: mx.array) -> mx.array:
        """What the module gives for (rows, length) token ids."""
        return self.both(inputs)[0]

    def after(self, output: mx.array) -> mx.array:
        """What the model makes of the module's ``output``, (rows, length, features)."""
        given = _Given(self._parent[self._name])
        given.output = output
        with self._in_place(given):
            return self._model(mx.zeros(output.shape[:2], mx.int32))

    @contextlib.contextmanager
    def _in_place(self, stand_in: _StandIn) -> Iterator[None]:
        # As an item: as an attribute, what is no module would leave the tree of parameters.
        self._parent[self._name] = stand_in
        try:
            yield
        finally:
            self._parent[self._name] = stand_in.module
