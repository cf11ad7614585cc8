"""``node info``."""

from __future__ import annotations

import dataclasses
import json

import click

from node.hardware import describe, facts


@click.command("info", help="Show what this machine is: chip, memory, system and versions.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of a line.")
def info(as_json: bool) -> None:
    """Show the facts of this machine."""
    found = facts()
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else describe(found))
