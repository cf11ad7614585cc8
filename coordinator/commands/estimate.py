"""``coordinator estimate``: the memory of each method on this machine, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import Any

import click

from coordinator.config import OPTIMIZERS
from coordinator.estimate import Advice, Estimate, EstimateOptions, advise
from coordinator.estimate import estimate as estimate_memory
from coordinator.estimate.architecture import architecture, has_experts
from coordinator.estimate.weights import quantization
from coordinator.models import Peek, peek
from coordinator.preflight import memory_limit
from node.hardware import GIB, Facts, default_gpu_memory, describe, facts
from node.sizes import parse_size, show_size

COMFORTABLE = 0.8
"""Part of the limit up to which a job leaves the system room."""
_COLOURS = {"green": "green", "yellow": "yellow", "red": "red"}


@dataclass(frozen=True)
class Line:
    """One method: what it needs and how that looks on the machine (``green``, ``yellow``, ``red`` or ``unknown``)."""

    method: str
    options: EstimateOptions
    needed: Estimate
    verdict: str


@click.command(help="Estimate the memory of a training job without loading the model.")
@click.option("--model", required=True, help="Model: a Hugging Face repo or a local folder.")
@click.option("--fine-tune-type", type=click.Choice(["lora", "dora", "full"]), default="lora", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--max-seq-length", type=click.IntRange(2), default=2048, show_default=True, help="Of the longest row.")
@click.option("--num-layers", "--lora-layers", type=click.IntRange(-1), default=16, show_default=True, help="-1 all.")
@click.option("--lora-rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adam", show_default=True)
@click.option("--grad-checkpoint", is_flag=True, help="Recompute activations.")
@click.option("--memory", help="Of another Mac, as 16GB, instead of this machine's.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def estimate(model: str, memory: str | None, as_json: bool, **chosen: Any) -> None:
    """Show the table."""
    chosen["rank"] = chosen.pop("lora_rank")
    options = EstimateOptions(**chosen)
    seen = peek(model)
    machine = _machine(memory)
    limit = memory_limit(machine)
    lines = [_line(seen, name, changed, limit) for name, changed in methods(seen, options)]
    mine = _line(seen, "chosen", options, limit)
    advice = None
    if limit is not None and mine.verdict in {"yellow", "red"}:
        advice = advise(seen.config, seen.shapes, options, int(limit * COMFORTABLE), model)
    if as_json:
        click.echo(json.dumps(_as_data(seen, machine, lines, mine, advice), indent=2))
    else:
        _show(seen, machine, lines, mine, advice)


def methods(seen: Peek, options: EstimateOptions) -> list[tuple[str, EstimateOptions]]:
    """The methods that this model can be trained by, by name."""
    bits, _ = quantization(seen.config)
    found = [
        ("lora 4-bit", replace(options, fine_tune_type="lora", bits=4)),
        ("lora", replace(options, fine_tune_type="lora")),
        ("dora", replace(options, fine_tune_type="dora")),
        ("full", replace(options, fine_tune_type="full")),
    ]
    if bits:
        found = [
            (f"lora {bits}-bit", replace(options, fine_tune_type="lora")),
            (f"dora {bits}-bit", replace(options, fine_tune_type="dora")),
        ]
    # Experts have no DoRA in mlx_lm.
    return [(name, chosen) for name, chosen in found if not (name.startswith("dora") and has_experts(seen.config))]


def _machine(memory: str | None) -> Facts:
    """This machine, or a Mac with so much memory of which nothing is known but that."""
    if memory is None:
        return facts()
    total = parse_size(memory, "--memory")
    return replace(
        facts(),
        name=f"a Mac with {total / GIB:.0f} GB",
        chip=None,
        total_memory_bytes=total,
        free_memory_bytes=None,
        gpu_memory_bytes=default_gpu_memory(total),
        os=None,
    )


def _line(seen: Peek, method: str, options: EstimateOptions, limit: int | None) -> Line:
    needed = estimate_memory(seen.config, seen.shapes, options)
    if limit is None:
        return Line(method, options, needed, "unknown")
    verdict = "red" if needed.total > limit else "yellow" if needed.total > limit * COMFORTABLE else "green"
    return Line(method, options, needed, verdict)


def _show(seen: Peek, machine: Facts, lines: list[Line], mine: Line, advice: Advice | None) -> None:
    model, options = architecture(seen.config), mine.options
    bits, _ = quantization(seen.config)
    source = "exact, from its files" if mine.needed.exact_weights else "estimated from config.json"
    layers = model.layers if options.num_layers < 0 else min(options.num_layers, model.layers)
    click.echo(
        f"{seen.name}: {model.model_type}, {model.layers} layers, {mine.needed.parameters / 1e9:.2f} B parameters"
        f"{f', {bits}-bit' if bits else ''}; size of the weights {source}"
    )
    click.echo(
        f"batch {options.batch_size}, rows of {options.max_seq_length} tokens, {layers} layers trained,"
        f" rank {options.rank}, {options.optimizer}{', gradient checkpointing' if options.grad_checkpoint else ''}\n"
    )
    click.echo(f"{'GB':<12}{'weights':>9}{'trained':>9}{'layers':>9}{'loss':>9}{'rest':>9}{'total':>9}")
    for line in lines:
        click.echo(f"{line.method:<12}{_numbers(line.needed)}  {_verdict(line.verdict)}")
    limit = memory_limit(machine)
    room = "memory unknown" if limit is None else f"{show_size(limit)} for training"
    click.echo(f"\n{describe(machine) if machine.chip else machine.name}: {room}")
    shorter = estimate_memory(seen.config, seen.shapes, replace(options, max_seq_length=512)).total
    if options.max_seq_length > 512:
        click.echo(f"{options.fine_tune_type} with rows of at most 512 tokens: {show_size(shorter)}")
    if mine.verdict in {"yellow", "red"} and options.batch_size > 1:
        alone = estimate_memory(seen.config, seen.shapes, replace(options, micro_batch_rows=1)).total
        click.echo(f"computed one row at a time, as train does by itself where memory is short: {show_size(alone)}")
    if advice is not None:
        _show_advice(advice)


def _show_advice(advice: Advice) -> None:
    click.echo("\nTo need less, any of:")
    for measure in advice.measures:
        mark = "enough" if measure.fits else "not enough alone"
        click.echo(f"  {measure.name}: {show_size(measure.estimate.total)}, {mark}\n    {measure.command}")
    together, best = advice.combined, advice.best
    if best is None and together is not None:
        click.echo(f"Even all of them need {show_size(together.estimate.total)}: take a smaller model")
    elif best is together and best is not None:
        click.echo(f"Together ({best.name}): {show_size(best.estimate.total)}\n    {best.command}")


def _numbers(needed: Estimate) -> str:
    trained = needed.trainable_bytes + needed.optimizer_bytes + needed.gradient_bytes
    rest = needed.copies_bytes + needed.overhead_bytes
    columns = (needed.weights_bytes, trained, needed.activation_bytes, needed.logits_bytes, rest, needed.total)
    return "".join(f"{size / GIB:>9.1f}" for size in columns)


def _verdict(verdict: str) -> str:
    words = {"green": "fits", "yellow": "tight: slows down", "red": "too much", "unknown": ""}
    return click.style(words[verdict], fg=_COLOURS.get(verdict))


def _as_data(seen: Peek, machine: Facts, lines: list[Line], mine: Line, advice: Advice | None) -> dict[str, Any]:
    return {
        "model": seen.name,
        "options": dataclasses.asdict(mine.options),
        "machine": dataclasses.asdict(machine) | {"limit_bytes": memory_limit(machine)},
        "chosen": _line_data(mine),
        "methods": [_line_data(line) for line in lines],
        "advice": [
            {"name": m.name, "command": m.command, "total_bytes": m.estimate.total, "fits": m.fits}
            for m in ((*advice.measures, advice.combined) if advice is not None else ())
            if m is not None
        ],
    }


def _line_data(line: Line) -> dict[str, Any]:
    sizes = dataclasses.asdict(line.needed) | {"total_bytes": line.needed.total}
    return {"method": line.method, "verdict": line.verdict} | sizes
