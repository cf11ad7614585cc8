"""``coordinator runs``: which runs there are and were."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from coordinator.commands.completion import runs as known
from node.errors import UserError

HELP = """List the runs of this account: those that are at work, and those that were.

A RUN below is an id, the beginning of one, a folder, or `last`.
"""


@click.group("runs", help=HELP, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@click.pass_context
def runs(context: click.Context, as_json: bool) -> None:
    """List runs, first the one that was begun or resumed last."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise UserError(f"--json stands behind the command: coordinator runs {context.invoked_subcommand} --json")
        return
    from coordinator.running.known import known_runs
    from coordinator.view.runs import as_data, table

    found, broken = known_runs()
    found.reverse()
    if as_json:
        content = {"runs": [as_data(run) for run in found], "broken": [str(path) for path in broken]}
        click.echo(json.dumps(content, indent=2))
    elif found:
        click.echo("\n".join(line.rstrip() for line in table(found, time.time())))
    else:
        click.echo("no run yet; coordinator train begins one")
    _tell_broken(broken)


@runs.command("show")
@click.argument("run", metavar="RUN", shell_complete=known)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def show(run: str, as_json: bool) -> None:
    """Show one run: how it stands, and where its files are."""
    from coordinator.running.known import resolve
    from coordinator.view.runs import as_data, details

    found = resolve(run)
    click.echo(json.dumps(as_data(found), indent=2) if as_json else "\n".join(details(found, time.time())))


@runs.command("compare")
@click.argument("run", metavar="RUN RUN...", nargs=-1, required=True, shell_complete=known)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def compare(run: tuple[str, ...], as_json: bool) -> None:
    """Put runs side by side: options that differ, and what came of them."""
    from coordinator.running.compare import compare as side_by_side
    from coordinator.running.known import resolve
    from coordinator.view.comparison import comparison_lines

    found = [resolve(one) for one in run]
    if len({one.run for one in found}) < 2:
        raise UserError("give two runs or more to compare; coordinator runs lists them")
    for one in found:
        if one.place is None:
            raise UserError(f"run {one.run}: {one.missing}; there is nothing to compare")
    comparison = side_by_side(found)
    click.echo(json.dumps(comparison.data(), indent=2) if as_json else "\n".join(comparison_lines(comparison)))


@runs.command("rm")
@click.argument("run", metavar="RUN...", nargs=-1, required=True, shell_complete=known)
@click.option("--files", is_flag=True, help="Remove what it wrote to its folder, too: adapter, checkpoints, metrics.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(run: tuple[str, ...], files: bool, yes: bool) -> None:
    """Forget runs. Their files stay where they are, unless --files is said."""
    from coordinator.running import removal
    from coordinator.running.known import Known, known_runs, resolve

    broken = {path.stem for path in known_runs()[1]}
    found: list[Known | str] = [one if one in broken else resolve(one) for one in run]
    for one in found:
        if isinstance(one, str):
            removal.forget(one)
            click.echo(f"forgot {one}, whose entry could not be read")
            continue
        written = removal.written_files(one) if files else []
        if written and not yes:
            click.confirm(f"delete {', '.join(path.name for path in written)} in {one.place}?", abort=True, err=True)
        removal.remove(one, files=files)
        if files:
            click.echo(f"removed {one.run}" + ("" if written else f"; there were no files ({one.missing})"))
        else:
            click.echo(f"forgot {one.run}; " + (f"its files stay in {one.place}" if one.place else one.missing))


def _tell_broken(broken: tuple[Path, ...]) -> None:
    for path in broken:
        line = f"{path} cannot be read and is left out; coordinator runs rm {path.stem} removes it"
        click.echo(line, err=True)
