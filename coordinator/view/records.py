"""A run's folder as the report reads it: columns of figures, validations, events, configuration."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.view.format import finite, number
from coordinator.view.losses import Trained, report_interval, training_loss

COLUMNS = (
    *("iter", "loss", "tokens", "learning_rate", "grad_norm"),
    *("seconds", "compute_seconds", "wait_seconds", "nodes", "peak_memory_bytes"),
)


NODE_FIGURES = ("rows", "positions", "compute_seconds", "wait_seconds", "peak_memory_bytes")


@dataclass
class NodeRecord:
    """What one machine of several did.

    Attributes:
        rows: of each step of the run; 0 where it took no part.
        compute, wait: its seconds of computing and of waiting in each step; NaN where it took no part or was lost.
        memory: its peak in bytes up to each step; NaN likewise.
        steps: it took part in.
        last_step: the last of them.
        positions: input tokens, padding included, of all steps.
        compute_seconds, wait_seconds: of all steps.
        peak_memory_bytes: the highest.
    """

    rows: array[float]
    compute: array[float]
    wait: array[float]
    memory: array[float]
    steps: int = 0
    last_step: int = 0
    positions: float = 0.0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    peak_memory_bytes: float = 0.0

    @staticmethod
    def absent(steps: int) -> NodeRecord:
        """A machine that took part in none of so many steps."""
        nothing = array("d", [math.nan]) * steps
        return NodeRecord(array("d", [0.0]) * steps, nothing[:], nothing[:], nothing[:])

    def take(self, step: int, part: tuple[float, ...] | None) -> None:
        """Enter one step's figures, or None where it took no part."""
        rows, positions, compute, wait, peak = part or (0.0, 0.0, math.nan, math.nan, math.nan)
        self.rows.append(rows)
        self.compute.append(compute)
        self.wait.append(wait)
        self.memory.append(peak or math.nan)
        if part is not None:
            self.steps += 1
            self.last_step = step
            self.positions += positions
            self.compute_seconds += finite(compute) or 0.0
            self.wait_seconds += finite(wait) or 0.0
            self.peak_memory_bytes = max(self.peak_memory_bytes, finite(peak) or 0.0)


@dataclass
class RunRecord:
    """What a run left behind.

    Attributes:
        steps: step numbers, rising.
        columns: one value per step and name; NaN where it is missing or no number.
        mean_compute: mean over the machines of their seconds of computing, per step; NaN where they are not known.
        nodes: machines by name; a run that none but one could take part in names none.
        validations: (step, loss), rising; only finite losses.
        events: the objects of ``events.jsonl``, samples excepted.
        samples: the events of kind ``sample``.
        config: the resolved configuration; empty when there is none.
        broken_lines: lines that could not be read: one is normal after a power loss.
    """

    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    mean_compute: list[float] = field(default_factory=list)
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    validations: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    broken_lines: int = 0

    @property
    def report_interval(self) -> int:
        """Batches between two reports."""
        return report_interval(self.config)

    @property
    def training_loss(self) -> float | None:
        """Mean over the target tokens of the last report interval."""
        return training_loss(self._trained(-self.report_interval, None), self.report_interval)

    @property
    def first_training_loss(self) -> float | None:
        """The same of the first report interval."""
        first = self._trained(0, self.report_interval)
        return training_loss([step for step in first if step.iteration <= self.report_interval], self.report_interval)

    def _trained(self, start: int, end: int | None) -> list[Trained]:
        """Some of the steps; each has a batch at least."""
        part = slice(start, end)
        columns = (self.columns[name][part] for name in ("iter", "loss", "tokens"))
        return [
            Trained.of({"step": step, "iter": iteration, "loss": finite(loss), "tokens": tokens})
            for step, iteration, loss, tokens in zip(self.steps[part], *columns, strict=True)
        ]

    def known(self, name: str) -> list[float]:
        """The finite values of a column."""
        return [value for value in self.columns[name] if math.isfinite(value)]

    def take_metrics(self, row: Mapping[str, Any]) -> None:
        """Enter one object of ``metrics.jsonl``; steps come in rising order."""
        step = finite(row.get("step"))
        if step is None:
            return
        if "val_loss" in row:
            loss = finite(row["val_loss"])
            if loss is not None:
                self.validations.append((int(step), loss))
            return
        self.steps.append(int(step))
        for name in COLUMNS:
            value = number(row.get(name))
            self.columns[name].append(math.nan if value is None else value)
        parts = _parts(row.get("per_node"))
        for name in parts.keys() - self.nodes.keys():
            self.nodes[name] = NodeRecord.absent(len(self.steps) - 1)
        for name, node in self.nodes.items():
            node.take(int(step), parts.get(name))
        times = [figures[NODE_FIGURES.index("compute_seconds")] for figures in parts.values()]
        times = [seconds for seconds in times if math.isfinite(seconds)]
        self.mean_compute.append(sum(times) / len(times) if times else math.nan)

    def take_event(self, event: dict[str, Any]) -> None:
        """Enter one object of ``events.jsonl``."""
        (self.samples if event.get("kind") == "sample" else self.events).append(event)


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder; what is missing or damaged in it is left out."""
    record = RunRecord()
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for row in _rows(folder / "metrics.jsonl", record):
        step = finite(row.get("step"))
        if step is None:
            continue
        if "val_loss" not in row:
            steps[int(step)] = row
        elif finite(row["val_loss"]) is not None:
            validations[int(step)] = row
    for rows in (steps, validations):
        for step in sorted(rows):
            record.take_metrics(rows[step])
    for event in _rows(folder / "events.jsonl", record):
        record.take_event(event)
    record.config = read_options(folder / "config.yaml")
    return record


def _parts(per_node: object) -> dict[str, tuple[float, ...]]:
    """Each machine's figures of one step."""
    if not isinstance(per_node, dict):
        return {}
    # Who was lost before it could report has rows only.
    unknown = dict.fromkeys(("compute_seconds", "wait_seconds", "peak_memory_bytes"), math.nan)
    return {
        name: tuple(
            unknown.get(key, 0.0) if key not in figures else finite(figures[key]) or 0.0 for key in NODE_FIGURES
        )
        for name, figures in per_node.items()
        if isinstance(figures, dict)
    }


def _rows(path: Path, record: RunRecord) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                record.broken_lines += 1


def read_options(path: Path) -> dict[str, Any]:
    """The options in a run's ``config.yaml``; empty where there are none."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
