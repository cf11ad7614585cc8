"""Command line plumbing that our scripts share: lazy commands, and one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import select
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.exceptions import Exit, NoArgsIsHelpError, NoSuchCommand
from click.shell_completion import shell_complete

from node.errors import Interrupted, TandemError
from node.in_use import hold
from node.log_file import logged
from node.stdio import ERROR, OUTPUT, give_up, prepare_streams

PIPE_CLOSED = 141  # what a shell reports for a process that SIGPIPE ended


class LazyCommand(NamedTuple):
    """A command that is imported when it is called.

    Attributes:
        target: where it lives, as ``module:attribute``.
        short_help: its line in the group's help.
        hidden: whether it is left out of the help.
    """

    target: str
    short_help: str
    hidden: bool = False


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports only the one that is called, so that ``--help`` is quick.

    Args:
        lazy: command names, in the order of the help, and where each command lives.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Lazy commands in their given order, then the others by name."""
        return [*self.lazy, *(name for name in super().list_commands(ctx) if name not in self.lazy)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself; imports its module if it is a lazy one."""
        known = super().get_command(ctx, cmd_name)
        if known is not None or cmd_name not in self.lazy:
            return known
        module, _, attribute = self.lazy[cmd_name].target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.lazy[cmd_name].target} is no click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command to call; a misspelt one is answered with the nearest of all names, lazy ones too."""
        name = args[0]
        if not name.startswith("-") and name not in self.lazy and name not in self.commands:
            raise NoSuchCommand(name, possibilities=self.list_commands(ctx), ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        rows = []
        for name in self.list_commands(ctx):
            if name in self.lazy:
                if not self.lazy[name].hidden:
                    rows.append((name, self.lazy[name].short_help))
            elif not self.commands[name].hidden:
                rows.append((name, self.commands[name].get_short_help_str(formatter.width)))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


def run_cli(group: click.Command, argv: Sequence[str] | None = None, prog_name: str | None = None) -> int:
    """Run a command line and return its exit code; every error that a person can meet becomes one line on stderr.

    Args:
        group: the command to run.
        argv: arguments without the program's name; None takes the process's own.
        prog_name: how the program calls itself in its help.

    Returns:
        0 done, 1 failed, 2 the user's mistake, 130 stopped by Ctrl-C. With ``TANDEM_DEBUG=1`` in the environment
        errors of ours are raised instead, with their traceback.
    """
    prepare_streams()
    hold()
    name = prog_name or Path(sys.argv[0]).name
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if wanted := os.environ.get(f"_{name}_COMPLETE".replace("-", "_").upper()):
            return _complete(group, name, wanted)
        with logged(name, arguments), group.make_context(name, list(arguments)) as context:
            group.invoke(context)
        sys.stdout.flush()
    except Exit as ended:
        return ended.exit_code
    except (click.Abort, EOFError, KeyboardInterrupt):
        return _say("\nstopped", Interrupted.exit_code)
    except (TandemError, click.ClickException, OSError) as error:
        return _explain(error)
    return 0


def _complete(group: click.Command, name: str, wanted: str) -> int:
    """Answer a shell; where that fails nothing is said, because somebody is typing there."""
    try:
        return shell_complete(group, {}, name, f"_{name}_COMPLETE".upper(), wanted)
    except (TandemError, OSError):
        return TandemError.exit_code


def _explain(error: TandemError | click.ClickException | OSError) -> int:
    if isinstance(error, OSError):
        return PIPE_CLOSED if isinstance(error, BrokenPipeError) and _reader_is_gone() else _system(error)
    return _ours(error) if isinstance(error, TandemError) else _usage(error)


def _ours(error: TandemError) -> int:
    if os.environ.get("TANDEM_DEBUG") == "1":
        raise error
    line = " ".join(str(error).split())
    return _say(line if isinstance(error, Interrupted) else f"error: {line}", error.exit_code)


def _usage(error: click.ClickException) -> int:
    """A wrong option or argument, with the command that lists the right ones."""
    if isinstance(error, NoArgsIsHelpError):
        return _say(error.format_message(), error.exit_code)
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f" (options: {context.command_path} --help)" if context is not None else ""
    return _say(f"error: {' '.join(error.format_message().split())}{hint}", error.exit_code)


def _system(error: OSError) -> int:
    """What the operating system refused and nobody below gave words to; without a file it is a fault of ours."""
    if error.filename in (OUTPUT, ERROR):
        give_up(error.filename)
    elif error.filename is None or os.environ.get("TANDEM_DEBUG") == "1":
        raise error
    return _say(f"error: {error.filename}: {error.strerror}", TandemError.exit_code)


def _say(line: str, code: int) -> int:
    try:
        click.echo(line, err=True)
    except OSError:  # the terminal may be gone; the exit code still says how it ended
        give_up(ERROR)
    return code


def wait_while_read(seconds: float) -> None:
    """Pass so much time, but none for a reader of our output who has left: who only shows something has no work then.

    Raises:
        BrokenPipeError: the reader is gone.
    """
    began = time.monotonic()
    if _is_closed(_output(), seconds):
        raise BrokenPipeError
    # What cannot be polled answers at once, as devices do on a Mac.
    threading.Event().wait(max(0.0, seconds - (time.monotonic() - began)))


def _reader_is_gone() -> bool:
    """Whether whoever read our output has closed it (``| head``); if so, nothing more is tried at exit."""
    if gone := _is_closed(_output(), 0.0):
        give_up(OUTPUT)
    return gone


def _output() -> int | None:
    try:
        return sys.stdout.fileno()
    except (OSError, ValueError):
        return None


def _is_closed(output: int | None, seconds: float) -> bool:
    """Whether the other end of a pipe or terminal is closed, or will be within so many seconds."""
    if output is None:
        return False
    watch = select.poll()
    watch.register(output, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in watch.poll(seconds * 1000))
