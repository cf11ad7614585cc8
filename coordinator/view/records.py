"""A run's folder as the report reads it: columns of figures, validations, events, configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.view.format import finite, number

COLUMNS = (
    *("loss", "tokens", "learning_rate", "grad_norm"),
    *("seconds", "compute_seconds", "wait_seconds", "nodes", "peak_memory_bytes"),
)


NODE_FIGURES = ("rows", "positions", "compute_seconds", "wait_seconds", "peak_memory_bytes")


@dataclass
class NodeRecord:
    """What one machine of several did.

    Attributes:
        rows: of each step of the run; 0 where it took no part.
        steps: it took part in.
        positions: input tokens, padding included, of all steps.
        compute_seconds, wait_seconds: of all steps.
        peak_memory_bytes: the highest.
    """

    rows: list[float]
    steps: int = 0
    positions: float = 0.0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    peak_memory_bytes: float = 0.0


@dataclass
class RunRecord:
    """What a run left behind.

    Attributes:
        steps: step numbers, rising.
        columns: one value per step and name; NaN where it is missing or no number.
        mean_compute: mean over the machines of their seconds of computing, per step; NaN where one trained alone.
        nodes: machines of the steps that several took, by name.
        validations: (step, loss), rising; only finite losses.
        events: the objects of ``events.jsonl``, samples excepted.
        samples: the events of kind ``sample``.
        config: the resolved configuration; empty when there is none.
        broken_lines: lines that could not be read: one is normal after a power loss.
    """

    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    mean_compute: list[float] = field(default_factory=list)
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    validations: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    broken_lines: int = 0

    def known(self, name: str) -> list[float]:
        """The finite values of a column."""
        return [value for value in self.columns[name] if math.isfinite(value)]


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder; what is missing or damaged in it is left out."""
    record = RunRecord()
    steps: dict[int, tuple[float, ...]] = {}
    validations: dict[int, float] = {}
    parts: dict[int, dict[str, tuple[float, ...]]] = {}
    for row in _rows(folder / "metrics.jsonl", record):
        step = finite(row.get("step"))
        if step is None:
            continue
        if "val_loss" in row:
            loss = finite(row["val_loss"])
            if loss is not None:
                validations[int(step)] = loss
        else:
            values = (number(row.get(name)) for name in COLUMNS)
            steps[int(step)] = tuple(math.nan if value is None else value for value in values)
            parts[int(step)] = _parts(row.get("per_node"))
    record.steps = sorted(steps)
    record.columns = {name: [steps[step][i] for step in record.steps] for i, name in enumerate(COLUMNS)}
    _fold_parts(record, parts)
    record.validations = sorted(validations.items())
    for event in _rows(folder / "events.jsonl", record):
        (record.samples if event.get("kind") == "sample" else record.events).append(event)
    record.config = read_options(folder / "config.yaml")
    return record


def _parts(per_node: object) -> dict[str, tuple[float, ...]]:
    """Each machine's figures of one step."""
    if not isinstance(per_node, dict):
        return {}
    return {
        name: tuple(finite(figures.get(key)) or 0.0 for key in NODE_FIGURES)
        for name, figures in per_node.items()
        if isinstance(figures, dict)
    }


def _fold_parts(record: RunRecord, parts: dict[int, dict[str, tuple[float, ...]]]) -> None:
    for index, step in enumerate(record.steps):
        for name, (rows, positions, compute, wait, peak) in parts[step].items():
            node = record.nodes.setdefault(name, NodeRecord([0.0] * len(record.steps)))
            node.rows[index] = rows
            node.steps += 1
            node.positions += positions
            node.compute_seconds += compute
            node.wait_seconds += wait
            node.peak_memory_bytes = max(node.peak_memory_bytes, peak)
        times = [figures[NODE_FIGURES.index("compute_seconds")] for figures in parts[step].values()]
        record.mean_compute.append(sum(times) / len(times) if times else math.nan)


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
