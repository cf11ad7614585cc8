"""What would make a job fit: each known measure by itself, and the fewest of them together, recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coordinator.memory.architecture import architecture
from coordinator.memory.step import Estimate, EstimateOptions, estimate
from coordinator.memory.weights import Shapes, quantization

SHORTEST_ROWS = 256
SMALLEST_RANK = 4


@dataclass(frozen=True)
class Measure:
    """One way to need less memory.

    Attributes:
        name: what it does, in words.
        command: options of ``coordinator train``; for a quantized base the command that makes it comes first.
        options: the job with it.
        estimate: what the job then needs.
        fits: whether that is little enough.
    """

    name: str
    command: str
    options: EstimateOptions
    estimate: Estimate
    fits: bool


@dataclass(frozen=True)
class Advice:
    """How a job could fit.

    Attributes:
        measures: each by itself at the mildest value that fits, or at its strongest where none does.
        combined: the first of them together, as few as fit; where even all do not, all at their strongest.
    """

    measures: tuple[Measure, ...]
    combined: Measure | None

    @property
    def best(self) -> Measure | None:
        """The first single measure that suffices, else the combination if it does, else None."""
        single = next((measure for measure in self.measures if measure.fits), None)
        return single or (self.combined if self.combined is not None and self.combined.fits else None)


def advise(
    config: Mapping[str, Any],
    shapes: Shapes | None,
    options: EstimateOptions,
    available_bytes: int,
    model: str = "MODEL",
) -> Advice:
    """Find what makes a job fit, in the order: quantize, batch, layers, length, checkpointing, rank.

    Args:
        config: the model's configuration.
        shapes: of its tensors, or None.
        options: of the job that does not fit.
        available_bytes: what it may need.
        model: what the base model is called, for the commands.
    """

    def weigh(name: str, changed: EstimateOptions) -> Measure:
        found = estimate(config, shapes, changed)
        return Measure(name, command(options, changed, model), changed, found, found.total <= available_bytes)

    measures = []
    combined: Measure | None = None
    names: list[str] = []
    together = options
    for name, _ in _steps(config, options):
        alone = [weigh(name, changed) for changed in _values(config, options, name)]
        measures.append(next((measure for measure in alone if measure.fits), alone[-1]))
        if combined is None or not combined.fits:
            names.append(name)
            cumulative = [weigh(", ".join(names), changed) for changed in _values(config, together, name)]
            combined = next((measure for measure in cumulative if measure.fits), cumulative[-1])
            together = combined.options
    return Advice(tuple(measures), combined)


def command(before: EstimateOptions, after: EstimateOptions, model: str) -> str:
    """The options that turn one job into the other."""
    parts = []
    if after.bits is not None and after.bits != before.bits:
        quantized = f"{model.rstrip('/').rsplit('/', 1)[-1]}-{after.bits}bit"
        parts.append(f"mlx_lm.convert --hf-path {model} -q --q-bits {after.bits} --mlx-path {quantized}, then")
        parts.append(f"--model {quantized}")
    for flag, name in (
        ("--fine-tune-type", "fine_tune_type"),
        ("--batch-size", "batch_size"),
        ("--num-layers", "num_layers"),
        ("--max-seq-length", "max_seq_length"),
        ("--lora-rank", "rank"),
    ):
        if getattr(after, name) != getattr(before, name):
            parts.append(f"{flag} {getattr(after, name)}")
    if after.grad_checkpoint and not before.grad_checkpoint:
        parts.append("--grad-checkpoint")
    return " ".join(parts)


def _steps(config: Mapping[str, Any], options: EstimateOptions) -> Iterator[tuple[str, EstimateOptions]]:
    """The measures that change anything, in their order, each at its strongest."""
    for name in ("adapters instead of full", "quantize the base", "smaller batch", "fewer layers", "shorter rows",
                 "gradient checkpointing", "lower rank"):  # fmt: skip
        values = _values(config, options, name)
        if values:
            yield name, values[-1]


def _values(config: Mapping[str, Any], options: EstimateOptions, name: str) -> list[EstimateOptions]:
    """A job with one measure taken, from mild to strong; empty where it would change nothing."""
    full = options.fine_tune_type == "full"
    if name == "adapters instead of full":
        return [replace(options, fine_tune_type="lora")] if full else []
    if name == "quantize the base":
        quantized = quantization(config)[0] or options.bits
        return [] if quantized else [_quantized(options, bits) for bits in (8, 4)]
    if name == "smaller batch":
        smaller = [replace(options, batch_size=value) for value in _halved(options.batch_size, 1)]
        return [changed for changed in smaller if changed.rows_at_once < options.rows_at_once]
    if name == "fewer layers":
        layers = architecture(config).layers
        now = layers if options.num_layers < 0 else min(options.num_layers, layers)
        return [replace(options, num_layers=value) for value in _halved(now, min(4, now))]
    if name == "shorter rows":
        return [replace(options, max_seq_length=value) for value in _halved(options.max_seq_length, SHORTEST_ROWS)]
    if name == "gradient checkpointing":
        return [] if options.grad_checkpoint else [replace(options, grad_checkpoint=True)]
    return [] if full else [replace(options, rank=value) for value in _halved(options.rank, SMALLEST_RANK)]


def _quantized(options: EstimateOptions, bits: int) -> EstimateOptions:
    """With a quantized base, which only adapters can train on."""
    return replace(
        options, bits=bits, fine_tune_type="lora" if options.fine_tune_type == "full" else options.fine_tune_type
    )


def _halved(value: int, least: int) -> list[int]:
    """The value halved again and again down to the least."""
    found = []
    while value > least:
        value = max(value // 2, least)
        found.append(value)
    return found
