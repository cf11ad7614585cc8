"""``coordinator dashboard``: past and running runs in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator import runs
from node.errors import UserError

HELP = """Show runs in the browser: a folder (adapters by default) or a run's id; several are compared.

Only this machine can ask, unless --host says otherwise; then the address that is printed has a token.

\b
Examples:
  coordinator dashboard
  coordinator dashboard adapters other/adapters
  coordinator dashboard --host 0.0.0.0
"""


@click.command(help=HELP)
@click.argument("run", nargs=-1)
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

    place = open_place(host, port)
    click.echo(f"dashboard: {place.url} (Ctrl-C stops)")
    serve(folders, place.socket, place.host, place.token)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        known = runs.read(name) if name == Path(name).name else None
        if known is None or not Path(str(known.get("folder"))).is_dir():
            raise UserError(f"{name}: no folder and no run's id; give the --adapter-path of a run")
        folder = Path(str(known["folder"]))
        # A newer run there has moved the files of an older one aside.
        moved = folder / "previous" / name
        path = moved if moved.is_dir() else folder
    if not any((path / file).exists() for file in ("metrics.jsonl", "events.jsonl", "config.yaml")):
        raise UserError(f"{name}: no run has written here; give the --adapter-path of a run")
    return path
