"""``coordinator nodes``: who is there."""

from __future__ import annotations

import asyncio
import json
import time

import click

from coordinator.commands.completion import nodes as names
from coordinator.discovery import choose, parse_wanted
from coordinator.listing import find_nodes
from coordinator.view.nodes import as_data, print_table


@click.command(help="Show who is there: machines that can take part in a training.")
@click.option(
    "--nodes",
    "wanted",
    default="auto",
    show_default=True,
    help="auto, local, names or host:port, by commas.",
    shell_complete=names,
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def nodes(wanted: str, as_json: bool) -> None:
    """List nodes."""
    parsed = parse_wanted(wanted)
    found, ours = asyncio.run(find_nodes(parsed, lambda line: click.echo(line, err=True)))
    chosen = choose(parsed, found)
    if as_json:
        click.echo(json.dumps(as_data(found, chosen, ours, time.time()), indent=2))
    else:
        print_table(found, chosen, ours)
