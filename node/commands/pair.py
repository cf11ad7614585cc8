"""``node pair``."""

from __future__ import annotations

import json

import click

HELP = """Have the node that serves here show a new pairing code.

Another machine is paired with it by `coordinator pair`. A code works once, for ten minutes, and five wrong tries
void it.
"""


@click.command("pair", help=HELP)
@click.option("--name", help="Which node, where several serve here.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pair(name: str | None, as_json: bool) -> None:
    """Open a new code."""
    import asyncio

    from node.errors import UserError
    from node.home import home
    from node.running import running_nodes

    serving = running_nodes(home())
    chosen = [node for node in serving if name in (None, node.name)]
    if not chosen:
        who = f"no node called {name} serves" if serving and name else "no node serves"
        raise UserError(f"{who} here; run `node serve`, which shows a code when it is not paired yet")
    if len(chosen) > 1:
        names = ", ".join(node.name for node in chosen)
        raise UserError(f"several nodes serve here: {names}; say which: node pair --name {chosen[0].name}")
    code, port, seconds = asyncio.run(_ask(chosen[0].address, chosen[0].name))
    if as_json:
        click.echo(json.dumps({"code": code, "port": port, "seconds": round(seconds)}))
    else:
        click.echo(f"{code} is the code of {chosen[0].name}, for {seconds / 60:.0f} minutes: coordinator pair")


async def _ask(address: str, name: str) -> tuple[str, int, float]:
    from node.client import NodeClient
    from node.home import home
    from node.identity import identity

    client = NodeClient(address, name)
    try:
        code = await client.pair(identity(home(), name).secret)
        return code.code, code.port, code.seconds
    finally:
        await client.close()
