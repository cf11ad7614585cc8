"""``coordinator estimate``: the memory of each method on this machine, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import click

from coordinator.config import OPTIMIZERS
from coordinator.estimates import JobMemory, MethodMemory
from coordinator.estimates import estimate as estimate_job
from coordinator.memory import Advice, Estimate
from coordinator.memory import estimate as estimate_step
from coordinator.memory.architecture import architecture
from coordinator.memory.weights import quantization
from node.hardware import GIB, describe
from node.sizes import show_size

_COLOURS = {"fits": "green", "tight": "yellow", "too much": "red"}


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
    found = estimate_job(model, memory=memory, **chosen)
    if as_json:
        click.echo(json.dumps(_as_data(found), indent=2))
    else:
        _show(found)


def _show(found: JobMemory) -> None:
    seen, machine, mine = found.seen, found.machine, found.chosen
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
    for line in found.methods:
        click.echo(f"{line.method:<12}{_numbers(line.needed)}  {_verdict(line.verdict)}")
    limit = found.limit_bytes
    room = "memory unknown" if limit is None else f"{show_size(limit)} for training"
    click.echo(f"\n{describe(machine) if machine.chip else machine.name}: {room}")
    shorter = estimate_step(seen.config, seen.shapes, replace(options, max_seq_length=512)).total
    if options.max_seq_length > 512:
        click.echo(f"{options.fine_tune_type} with rows of at most 512 tokens: {show_size(shorter)}")
    if mine.verdict in {"tight", "too much"} and options.batch_size > 1:
        alone = estimate_step(seen.config, seen.shapes, replace(options, micro_batch_rows=1)).total
        click.echo(f"computed one row at a time, as train does by itself where memory is short: {show_size(alone)}")
    if found.advice is not None:
        _show_advice(found.advice)


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
    words = {"tight": "tight: slows down", "unknown": ""}
    return click.style(words.get(verdict, verdict), fg=_COLOURS.get(verdict))


def _as_data(found: JobMemory) -> dict[str, Any]:
    advice = found.advice
    return {
        "model": found.seen.name,
        "options": dataclasses.asdict(found.chosen.options),
        "machine": dataclasses.asdict(found.machine) | {"limit_bytes": found.limit_bytes},
        "chosen": _method_data(found.chosen),
        "methods": [_method_data(method) for method in found.methods],
        "advice": [
            {"name": m.name, "command": m.command, "total_bytes": m.estimate.total, "fits": m.fits}
            for m in ((*advice.measures, advice.combined) if advice is not None else ())
            if m is not None
        ],
    }


def _method_data(found: MethodMemory) -> dict[str, Any]:
    sizes = dataclasses.asdict(found.needed) | {"total_bytes": found.needed.total}
    return {"method": found.method, "verdict": found.verdict} | sizes
