"""``coordinator test``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from coordinator.commands.options import with_config_options


@click.command("test")
@with_config_options(
    "model",
    "data",
    "mask",
    "mask_prompt",
    "max_seq_length",
    "batch_size",
    "trust_remote_code",
)
@click.option("--adapter-path", default="", metavar="FOLDER", help="Adapter to apply; its run's options are used.")
@click.option(
    "--split", type=click.Choice(["test", "valid", "train"]), default="test", help="Which rows (default test)."
)
@click.option(
    "--test-batches",
    type=int,
    default=500,
    show_default=True,
    help="At most so many batches, spread over the data; -1 all.",
)
@click.option("-c", "--config", metavar="FILE", help="YAML file with any of these options; flags win over it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print warnings and the result only.")
@click.option("--test", is_flag=True, hidden=True)
def test(config: str | None, as_json: bool, quiet: bool, test: bool, **flags: Any) -> None:
    """Loss and perplexity of a model, with or without an adapter.

    With --adapter-path the model, the data and the mask are those of the adapter's run unless they are said.

    \b
    Examples:
      coordinator test --adapter-path adapters
      coordinator test --model mlx-community/Qwen3-0.6B-4bit --data data --split valid
    """  # noqa: D301 - click reads the backspace
    del test  # mlx_lm asks for it
    import asyncio

    from coordinator.evaluation import test as measure
    from coordinator.view.plain import PlainView

    options = _options(config, flags)
    result = asyncio.run(measure(options, PlainView(sys.stderr, quiet=quiet or as_json)))
    if as_json:
        click.echo(json.dumps(_finite(vars(result))))
        return
    some = f"{result.rows:,}" if result.rows == result.total_rows else f"{result.rows:,} of {result.total_rows:,}"
    click.echo(
        f"{result.split}: loss {result.loss:.4f}, perplexity {result.perplexity:,.3f};"
        f" {result.tokens:,} tokens of {some} rows in {result.seconds:.1f} s"
    )


def _options(config: str | None, flags: dict[str, Any]) -> Any:
    """Flags over the file; what neither says is left to the adapter's run and the defaults."""
    from coordinator.config_file import read_yaml
    from coordinator.evaluation import TestOptions

    said = {name: value for name, value in flags.items() if value is not None}
    from_file = read_yaml(Path(config)) if config else {}
    names = set(TestOptions.__dataclass_fields__)
    values = {name: value for name, value in from_file.items() if name in names}
    for name, twin in (("mask", "mask_prompt"), ("mask_prompt", "mask"), ("data", "hf_dataset")):
        if name in said:
            values.pop(twin, None)
    context = click.get_current_context()
    for name in ("adapter_path", "test_batches"):
        if name in values and context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            del said[name]
    return TestOptions(**{**values, **said})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither infinity nor not-a-number."""
    import math

    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
