"""What the ranks report of each step, put together: a step is done when all of its ranks have applied it. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from node.errors import TandemError
from node.events import StepDone


@dataclass(frozen=True)
class Applied:
    """A step that every rank, or every one that is left, has applied.

    Attributes:
        step: its number.
        reports: by machine; those that reported.
    """

    step: int
    reports: dict[str, StepDone]

    @property
    def first(self) -> StepDone:
        """One report: sums are the same in all of them."""
        return next(iter(self.reports.values()))

    @property
    def grad_norm(self) -> float:
        """The largest of any rank: one for all, but in a round of local steps, where each has its own."""
        norms = [report.grad_norm for report in self.reports.values()]
        return next((norm for norm in norms if not math.isfinite(norm)), max(norms))


def metrics_of(reports: Mapping[str, StepDone], rows: Mapping[str, int]) -> dict[str, Any]:
    """What stands in ``metrics.jsonl`` about a step's time and memory.

    ``compute_seconds`` is the slowest rank's, ``wait_seconds`` the shortest wait of any: that of the rank which the
    others waited for, so the network's alone.

    Args:
        reports: by name of the machine.
        rows: of each machine's share; of the only one of a run it need not be given. Who is left over of several is
            named as they were: what it did alone is its part, too.
    """
    done = reports.values()
    values: dict[str, Any] = {
        "seconds": max(report.seconds for report in done),
        "compute_seconds": max(report.compute_seconds for report in done),
        "wait_seconds": min(report.wait_seconds for report in done),
        "nodes": max(len(rows), 1),
        "peak_memory_bytes": max(report.peak_memory_bytes for report in done),
        "padded_tokens": sum(report.padded_tokens for report in done),
    }
    if any(rows):
        values["per_node"] = {name: _part(count, reports.get(name)) for name, count in rows.items()}
    return values


def _part(rows: int, report: StepDone | None) -> dict[str, Any]:
    """One machine's part of a step; of one that was lost before it could report, the rows: the sum has them."""
    if report is None:
        return {"rows": rows}
    return {
        "rows": rows,
        "positions": report.padded_tokens,
        "compute_seconds": report.compute_seconds,
        "wait_seconds": report.wait_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
    }


@dataclass
class Tally:
    """What a sitting of several machines has done so far.

    Attributes:
        rows: by machine.
        steps: number of them.
        seconds: of all of them.
    """

    rows: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    def add(self, rows: Mapping[str, int], seconds: float) -> None:
        """Count one step: rows by machine."""
        for name, count in rows.items():
            self.rows[name] = self.rows.get(name, 0) + count
        self.steps += 1
        self.seconds += seconds


@dataclass(frozen=True)
class Fault:
    """One disturbance, as the receipt tells it.

    Attributes:
        line: what happened.
        seconds: until the run went on.
        replayed: steps that were computed again.
    """

    line: str
    seconds: float
    replayed: int


@dataclass
class Ledger:
    """Reports of the steps that are under way.

    Args:
        size: number of ranks.
    """

    size: int
    _open: dict[int, dict[str, StepDone]] = field(default_factory=dict)

    def report(self, machine: str, done: StepDone) -> Applied | None:
        """Enter one rank's report; the step, once it is complete.

        Raises:
            TandemError: two ranks report different sums for one step.
        """
        reports = self._open.setdefault(done.step, {})
        for other in reports.values():
            if (other.loss_sum, other.tokens) != (done.loss_sum, done.tokens) and not _both_nan(other, done):
                raise TandemError(
                    f"the nodes disagree about step {done.step}: loss sums {other.loss_sum} and {done.loss_sum} over"
                    f" {other.tokens} and {done.tokens} tokens; go on with --resume, and report this"
                )
        reports[machine] = done
        if len(reports) < self.size:
            return None
        return Applied(done.step, self._open.pop(done.step))

    def close(self) -> list[Applied]:
        """Steps that only some ranks have reported, in order: whoever has applied a step has its whole sum."""
        left = [Applied(step, reports) for step, reports in sorted(self._open.items())]
        self._open.clear()
        return left


def _both_nan(one: StepDone, other: StepDone) -> bool:
    return one.loss_sum != one.loss_sum and other.loss_sum != other.loss_sum
