"""What happens in which order: a pure function of the intervals. Steps count optimizer updates, intervals batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["validate", "train", "checkpoint"]


@dataclass(frozen=True)
class Action:
    """One thing to do, at a step: a validation or a checkpoint follows that step."""

    kind: Kind
    step: int


@dataclass(frozen=True)
class Program:
    """The order of a run.

    Attributes:
        total_iters: batches to train on.
        accumulation: batches in a step; the last step takes what is left.
        save_every, steps_per_eval, steps_per_report: intervals, in batches.
        validates: whether there is anything to validate on.
        local_steps: most steps of a round in which each machine of a fleet trains by itself; 1: there are no rounds.
    """

    total_iters: int
    accumulation: int
    save_every: int
    steps_per_eval: int
    steps_per_report: int
    validates: bool
    local_steps: int = 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.total_iters // self.accumulation)

    def iters(self, step: int) -> range:
        """The batches, from 1, that this step takes."""
        return range((step - 1) * self.accumulation + 1, min(step * self.accumulation, self.total_iters) + 1)

    def last_iter(self, step: int) -> int:
        """Batches trained on when this step is done."""
        return min(step * self.accumulation, self.total_iters)

    def step_of(self, iteration: int) -> int:
        """The step that takes this batch."""
        return -(-iteration // self.accumulation)

    def reports(self, step: int) -> bool:
        """Whether this step is worth a line."""
        return self._falls_in(self.steps_per_report, step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint belongs to this step."""
        return self._falls_in(self.save_every, step)

    def closes_round(self, step: int) -> bool:
        """Whether the machines' weights are brought together after this step.

        They are wherever all of them must have the same: for a validation, a checkpoint, at the end. Which steps these
        are does not depend on the machines, nor on where a run was resumed; when machines come or leave, a round ends
        sooner.
        """
        validates = self.validates and self._falls_in(self.steps_per_eval, step)
        return step % self.local_steps == 0 or self.saves(step) or validates or step == self.total_steps

    def actions(self, done: int, validated: int) -> Iterator[Action]:
        """Everything that is left.

        Args:
            done: the last step that was trained, 0 for none.
            validated: the last step that was validated, -1 for none.
        """
        if self.validates and validated < done and (done == 0 or self._falls_in(self.steps_per_eval, done)):
            yield Action("validate", done)
        for step in range(done + 1, self.total_steps + 1):
            yield Action("train", step)
            if self.validates and self._falls_in(self.steps_per_eval, step):
                yield Action("validate", step)
            if self.saves(step):
                yield Action("checkpoint", step)

    def _falls_in(self, interval: int, step: int) -> bool:
        batches = self.iters(step)
        return step == self.total_steps or batches[-1] // interval > (batches[0] - 1) // interval
