"""``coordinator demo``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from node.errors import Interrupted, UserError

HELP = """The whole story on this machine, offline, in about a minute.

Makes a small model and a data set, trains, tests, fuses, exports GGUF, and asks before and after.

\b
Examples:
  coordinator demo
  coordinator demo --keep demo_files
"""


@click.command("demo", help=HELP)
@click.option("--keep", metavar="FOLDER", help="Keep everything it makes in this new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end; what happens goes to stderr.")
def demo(keep: str | None, as_json: bool) -> None:
    """Tell the story."""
    from coordinator.demo.story import tell

    began = time.monotonic()
    with _folder(keep) as folder:
        try:
            result = tell(folder, lambda line: click.echo(line, err=as_json))
        except (Interrupted, KeyboardInterrupt):
            kept = f"; what it made so far is in {folder}" if keep else ""
            raise Interrupted(f"demo stopped{kept}") from None
        seconds = time.monotonic() - began
        if as_json:
            values = dataclasses.asdict(result) | {"seconds": seconds}
            values["files"] = result.files if keep else {}
            click.echo(json.dumps(values, indent=1))
            return
        click.echo(f"done in {seconds:.0f} s")
        if keep:
            fused = shlex.quote(str(folder / "fused_model"))
            question = shlex.quote(result.answers[0]["question"])
            click.echo(f"everything is in {folder}; try\n  coordinator generate --model {fused} --prompt {question}")


@contextlib.contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """A folder of the demo's own: the one to keep, or one that goes when the demo ends."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="mlx-tandem-demo-") as name:
            yield Path(name)
        return
    folder = Path(keep).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--keep {keep}: is there already; name a new folder, or an empty one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--keep {keep}: cannot be made ({error.strerror})") from error
    yield folder
