"""``coordinator nodes``: who is there."""

from __future__ import annotations

import asyncio
import json
import time

import click

from coordinator.discovery import Found, Wanted, choose, look, parse_wanted
from coordinator.view.nodes import as_data, print_table
from node.hardware import Facts, facts


@click.command(help="Show who is there: machines that can take part in a training.")
@click.option(
    "--nodes", "wanted", default="auto", show_default=True, help="auto, local, names or host:port, by commas."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def nodes(wanted: str, as_json: bool) -> None:
    """List nodes."""
    parsed = parse_wanted(wanted)
    found, ours = asyncio.run(_look(parsed))
    chosen = choose(parsed, found)
    if as_json:
        click.echo(json.dumps(as_data(found, chosen, ours, time.time()), indent=2))
    else:
        print_table(found, chosen, ours)


async def _look(wanted: Wanted) -> tuple[Found, Facts]:
    found, ours = await asyncio.gather(look(wanted), asyncio.to_thread(facts))
    if any(seen.join and not seen.own for seen in found.nodes):
        from coordinator.home import home
        from coordinator.pairing import Pairing, join_all

        if await join_all(Pairing(home()), found, lambda line: click.echo(line, err=True)):
            found = await look(wanted)
    return found, ours
