"""The update rule: an ``mlx.optimizers`` class with our learning rate set at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import build_schedule

from node.errors import UserError
from node.spec import OptimizerSpec

CLASSES = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def chooses_own_rate(spec: OptimizerSpec) -> bool:
    """Whether the rule takes no learning rate from outside: Adafactor (arXiv 1804.04235) with its relative steps."""
    return spec.name == "adafactor" and bool(spec.arguments.get("relative_step", True))


def learning_rates(spec: OptimizerSpec) -> Callable[[int], float]:
    """The learning rate of each step, counted from 1.

    A ``schedule`` is evaluated as ``mlx_lm`` does, at the number of updates made before. Without one, the rate rises
    linearly over the warm-up, reaches its peak at the warm-up's last step, and stays. Where the rule chooses its own
    rate, that is given, before Adafactor scales it by the size of each parameter.

    Raises:
        UserError: there is no such schedule.
    """
    if chooses_own_rate(spec):
        warming_up = bool(spec.arguments.get("warmup_init", False))
        return lambda step: min(1e-6 * step if warming_up else 1e-2, step**-0.5)
    if spec.schedule is not None:
        try:
            schedule = build_schedule(spec.schedule)
            float(schedule(mx.array(0)))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"lr_schedule {spec.schedule}: {error}; see the schedules of mlx.optimizers") from error
        return lambda step: float(schedule(mx.array(step - 1)))
    return lambda step: spec.learning_rate * min(1.0, step / max(spec.warmup_steps, 1))


class Optimizer:
    """One update rule, or two where LoRA+ asks for a faster ``lora_b``.

    Args:
        spec: what to build.
        parameters: the trainable parameters, a tree; fixes the shapes of the moments.

    Raises:
        UserError: an argument that the optimizer does not know.
    """

    def __init__(self, spec: OptimizerSpec, parameters: dict[str, Any]) -> None:
        self._ratio = spec.loraplus_ratio
        rules = 1 if spec.loraplus_ratio == 1 else 2
        try:
            made = [CLASSES[spec.name](learning_rate=spec.learning_rate, **spec.arguments) for _ in range(rules)]
        except TypeError as error:
            raise UserError(f"optimizer_config: {spec.name}: {error}") from error
        self._rules = made
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A.
        filters = [lambda path, _: not path.endswith("lora_b")] if rules == 2 else []
        self._optimizer = optim.MultiOptimizer(made, filters)
        self._optimizer.init(parameters)

    def update(self, parameters: dict[str, Any], gradients: dict[str, Any], learning_rate: float) -> dict[str, Any]:
        """New parameters, as a tree; nothing is evaluated yet."""
        for rule, factor in zip(self._rules, (1.0, self._ratio), strict=False):
            rule.learning_rate = learning_rate * factor
        updated: dict[str, Any] = self._optimizer.apply_gradients(gradients, parameters)
        return updated

    def arrays(self) -> dict[str, mx.array]:
        """The state as named arrays, to evaluate, copy or save."""
        return dict(tree_flatten(self._optimizer.state))

    def restore(self, arrays: dict[str, mx.array]) -> None:
        """Put back what ``arrays`` gave.

        Raises:
            UserError: the arrays belong to another optimizer or another set of parameters.
        """
        now = self.arrays()
        if set(now) != set(arrays) or any(now[name].shape != arrays[name].shape for name in now):
            raise UserError("the saved optimizer state does not fit this optimizer and these trained layers")
        for name, array in arrays.items():
            if mx.issubdtype(array.dtype, mx.floating) != mx.issubdtype(now[name].dtype, mx.floating):
                raise UserError(f"the saved optimizer state does not fit: {name} is of type {array.dtype}")
        self._optimizer.state = tree_unflatten(list(arrays.items()))
