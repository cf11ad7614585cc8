"""Runs side by side, as lines."""

from __future__ import annotations

from typing import Any

from coordinator.running.compare import Comparison
from coordinator.view.format import MISSING, duration_text, loss_text, one_line, shortened, size_text, speed_text

MOST_VALIDATIONS = 12
CELL_CHARACTERS = 40


def comparison_lines(found: Comparison) -> list[str]:
    """Runs side by side: a column for each."""
    shown = {
        "training_loss": loss_text, "validation": loss_text, "best_validation": loss_text,
        "tokens_per_second": speed_text, "seconds": duration_text, "peak_memory_bytes": size_text,
    }  # fmt: skip
    rows: list[tuple[str, list[str]]] = [("run", found.runs)]
    for name, values in found.figures.items():
        text = shown.get(name, _cell)
        rows.append((name.replace("_", " ").removesuffix(" bytes"), [_shown(text, value) for value in values]))
    rows += [(name, [_shown(_cell, value) for value in values]) for name, values in found.options.items()]
    steps = sorted(found.validations)
    # The first and the last, and some between.
    kept = sorted(
        {steps[i * (len(steps) - 1) // (MOST_VALIDATIONS - 1)] for i in range(MOST_VALIDATIONS)} if steps else ()
    )
    rows += [(f"validation at {step}", [loss_text(loss) for loss in found.validations[step]]) for step in kept]
    widths = [max(len(values[column]) for _, values in rows) for column in range(len(found.runs))]
    label = max(len(name) for name, _ in rows)
    return [
        f"{name:<{label}}  {'  '.join(f'{v:<{w}}' for v, w in zip(values, widths, strict=True))}".rstrip()
        for name, values in rows
    ]


def _shown(text: Any, value: Any) -> str:
    return MISSING if value is None else str(text(value))


def _cell(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{int(value):,}"
    return shortened(one_line(str(value)), CELL_CHARACTERS)
