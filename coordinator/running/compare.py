"""Runs side by side: what was asked for differently, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.running.known import STATES, Known
from coordinator.view.plain import jsonable
from coordinator.view.records import RunRecord, read_run

SAME_FOR_NOBODY = ("adapter_path", "save_path", "gguf_path", "export_peft", "resume_adapter_file")
"""Options that say where files go: they differ between any two runs."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; every list has one value for each run, None where it is unknown.

    Attributes:
        runs: their ids.
        options: those that are not the same for all.
        figures: what came of them, by name.
        validations: losses by step, of the steps at which at least two of them validated.
    """

    runs: list[str]
    options: dict[str, list[Any]]
    figures: dict[str, list[Any]]
    validations: dict[int, list[float | None]]

    def data(self) -> Any:
        """For programs."""
        return jsonable(
            {"runs": self.runs, "options": self.options, "figures": self.figures, "validations": self.validations}
        )


def compare(runs: Sequence[Known]) -> Comparison:
    """Read the files of runs, and lay them side by side."""
    records = [read_run(run.place) if run.place is not None else RunRecord() for run in runs]
    names = dict.fromkeys(name for record in records for name in record.config if name not in SAME_FOR_NOBODY)
    options = {name: [record.config.get(name) for record in records] for name in names}
    losses: list[dict[int, float]] = [dict(record.validations) for record in records]
    steps = sorted({step for one in losses for step in one})
    figures: dict[str, list[Any]] = {
        "state": [STATES[run.state] for run in runs],
        "steps": [record.steps[-1] if record.steps else None for record in records],
        "training_loss": [record.training_loss for record in records],
        "validation": [record.validations[-1][1] if record.validations else None for record in records],
        "best_validation": [min((loss for _, loss in record.validations), default=None) for record in records],
        "tokens": [_total(record, "tokens") for record in records],
        "tokens_per_second": [_ratio(record, "tokens", "seconds") for record in records],
        "seconds": [_total(record, "seconds") for record in records],
        "peak_memory_bytes": [
            max(record.known("peak_memory_bytes"), default=None) if record.steps else None for record in records
        ],
    }
    return Comparison(
        runs=[run.run for run in runs],
        options={name: values for name, values in options.items() if any(value != values[0] for value in values)},
        figures=figures,
        validations={
            step: [one.get(step) for one in losses] for step in steps if sum(step in one for one in losses) > 1
        },
    )


def _total(record: RunRecord, column: str) -> float | None:
    known = record.known(column) if record.steps else []
    return sum(known) if known else None


def _ratio(record: RunRecord, above: str, below: str) -> float | None:
    top, bottom = _total(record, above), _total(record, below)
    return top / bottom if top is not None and bottom else None
