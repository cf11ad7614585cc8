"""``coordinator watch``: a run that another process does, shown here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from coordinator.commands.completion import runs
from node.clikit import wait_while_read
from node.errors import Interrupted, TandemError, UserError, error_of

if TYPE_CHECKING:
    from coordinator.running.known import Known

HELP = """Show a run that is at work elsewhere on this Mac, as `train` shows it, to its end.

RUN is an id, the beginning of one, a folder, or `last`. Ctrl-C ends the watching and leaves the run alone, as does
a reader who leaves (`| head`). Exit codes are those of the run.
"""


@click.command("watch", help=HELP)
@click.argument("run", metavar="RUN", shell_complete=runs)
@click.option("--quiet", is_flag=True, help="Print warnings, errors and the result only.")
@click.option("--plain", is_flag=True, help="Print lines even in a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event.")
def watch(run: str, quiet: bool, plain: bool, as_json: bool) -> None:
    """Watch a run."""
    from coordinator.running.follow import follow
    from coordinator.running.known import STATES, resolve
    from coordinator.stream import FAILED, STOPPED
    from coordinator.view import ViewMode, make_view
    from node.hardware import facts

    mode: ViewMode = "json" if as_json else "quiet" if quiet else "plain" if plain else "auto"
    found = resolve(run)
    if found.place is None and found.holder is None:
        line = f"run {found.run} ({STATES[found.state]}): {found.message or found.missing}"
        raise UserError(line) if found.opened else _own_error(found, line)
    view = make_view(mode, facts().total_memory_bytes or 0)
    try:
        finished = follow(found, view, wait_while_read)
    except KeyboardInterrupt:
        view.close()
        click.echo(f"\nno longer watching; the run goes on (coordinator stop {found.run} stops it)", err=True)
        return
    finally:
        view.close()
    if finished is None:
        raise _ended_elsewhere(found.run)
    said = next((value for label, value in finished.summary if label in (FAILED, STOPPED)), "")
    if finished.status == "interrupted":
        raise Interrupted(said or "the run was stopped")
    if finished.status == "failed":
        raise error_of(finished.exit_code, said or "the run failed; its events.jsonl says more")


def _ended_elsewhere(run: str) -> TandemError:
    """Why a run ended that said nothing of it in its folder."""
    import shlex

    from coordinator.running.known import known_runs

    now = next((one for one in known_runs()[0] if one.run == run), None)
    if now is None:
        return TandemError(f"run {run} ended before it trained; it says why where it was started")
    resume = f"coordinator train --resume --adapter-path {shlex.quote(str(now.folder))}" if now.resumable else ""
    hint = f"; to go on: {resume}" if resume else ""
    if now.message:
        return _own_error(now, f"run {run}: {now.message}{hint}")
    log = f"; its log is {now.log}" if now.log is not None else ""
    return TandemError(f"run {run} ended without a word, as by kill -9 or a power cut{log}{hint}")


def _own_error(run: Known, line: str) -> TandemError:
    """What a run ended by that could not say so in its folder."""
    # Entries of older versions, and runs that `stop --now` ended, have no code.
    stopped = Interrupted.exit_code if run.state == "interrupted" else None
    return error_of(run.exit_code or stopped, line)
