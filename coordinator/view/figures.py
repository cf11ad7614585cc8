"""Which curves and key figures a report shows, out of a run's record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from coordinator.view.charts import Chart, Curve
from coordinator.view.curves import mean_points, moving_mean, outline_points, smoothing_radius
from coordinator.view.format import GIB, duration_text, finite, loss_text, one_line, shortened, size_text, speed_text
from coordinator.view.machines import machine_charts
from coordinator.view.records import RunRecord

Tile = tuple[str, str, str]
MOST_MARKS = 40


def charts_of(record: RunRecord) -> list[Chart]:
    """Every chart that the run has figures for."""
    if not record.steps:
        return []
    found = [_loss(record), _learning_rate(record), _gradient_norm(record), _speed(record), _seconds(record)]
    memory = _memory(record) if len(record.nodes) < 2 else None
    return [chart for chart in [*found, *machine_charts(record), memory] if chart is not None]


def tiles_of(record: RunRecord) -> list[Tile]:
    """The key figures: (label, value, remark)."""
    tiles: list[Tile] = []
    loss = record.training_loss
    if loss is not None:
        beginning = f"mean of {record.report_interval:,} batches; at first {loss_text(record.first_training_loss)}"
        tiles.append(("Training loss", loss_text(loss), beginning))
    if record.validations:
        step, loss = min(record.validations, key=lambda pair: pair[1])
        last = record.validations[-1][1]
        tiles.append(("Best validation", loss_text(loss), f"at step {step:,}; last {loss_text(last)}"))
    if not record.steps:
        return tiles
    tokens, seconds = sum(record.known("tokens")), sum(record.known("seconds"))
    tiles.append(("Steps", f"{record.steps[-1]:,}", f"{tokens:,.0f} target tokens"))
    if seconds > 0:
        tiles.append(("Speed", speed_text(tokens / seconds), "tokens per second"))
        tiles.append(("Training time", duration_text(seconds), f"{duration_text(seconds / len(record.steps))} a step"))
    if len(record.nodes) > 1:
        tiles.append(("Machines", f"{len(record.nodes)}", f"{max(record.known('nodes'), default=0):.0f} at once"))
    peaks = record.known("peak_memory_bytes")
    if peaks:
        tiles.append(("Peak memory", size_text(max(peaks)), ""))
    return tiles


def _loss(record: RunRecord) -> Chart | None:
    losses = record.columns["loss"]
    training = raw_and_mean(record.steps, losses, _weights(record), "training, ")
    validations = [(float(step), loss) for step, loss in record.validations]
    curves = [*training, Curve("validation", "second", validations, sparse=True)] if validations else training
    if not curves:
        return None
    last = max(record.steps[-1], record.validations[-1][0] if record.validations else 0)
    missing = sum(not math.isfinite(loss) for loss in losses)
    remark = f"{missing:,} steps had no finite loss and are left out." if missing else ""
    marks = _marks(record)
    return Chart("loss", "Loss", "per token", curves, last, False, marks, remark, large=True)  # noqa: FBT003


def _learning_rate(record: RunRecord) -> Chart | None:
    points = mean_points(record.steps, record.columns["learning_rate"])
    return _chart(record, "rate", "Learning rate", "per step", [Curve("learning rate", "main", points)])


def _gradient_norm(record: RunRecord) -> Chart | None:
    values = record.columns["grad_norm"]
    curves = raw_and_mean(record.steps, values, [1.0] * len(values))
    return _chart(record, "norm", "Gradient norm", "before clipping", curves)


def _speed(record: RunRecord) -> Chart | None:
    tokens, seconds = record.columns["tokens"], record.columns["seconds"]
    speeds = [t / s if s > 0 else math.nan for t, s in zip(tokens, seconds, strict=True)]
    return _chart(record, "speed", "Speed", "target tokens per second", raw_and_mean(record.steps, speeds, seconds))


def _seconds(record: RunRecord) -> Chart | None:
    columns = record.columns
    rows = [
        (step, compute, mean if math.isfinite(mean) else compute, wait if math.isfinite(wait) else 0.0, whole)
        for step, compute, mean, wait, whole in zip(
            record.steps,
            *(columns["compute_seconds"], record.mean_compute, columns["wait_seconds"], columns["seconds"]),
            strict=True,
        )
        if math.isfinite(compute) and math.isfinite(whole)
    ]
    if len(rows) < 2:
        return None
    steps = [row[0] for row in rows]
    other = [max(whole - compute - wait, 0.0) for _, compute, _, wait, whole in rows]
    # Of several machines "compute" is the slowest one's: what is above the mean, the others spend waiting for it.
    parts = {
        "compute": ("area-1", [min(mean, compute) for _, compute, mean, _, _ in rows]),
        "waiting for the slowest": ("area-4", [max(compute - mean, 0.0) for _, compute, mean, _, _ in rows]),
        "network" if len(record.nodes) > 1 else "waiting for others": ("area-2", [wait for _, _, _, wait, _ in rows]),
        "other": ("area-3", other),
    }
    even, radius = [1.0] * len(rows), smoothing_radius(len(rows))
    curves = [
        Curve(label, look, mean_points(steps, moving_mean(values, even, radius)))
        for label, (look, values) in parts.items()
        if any(value > 0 for value in values)
    ]
    return _chart(record, "seconds", "Time per step", "seconds", curves)


def _memory(record: RunRecord) -> Chart | None:
    gigabytes = [value / GIB for value in record.columns["peak_memory_bytes"]]
    return _chart(
        record, "memory", "Peak memory", "GB", [Curve("peak memory", "main", mean_points(record.steps, gigabytes))]
    )


def _chart(record: RunRecord, key: str, title: str, unit: str, curves: Sequence[Curve]) -> Chart | None:
    drawn = [curve for curve in curves if curve.points]
    return Chart(key, title, unit, drawn, record.steps[-1]) if drawn else None


def raw_and_mean(
    steps: Sequence[int], values: Sequence[float], weights: Sequence[float], label: str = ""
) -> list[Curve]:
    """The values faintly and their moving mean above them; only the values where there are few."""
    raw = outline_points(steps, values)
    radius = smoothing_radius(len(values))
    if not raw:
        return []
    if not radius:
        return [Curve(label.rstrip(", ") or "each step", "main", raw)]
    smooth = mean_points(steps, moving_mean(values, weights, radius))
    return [Curve("each step", "raw", raw), Curve(f"{label}mean of {2 * radius + 1:,} steps", "main", smooth)]


def _weights(record: RunRecord) -> list[float]:
    return [tokens if tokens > 0 else 1.0 for tokens in record.columns["tokens"]]


def _marks(record: RunRecord) -> list[tuple[int, str]]:
    """Warnings and errors that say at which step they were."""
    marks: Iterable[tuple[float | None, str]] = (
        (finite(event.get("step")), shortened(one_line(str(event.get("message", ""))), 200))
        for event in record.events
        if event.get("level") in {"warning", "error"}
    )
    return [(int(step), text) for step, text in marks if step is not None][-MOST_MARKS:]
