"""``node serve``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.errors import UserError
from node.info import DEFAULT_PORT
from node.names import name_problem
from node.sizes import parse_size, show_size

if TYPE_CHECKING:
    from node.daemon import Daemon
    from node.pairing.desk import Happening
    from node.pairing.tokens import Token

HELP = """Take part in the training of others on this network.

Coordinators find this machine by Bonjour, send it models and rows, and have it compute. Ctrl-C withdraws it.

\b
Examples:
  node serve
  node serve --name Studio --max-memory 12GB
  node serve --only-when-idle
  node serve --allow-battery
  node serve --join TOKEN
  node serve --join @FILE

It serves paired machines only. While it has none, it shows a code for `coordinator pair` on the other machine; with a
token of `coordinator invite` it waits for the coordinator that printed it. `node pair` shows a new code.
"""

MOST_TOKEN_CHARACTERS = 1024
"""Of a file's first line: far more than any has."""
REFUSED = ("join_refused",)
"""What a service that waits for nobody must read in its log, also with --quiet."""


@click.command("serve", help=HELP)
@click.option("--name", help="What people call this machine (default: its own name).")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    show_default=f"{DEFAULT_PORT}, or a free one when that is taken",
    help="TCP port; 0 takes a free one.",
)
@click.option("--host", default="0.0.0.0", help="IPv4 address to serve on; 0.0.0.0 is all of them.", show_default=True)
@click.option("--max-memory", metavar="SIZE", help="Most memory that a job may use, for example 12GB.")
@click.option("--store-limit", metavar="SIZE", help="Most disk that kept models may take, for example 100GB.")
@click.option("--only-when-idle", is_flag=True, help="Take jobs only while nobody uses this machine.")
@click.option("--allow-battery", is_flag=True, help="Take jobs on battery power, too.")
@click.option(
    "--join",
    metavar="TOKEN",
    help="Be paired by the coordinator that printed this: coordinator invite. @FILE takes it from a file, - from the"
    " first line of stdin: other users of this machine can see what stands in a command.",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Let models' own Python files run here, for coordinators that say so, too.",
)
@click.option(
    "--log",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file instead of the terminal; of more than 16 MB only the end is kept.",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when it serves.")
@click.option("--check", is_flag=True, hidden=True, help="Only say what is wrong with the options, and serve nothing.")
def serve(
    name: str | None,
    port: int | None,
    host: str,
    max_memory: str | None,
    store_limit: str | None,
    only_when_idle: bool,
    allow_battery: bool,
    join: str | None,
    trust_remote_code: bool,
    log: Path | None,
    quiet: bool,
    as_json: bool,
    check: bool,
) -> None:
    """Serve until Ctrl-C."""
    import asyncio
    import contextlib

    from node import daemon
    from node.home import home
    from node.logs import logged_to
    from node.owner import Owner

    if name is not None and (problem := name_problem(name)):
        raise UserError(f"--name {name!r}: {problem}; take another")
    limit = 0 if max_memory is None else _memory_limit(max_memory)
    owner = Owner(
        home(),
        max_memory_bytes=limit,
        only_when_idle=only_when_idle,
        allow_battery=allow_battery,
        trusts_code=trust_remote_code,
    )

    def say(node: Daemon) -> None:
        info = node.info()
        if as_json:
            addresses = [item.address for item in info.interfaces]
            said = {"event": "serving", "name": info.name, "id": info.id, "port": node.port, "addresses": addresses}
            click.echo(json.dumps(said | ({"remark": node.remark} if node.remark else {})))
        elif not quiet:
            click.echo(daemon.greeting(node))
        if node.invitation is not None:
            tell(node.invitation)

    def tell(happening: Happening) -> None:
        if as_json:
            click.echo(json.dumps({"event": happening.event, **happening.data}))
        elif happening.event in REFUSED:
            click.echo(happening.line, err=True)
        elif not quiet:
            click.echo(happening.line)

    def say_leaving() -> None:
        if not quiet and not as_json:
            click.echo("handing over the job at hand; Ctrl-C again leaves at once")

    kept = None if store_limit is None else _store_limit(store_limit)
    token, missing = (None, None) if join is None else _token(join, home())
    if check:
        daemon.check_place(host, port)
        if log is not None:
            _check_log(log)
        return
    with contextlib.nullcontext() if log is None else logged_to(log):
        if missing is not None:
            tell(missing)
        asyncio.run(daemon.serve(name, host, port, owner, kept, say, say_leaving, token, tell))


def _token(given: str, ours: Path) -> tuple[Token | None, Happening | None]:
    """The token of ``--join``; None where its file is gone and it is needed no more, with what is said of that.

    A service starts with the same option each time, and whoever has been paired may have removed the file.

    Args:
        given: the option.
        ours: the ``TANDEM_HOME``.

    Raises:
        UserError: it is no token, or cannot be read.
    """
    from node.pairing.desk import Happening
    from node.pairing.tokens import parse_token
    from node.peers import Peers

    if not given.startswith("@"):
        return parse_token(_from_stdin() if given == "-" else given), None
    path = Path(given.removeprefix("@")).expanduser()
    try:
        with path.open(errors="replace") as file:
            return parse_token(file.readline(MOST_TOKEN_CHARACTERS)), None
    except OSError as error:
        problem = f"--join {given}: {path} cannot be read: {error.strerror}"
        if not isinstance(error, FileNotFoundError) or not Peers(ours).all():
            mend = "put the token of `coordinator invite` there, or leave the option out"
            raise UserError(f"{problem}; {mend}") from error
        line = f"{problem}; this machine is paired already and serves without it"
        return None, Happening("join_refused", line, {"reason": "missing", "file": str(path)})


def _from_stdin() -> str:
    """The line that stands for a token.

    Raises:
        UserError: there is none.
    """
    text = "" if sys.stdin is None else sys.stdin.readline(MOST_TOKEN_CHARACTERS)
    if not text.strip():
        raise UserError("--join -: no token came on stdin; give it there, or in a file: --join @FILE")
    return text


def _check_log(log: Path) -> None:
    """Refuse a log that cannot be written; nothing is made.

    Raises:
        UserError: it cannot be.
    """
    there = next(part for part in (log, *log.absolute().parents) if os.access(part, os.F_OK))
    if not os.access(there, os.W_OK) or (there != log and not there.is_dir()):
        raise UserError(f"--log {log}: {there} cannot be written to; name another file")


def _store_limit(text: str) -> int:
    """Bytes of ``--store-limit``; see ``_at_least``."""
    from node.store import LEAST_USEFUL_BYTES

    hint = (
        "no model fits into less than {}, and no job can be done without one; give more, or leave the option out: then"
        " old models go when the disk gets full"
    )
    return _at_least(LEAST_USEFUL_BYTES, text, "--store-limit", hint)


def _memory_limit(text: str) -> int:
    """Bytes of ``--max-memory``; see ``_at_least``."""
    from node.owner import LEAST_MEMORY_BYTES

    hint = "no job fits into less than {}; give more, or take no jobs: node pause"
    return _at_least(LEAST_MEMORY_BYTES, text, "--max-memory", hint)


def _at_least(least: int, text: str, option: str, hint: str) -> int:
    """The bytes that an option says.

    Args:
        least: bytes below which it makes no sense.
        text: what was given.
        option: its name.
        hint: why not less, with a place for the least.

    Raises:
        UserError: it is no size, or too small.
    """
    limit = parse_size(text, option)
    if limit < least:
        raise UserError(f"{option} {text}: {hint.format(show_size(least))}")
    return limit
