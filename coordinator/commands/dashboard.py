"""``coordinator dashboard``: past and running runs in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.commands.completion import runs
from node.errors import UserError

HELP = """Show runs in the browser; several are compared.

RUN is an id, the beginning of one, a folder, or `last`, which it is unless told. `coordinator runs` lists them all.

Only this machine can ask, unless --host says otherwise; then the address that is printed has a token.

\b
Examples:
  coordinator dashboard
  coordinator dashboard adapters other/adapters
  coordinator dashboard --host 0.0.0.0
"""


@click.command(help=HELP)
@click.argument("run", nargs=-1, shell_complete=runs)
@click.option(
    "--port", "--dashboard-port", "port", type=click.IntRange(0, 65535), help="Port (default 21700, or a free one)."
)
@click.option(
    "--host", "--dashboard-host", "host", metavar="HOST", help="Listen there too (default: this machine only)."
)
def dashboard(run: tuple[str, ...], port: int | None, host: str | None) -> None:
    """Serve until Ctrl-C."""
    folders = [_folder(name) for name in run] if run else [_last()]
    from coordinator.dashboard.address import open_place
    from coordinator.dashboard.serve import serve
    from coordinator.view.format import one_line

    place = open_place(host, port, "--")
    click.echo(f"dashboard: {place.url} (Ctrl-C stops)")
    if not run:
        click.echo(
            f"the last run, in {one_line(str(folders[0]))}; for others: coordinator runs, coordinator dashboard RUN …"
        )
    serve(folders, place.socket, place.host, place.token)


def _last() -> Path:
    """The folder of the last run whose files are there; or ``adapters``, where that was copied from elsewhere."""
    from coordinator.running.known import known_runs

    runs, _ = known_runs()
    shown = [run.place or run.folder for run in runs if run.place is not None or run.holder is not None]
    if shown:
        return shown[-1]
    usual = Path("adapters")
    if _holds_a_run(usual):
        return usual
    if runs:
        raise UserError("the files of past runs are no longer there; coordinator runs says where they were")
    raise UserError("there is no run yet; coordinator train begins one")


def _holds_a_run(path: Path) -> bool:
    return any((path / file).exists() for file in ("metrics.jsonl", "events.jsonl", "config.yaml"))


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if _holds_a_run(path):
        return path
    from coordinator.running.known import resolve

    known = resolve(name)
    if known.place is None and known.holder is None:
        raise UserError(f"run {known.run}: {known.missing}; there is nothing to show")
    return known.place or known.folder
