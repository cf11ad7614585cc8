"""The ``node`` command: what a single Mac can tell about itself."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version

import click

from node.clikit import run_cli
from node.hardware import describe, facts


@click.group(help="One machine of a fleet.", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("mlx-tandem"), message="%(prog)s %(version)s")
def cli() -> None:
    """Hold the commands below."""


@cli.command(help="Show what this machine is: chip, memory, systems and versions.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of a line.")
def info(as_json: bool) -> None:
    """Show the facts of this machine."""
    found = facts()
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else describe(found))


def main() -> int:
    """Run the ``node`` script and return its exit code."""
    return run_cli(cli, prog_name="node")
