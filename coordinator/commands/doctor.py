"""``coordinator doctor``: what is wrong with the machines and their links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.commands.completion import nodes, runs
from node.errors import UserError

if TYPE_CHECKING:
    from coordinator.doctor.machine import Examined
    from coordinator.running.known import Known

HELP = """Look for what is wrong with this machine, the others, and the network between them.

Each machine looks at itself and tries the others; links are measured, except of machines that train just now. Each
finding is ok, a warning, wrong, or unknown: what cannot be found out is never called good. Takes about fifteen
seconds. The exit code is 1 when something is wrong.

With --debug it also writes one file to send with a bug report: these findings, versions, logs, and the events, figures
and options of a run (the newest, or --run). Secrets, rows, prompts and samples are left out.
"""


@click.command("doctor", help=HELP)
@click.option(
    "--nodes",
    "wanted",
    default="auto",
    show_default=True,
    help="auto, local, names or host:port, by commas.",
    shell_complete=nodes,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", is_flag=True, help="Write a file for a bug report.")
@click.option(
    "--run",
    metavar="RUN",
    help="The run that it is about: an id, a folder, or last (default: the newest).",
    shell_complete=runs,
)
@click.option("--out", metavar="FILE", type=Path, help="Where to write it (default: a new .zip in this folder).")
@click.pass_context
def doctor(context: click.Context, wanted: str, as_json: bool, debug: bool, run: str | None, out: Path | None) -> None:
    """Examine the fleet."""
    import asyncio

    if not debug and (run is not None or out is not None):
        raise UserError("--run and --out need --debug")

    from coordinator.doctor.bundle import check_place, default_name, write_bundle

    path = out if out is not None else default_name()
    if debug:
        check_place(path)
    about = _about(run) if debug else None

    from coordinator.doctor.ask import examine_fleet
    from coordinator.home import home
    from node.doctor.finding import worst

    examined = asyncio.run(examine_fleet(wanted, home()))
    if as_json:
        click.echo(json.dumps(as_data(examined), indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(as_lines(examined)))
    if debug:
        names = write_bundle(path, as_data(examined), about, home())
        click.echo(f"wrote {path} ({len(names)} texts; its README.txt says what is in it)", err=True)
    if worst(examined.findings) == "wrong":
        context.exit(1)


def _about(run: str | None) -> Known | None:
    """The run that a report is about, if there is any."""
    from coordinator.running.known import LAST, known_runs, resolve

    return resolve(run or LAST) if run is not None or known_runs()[0] else None


def as_lines(examined: Examined) -> list[str]:
    """The findings for people."""
    from node.doctor.show import as_lines as section
    from node.doctor.show import closing

    lines = []
    for machine, findings in examined.machines:
        lines += [*section(f"{machine.label}{' (here)' if machine.own else ''}", findings), ""]
    if examined.links:
        lines += [*section("links", examined.links), ""]
    if examined.general:
        lines += [*section("fleet", examined.general), ""]
    return [*lines, closing(examined.findings)]


def as_data(examined: Examined) -> dict[str, Any]:
    """The findings for programs."""
    from node.doctor.finding import worst
    from node.doctor.show import as_data as section

    machines = [
        {
            "name": machine.label,
            "id": machine.info.id if machine.diagnosis is not None else None,
            "own": machine.own,
            "address": machine.address,
            "verdict": worst(findings),
            "findings": section(findings),
        }
        for machine, findings in examined.machines
    ]
    return {
        "verdict": worst(examined.findings),
        "machines": machines,
        "links": section(examined.links),
        "fleet": section(examined.general),
    }
