"""``coordinator stop``: end a run as Ctrl-C does, from another terminal."""

from __future__ import annotations

import json

import click

from coordinator.commands.completion import runs_at_work

HELP = """Stop a run as Ctrl-C does: it finishes its step, saves, and ends. Returns when everything is saved.

RUN is an id, the beginning of one, a folder, or `last`.
"""


@click.command("stop", help=HELP)
@click.argument("run", metavar="RUN", shell_complete=runs_at_work)
@click.option("--now", is_flag=True, help="Leave at once; what is on disk is whole.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def stop(run: str, now: bool, as_json: bool) -> None:
    """Stop a run."""
    import shlex

    from coordinator.running import control
    from coordinator.running.known import STATES, known_runs, resolve
    from coordinator.view.runs import as_data
    from node.errors import TandemError, UserError

    found = resolve(run)
    if found.holder is None:
        raise UserError(f"run {found.run} is not at work: {STATES[found.state]}; coordinator status shows what is")
    if now:
        control.stop_now(found.run)
    else:
        holder = control.ask_to_stop(found.run)
        click.echo(f"stopping {found.run} (process {holder.pid}); it finishes its step and saves", err=True)
        try:
            control.wait_until_saved(found.run)
        except KeyboardInterrupt:
            click.echo("\nno longer waiting; the run ends by itself when it has saved", err=True)
            return
    ended = next((one for one in known_runs()[0] if one.run == found.run), None)
    if as_json:
        click.echo(json.dumps(None if ended is None else as_data(ended), indent=2))
    elif ended is None:
        click.echo("stopped before training began; nothing was written")
    else:
        click.echo(f"{found.run}: {ended.message or STATES[ended.state]}")
        if ended.resumable:
            click.echo(f"go on:\n  coordinator train --resume --adapter-path {shlex.quote(str(ended.folder))}")
    if ended is not None and ended.state == "failed":
        raise TandemError(f"run {ended.run} failed while it was stopped: {ended.message}")
