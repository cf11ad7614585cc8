"""``coordinator status``: what runs now, here."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from node.info import NodeInfo
    from node.running import RunningNode

ASK_SECONDS = 2.0


@click.command("status", help="What runs now on this Mac: trainings of this account, and node services.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def status(as_json: bool) -> None:
    """Show runs and nodes."""
    from coordinator.home import home
    from coordinator.running.known import known_runs
    from coordinator.view.runs import as_data, table
    from node.running import running_nodes

    working = [run for run in known_runs()[0] if run.holder is not None]
    serving = running_nodes(home())
    nodes = list(zip(serving, asyncio.run(_ask(serving)), strict=True)) if serving else []
    if as_json:
        content = {"runs": [as_data(run) for run in working], "nodes": [_node_data(*pair) for pair in nodes]}
        click.echo(json.dumps(content, indent=2))
        return
    now = time.time()
    if working:
        click.echo("\n".join(line.rstrip() for line in table(working, now)))
    else:
        click.echo("no run is at work here; coordinator runs lists those that were")
    for node, info in nodes:
        click.echo(f"node {node.name} serves on {node.address} (process {node.pid}): {_doing(info, now)}")


async def _ask(nodes: list[RunningNode]) -> list[NodeInfo | str]:
    """What each node says of itself, or why it does not."""
    from node.client import NodeClient
    from node.errors import NodeError, one_line

    async def one(node: RunningNode) -> NodeInfo | str:
        client = NodeClient(node.address, node.name)
        try:
            return await client.describe(ASK_SECONDS)
        except NodeError as error:
            return one_line(error)
        finally:
            await client.close()

    return list(await asyncio.gather(*(one(node) for node in nodes)))


def _doing(info: NodeInfo | str, now: float) -> str:
    from coordinator.view.format import one_line
    from coordinator.view.runs import when

    if isinstance(info, str):
        return f"does not answer ({info})"
    if info.busy is not None:
        return one_line(f"trains {info.busy.run} for {info.busy.owner} since {when(info.busy.since, now)}")
    return "paused" if info.paused else "free"


def _node_data(node: RunningNode, info: NodeInfo | str) -> dict[str, Any]:
    import dataclasses

    if isinstance(info, str):
        return {**dataclasses.asdict(node), "problem": info, "paused": None, "busy": None}
    busy = dataclasses.asdict(info.busy) if info.busy is not None else None
    return {**dataclasses.asdict(node), "problem": None, "paused": info.paused, "busy": busy}
