"""Answers in a terminal or a pipe: text to standard output, everything else to standard error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Iterator
from dataclasses import asdict

import click

from coordinator.generation import Answer, Chat, GenerateOptions, Piece, Session, generate, open_session
from coordinator.view.plain import PlainView
from node.errors import UserError

_ENDED = {"stop": "ended by itself", "length": "--max-tokens reached", "interrupted": "interrupted"}


class Printer:
    """Writes answers.

    Args:
        as_json: one object per answer instead of text.
        quiet: no figures and hints on standard error.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet or as_json
        self.view = PlainView(sys.stderr, quiet=self._quiet)

    def note(self, line: str) -> None:
        """A line on standard error, unless quiet was asked for."""
        if not self._quiet:
            click.echo(line, err=True)

    async def show(self, pieces: AsyncGenerator[Piece, None]) -> None:
        """Print answers while they come."""
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                self._text(piece.text)
                if piece.answer is not None:
                    self.end(piece.answer)

    def end(self, answer: Answer) -> None:
        """What belongs after an answer's text."""
        if self._as_json:
            click.echo(json.dumps(asdict(answer)))
            return
        self._text("\n")
        figures = [f"{answer.tokens:,} tokens"]
        if answer.finish_reason != "interrupted":
            figures[0] += f", {answer.tokens_per_second:,.1f} per second"
            figures.append(f"prompt {answer.prompt_tokens:,}, {answer.prompt_tokens_per_second:,.1f} per second")
        self.note(f"[{'; '.join([*figures, _ENDED[answer.finish_reason]])}]")

    def _text(self, text: str) -> None:
        if text and not self._as_json:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()


def answer_prompts(options: GenerateOptions, printer: Printer) -> None:
    """Answer every prompt on its own."""
    asyncio.run(printer.show(generate(options, printer.view)))


def chat(options: GenerateOptions, printer: Printer) -> None:
    """Talk until the input ends. Ctrl-C ends an answer; while a message is waited for, it ends the chat."""
    with asyncio.Runner() as runner, _session(runner, options, printer) as session:
        talk = Chat(session)
        if _at_terminal():
            printer.note("Ctrl-C ends an answer, Ctrl-D the chat.")
        for message in _messages(options.prompts):
            try:
                runner.run(printer.show(talk.say(message)))
            except KeyboardInterrupt:
                printer.end(session.so_far)
                runner.run(session.interrupt())


@contextlib.contextmanager
def _session(runner: asyncio.Runner, options: GenerateOptions, printer: Printer) -> Iterator[Session]:
    """A session that lives through many calls of the event loop: between them Ctrl-C is the terminal's as ever."""
    manager = open_session(options, printer.view)
    session = runner.run(manager.__aenter__())
    try:
        yield session
    except BaseException as error:
        runner.run(manager.__aexit__(type(error), error, error.__traceback__))
        raise
    runner.run(manager.__aexit__(None, None, None))


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _messages(first: tuple[str, ...]) -> Iterator[str]:
    """The messages of ``--prompt``, then a line each from the terminal or pipe; empty lines are passed over."""
    yield from first
    if _at_terminal():
        with contextlib.suppress(ImportError):  # absent on some systems; it only makes typing nicer
            import readline  # noqa: F401
    while (line := _line()) is not None:
        if line.strip():
            yield line


def _line() -> str | None:
    try:
        if _at_terminal():
            return input("> ")
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not text in {sys.stdin.encoding}: {error}") from error
