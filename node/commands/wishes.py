"""``node pause`` and ``node resume``: the owner of a machine stays its owner."""

from __future__ import annotations

import click


@click.command("pause", help="Take no further jobs, also after a restart. A job that runs goes on.")
def pause() -> None:
    """Pause."""
    _wish("pause")


@click.command("resume", help="Take jobs again.")
def resume() -> None:
    """End the pause."""
    _wish("resume")


def _wish(action: str) -> None:
    """Note the wish for nodes to come, and tell those that serve."""
    import asyncio

    from node.home import home
    from node.owner import Owner

    Owner(home()).pause(paused=action == "pause")
    told = asyncio.run(_tell(action))
    who = ", ".join(told) or "no node serves here now; those to come"
    click.echo(f"{'paused' if action == 'pause' else 'takes jobs again'}: {who}")


async def _tell(action: str) -> list[str]:
    from node.client import NodeClient
    from node.errors import NodeError
    from node.home import home
    from node.identity import identity
    from node.running import running_nodes

    told = []
    for node in running_nodes(home()):
        client = NodeClient(node.address, node.name)
        try:
            info = await client.control(action, identity(home(), node.name).secret)
        except NodeError as error:
            click.echo(f"{node.name}: {error}", err=True)
        else:
            busy = f" (works on {info.busy.run} until that is done)" if info.busy and action == "pause" else ""
            told.append(f"{node.name}{busy}")
        finally:
            await client.close()
    return told
