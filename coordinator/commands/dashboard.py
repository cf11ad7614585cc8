"""``coordinator dashboard``: past and running runs in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.commands.completion import runs
from node.errors import UserError

HELP = """Show runs in the browser; several are compared.

RUN is an id, the beginning of one, a folder (adapters unless told), or `last`.

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
    folders = [_folder(name) for name in run or ("adapters",)]
    from coordinator.dashboard.address import open_place
    from coordinator.dashboard.serve import serve

    place = open_place(host, port, "--")
    click.echo(f"dashboard: {place.url} (Ctrl-C stops)")
    serve(folders, place.socket, place.host, place.token)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if any((path / file).exists() for file in ("metrics.jsonl", "events.jsonl", "config.yaml")):
        return path
    from coordinator.running.known import resolve

    known = resolve(name)
    if known.place is None and known.holder is None:
        raise UserError(f"run {known.run}: {known.missing}; there is nothing to show")
    return known.place or known.folder
