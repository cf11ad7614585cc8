"""``coordinator fuse``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from coordinator.config import GGUF_TYPES


@click.command("fuse")
@click.option("--model", default="", metavar="MODEL", help="Hugging Face repo or folder (default: the adapter's).")
@click.option("--adapter-path", default="adapters", show_default=True, metavar="FOLDER", help="The adapter to merge.")
@click.option("--save-path", default="fused_model", show_default=True, metavar="FOLDER", help="For the fused model.")
@click.option("--dequantize", "--de-quantize", is_flag=True, help="Write full-precision weights from a quantized base.")
@click.option("--fused-model/--no-fused-model", default=True, help="Whether to write the fused model at all.")
@click.option("--export-gguf", is_flag=True, help="Write a GGUF file, for llama.cpp and Ollama.")
@click.option(
    "--gguf-path", default="", metavar="FILE", help="Its name, in the save path (default ggml-model-TYPE.gguf)."
)
@click.option("--gguf-type", type=click.Choice(GGUF_TYPES), default="f16", show_default=True, help="Its weights.")
@click.option("--export-peft", default="", metavar="FOLDER", help="Write the adapter in PEFT's layout to this folder.")
@click.option("--upload-repo", default="", metavar="REPO", help="Upload the fused model to this Hugging Face repo.")
@click.option("--hf-path", default="", metavar="REPO", help="Base model to name in the model card.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own Python files run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="Print warnings and what was written only.")
def fuse(as_json: bool, quiet: bool, **values: Any) -> None:
    """Merge an adapter into its model; export GGUF or PEFT; upload.

    \b
    Examples:
      coordinator fuse
      coordinator fuse --export-gguf --gguf-type q8_0
      coordinator fuse --no-fused-model --export-peft peft_adapter
    """  # noqa: D301 - click reads the backspace
    import asyncio

    from coordinator.fusing import FuseOptions
    from coordinator.fusing import fuse as start
    from coordinator.view.plain import PlainView

    result = asyncio.run(start(FuseOptions(**values), PlainView(sys.stderr, quiet=quiet or as_json)))
    if as_json:
        commands = [{"purpose": purpose, "command": command} for purpose, command in result.next_commands]
        click.echo(json.dumps({"written": result.written, "next_commands": commands}))
        return
    for path in result.written:
        click.echo(f"wrote {path}")
    for purpose, command in () if quiet else result.next_commands:
        click.echo(f"{purpose}:\n  {command}")
