"""The training loss that every view shows, so that one run has but one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.view.format import finite, number

USUAL_INTERVAL = 10


@dataclass(frozen=True)
class Trained:
    """What one step says of the loss.

    Attributes:
        iteration: batches trained on when it was done.
        loss: mean over its target tokens; not always finite, None where it is unknown.
        tokens: target tokens.
    """

    iteration: float
    loss: float | None
    tokens: float

    @staticmethod
    def of(metrics: Mapping[str, Any]) -> Trained:
        """From an object of ``metrics.jsonl``."""
        iteration = finite(metrics.get("iter")) or finite(metrics.get("step")) or 0.0
        return Trained(iteration, number(metrics.get("loss")), finite(metrics.get("tokens")) or 1.0)


def report_interval(config: Mapping[str, Any]) -> int:
    """``--steps-per-report`` of a run's options, in batches."""
    return int(max(finite(config.get("steps_per_report")) or USUAL_INTERVAL, 1))


def in_interval(last: float, iteration: float, interval: int) -> bool:
    """Whether a step belongs to the report interval that ends with the batch ``last``."""
    return last - interval < iteration <= last


def training_loss(steps: Iterable[Trained], interval: int) -> float | None:
    """Mean over the target tokens of the last report interval; None where no loss is known.

    Args:
        steps: in rising order; those before the interval are left out.
        interval: see ``report_interval``.
    """
    known = list(steps)
    last = known[-1].iteration if known else 0.0
    counted = [step for step in known if step.loss is not None and in_interval(last, step.iteration, interval)]
    tokens = sum(step.tokens for step in counted)
    return sum((step.loss or 0.0) * step.tokens for step in counted) / tokens if tokens > 0 else None
