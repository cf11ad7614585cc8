"""``node doctor``: what is wrong with this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from node.doctor.finding import Diagnosis, Finding
    from node.running import RunningNode

HELP = """Look for what is wrong with this machine, and say what mends it.

Where `node serve` runs, it is asked: it tries the network itself, as macOS permits that to each program apart. Each
finding is ok, a warning, wrong, or unknown: what cannot be found out is never called good. The exit code is 1 when
something is wrong. `coordinator doctor` asks all machines, and compares them.
"""


@click.command("doctor", help=HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Examine this machine."""
    import asyncio

    from node.doctor.examine import clock_alone
    from node.doctor.finding import worst
    from node.doctor.show import as_data, as_lines, closing

    found = asyncio.run(_examine())
    machines = [(one.info.name, one.info.id, (*one.findings, clock_alone())) for one in found]
    everything = [finding for _, _, findings in machines for finding in findings]
    if as_json:
        said = [
            {"name": name, "id": key or None, "verdict": worst(findings), "findings": as_data(findings)}
            for name, key, findings in machines
        ]
        click.echo(json.dumps({"verdict": worst(everything), "machines": said}, indent=2, ensure_ascii=False))
    else:
        for name, _, findings in machines:
            click.echo("\n".join(as_lines(name, findings)))
        click.echo(closing(everything))
    if worst(everything) == "wrong":
        context.exit(1)


async def _examine() -> list[Diagnosis]:
    """What each node that serves here says; where none does, or one does not answer, what this program finds."""
    from node.home import home
    from node.running import running_nodes

    nodes = running_nodes(home())
    return [await _ask(node) for node in nodes] if nodes else [await _here()]


async def _ask(node: RunningNode) -> Diagnosis:
    import dataclasses

    from node.client import NodeClient
    from node.doctor.finding import Finding, Wanted
    from node.errors import NodeError

    client = NodeClient(node.address, node.name)
    try:
        return await client.diagnose(Wanted())
    except NodeError as error:
        found = await _here()
        mend = f"kill {node.pid}, and `node serve` again"
        silent = Finding("answer", "wrong", f"its node does not answer: {error}", mend)
        info = dataclasses.replace(found.info, name=node.name, id=node.id)
        return dataclasses.replace(found, info=info, findings=(silent, *_without_ports(found)))
    finally:
        await client.close()


def _without_ports(found: Diagnosis) -> list[Finding]:
    """The findings of a program that serves nothing, for a node that does."""
    return [finding for finding in found.findings if finding.check != "ports"]


async def _here() -> Diagnosis:
    import asyncio

    from node.doctor.examine import examine, serving_now, this_machine
    from node.doctor.finding import Wanted
    from node.home import home

    serving = await serving_now(0, 0, "127.0.0.1", advertised=False)
    return await examine(home(), await asyncio.to_thread(this_machine), serving, Wanted())
