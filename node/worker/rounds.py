"""Local steps: ranks train by themselves for a round, then go on from the average of what their weights changed by.

This is DiLoCo (Douillard et al. 2023, arXiv 2311.08105): an inner update rule on each rank, and Nesterov's rule on the
average change. Ranks weigh as much as the target tokens that they had in the round, so that a slow machine's few rows
count for what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from node.errors import UserError

# The paper's rate. Its momentum of 0.9 is for hundreds of rounds: over the few of a fine-tuning it runs past its goal
# (after six rounds a small model's validation loss was 1.9 times that of summed gradients; with 0.5, 0.97 times).
OUTER_RATE = 0.7
OUTER_MOMENTUM = 0.5
OUTER = "outer."
"""Before the names of the outer rule's momentum, among the moments of a state."""

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class LocalStep:
    """One step of a round, as this rank did it.

    Attributes:
        step: its number.
        loss: sum over the target tokens of this rank's share.
        tokens: so many of them.
        learning_rate: of the inner rule.
        grad_norm: of the mean gradient of this rank's share.
        seconds: in forward and backward.
        padded_tokens: input positions computed, padding included.
    """

    step: int
    loss: float
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    padded_tokens: int


@dataclass
class RoundSums:
    """What the ranks of a group did in a round.

    Attributes:
        changes: of the weights, by name: sum over ranks of the change times the rank's target tokens, fp32.
        losses: of each step, summed over its target tokens.
        tokens: target tokens of each step.
        ranks: how many there are.
    """

    changes: Arrays
    losses: list[float]
    tokens: list[int]
    ranks: int


class Outer:
    """Nesterov's rule on changes of weights. The momentum is fp32, and the same on all ranks.

    Args:
        parameters: what is trained, by name; fixes the shapes.
    """

    def __init__(self, parameters: Mapping[str, mx.array]) -> None:
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._momentum: Arrays = {}
        self.rest()

    def rest(self) -> None:
        """Begin anew, without momentum."""
        self._momentum = {name: mx.zeros(shape) for name, shape in self._shapes.items()}
        self._moves = False

    def rest_alone(self) -> None:
        """A machine trains alone: what a group's weights moved by says nothing of those that follow."""
        if self._moves:
            self.rest()

    def arrays(self) -> Arrays:
        """The momentum as named arrays, to save beside the inner rule's."""
        return {f"{OUTER}{name}": array for name, array in self._momentum.items()}

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Put back what ``arrays`` gave; nothing begins anew.

        Raises:
            UserError: the arrays belong to other trained layers.
        """
        if not arrays:
            self.rest()
            return
        momentum = {name.removeprefix(OUTER): array for name, array in arrays.items()}
        if {name: array.shape for name, array in momentum.items()} != self._shapes:
            raise UserError("the saved momentum of the rounds does not fit the layers that are trained here")
        self._momentum, self._moves = momentum, True

    def update(self, start: Mapping[str, mx.array], sums: RoundSums) -> Arrays:
        """Weights for the next round; nothing is evaluated yet.

        Args:
            start: weights that the round began with.
            sums: of the round; its changes are used up.
        """
        total = max(sum(sums.tokens), 1)
        after: Arrays = {}
        for name in list(sums.changes):
            change = sums.changes.pop(name) / total
            momentum = OUTER_MOMENTUM * self._momentum[name] + change
            self._momentum[name] = momentum
            weights = start[name].astype(mx.float32) + OUTER_RATE * (change + OUTER_MOMENTUM * momentum)
            after[name] = weights.astype(start[name].dtype)
        self._moves = True
        return after


def weighted_changes(start: Mapping[str, mx.array], now: Mapping[str, mx.array], tokens: int) -> Arrays:
    """This rank's part of ``RoundSums.changes``; nothing is evaluated yet."""
    return {name: (now[name].astype(mx.float32) - start[name].astype(mx.float32)) * tokens for name in sorted(now)}


def weighted_moments(moments: Mapping[str, mx.array], part: float) -> Arrays:
    """This rank's part of the average of all ranks' moments, fp32; ``part`` of the round's target tokens are its."""
    return {name: moments[name].astype(mx.float32) * part for name in sorted(moments)}


def averaged(total: mx.array, like: mx.array) -> mx.array:
    """The sum of weighted moments in their own type, evaluated; counts of steps are whole numbers."""
    average = (total if mx.issubdtype(like.dtype, mx.floating) else mx.round(total)).astype(like.dtype)
    mx.eval(average)
    return average


def inner_and_outer(moments: Mapping[str, mx.array]) -> tuple[Arrays, Arrays]:
    """Moments of a state, parted by the rule that they belong to."""
    inner = {name: array for name, array in moments.items() if not name.startswith(OUTER)}
    return inner, {name: array for name, array in moments.items() if name.startswith(OUTER)}
