"""What the demo shows of a run: a falling row of bars, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

from coordinator.stream import FAILED, FleetFormed, Noted, RunEvent, StepFinished, Tested, Validated

Say = Callable[[str], None]

BAR_PER_NAT = 8
# Of a fleet's life, what the demo shows although nothing is wrong.
SHOWN = ("nodes", "generation")


class Follower:
    """Collects the figures of a run and says some of them.

    Args:
        say: takes each line.
        every: say the loss of the first step, and the mean loss of so many steps after each of them.
    """

    def __init__(self, say: Say, every: int = 1) -> None:
        self.losses: list[float] = []
        self.validations: list[float] = []
        self.test: dict[str, float] = {}
        self._say = say
        self._every = every

    def handle(self, event: RunEvent) -> None:
        """See ``stream.Reader``."""
        match event:
            case StepFinished(metrics=metrics):
                self.losses.append(float(metrics["loss"]))
                step = len(self.losses)
                if step == 1 or step % self._every == 0:
                    recent = self.losses[-min(self._every, step) :] if step > 1 else self.losses
                    loss = sum(recent) / len(recent)
                    self._say(
                        f"    step {step:>3}  loss {loss:6.3f}  {'#' * max(1, round(BAR_PER_NAT * min(loss, 9)))}"
                    )
            case Validated(metrics=metrics):
                self.validations.append(float(metrics["val_loss"]))
                self._say(f"    validation  loss {self.validations[-1]:.3f}")
            case Tested(loss=loss):
                self.test = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
                self._say(f"    test: loss {loss:.3f}, perplexity {self.test['perplexity']:,.1f}")
            case FleetFormed(lines=lines):
                for line in lines:
                    self._say(f"    {line}")
            case Noted(kind=kind, level=level, message=message) if kind != FAILED:
                if level != "info" or kind in SHOWN:
                    self._say(f"    {message}")

    def close(self) -> None:
        """See ``stream.Reader``."""
