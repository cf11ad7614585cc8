"""Answers in a terminal or a pipe: text to standard output, everything else to standard error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

from coordinator.generation import Answer, Chat, GenerateOptions, Piece, generate, open_session
from coordinator.view.plain import PlainView
from node.errors import UserError


class Printer:
    """Writes answers.

    Args:
        as_json: one object per answer instead of text.
        quiet: no figures and hints on standard error.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self._quiet = quiet or as_json
        self.view = PlainView(sys.stderr, quiet=self._quiet)

    def note(self, line: str) -> None:
        """A line on standard error, unless quiet was asked for."""
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def text(self, text: str) -> None:
        """Some text, at once."""
        if text and not self.as_json:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()

    def end(self, answer: Answer) -> None:
        """What belongs after an answer's text."""
        if self.as_json:
            print(json.dumps(asdict(answer), ensure_ascii=False), flush=True)
            return
        self.text("\n")
        self.note(
            f"[{answer.tokens:,} tokens, {answer.tokens_per_second:,.1f} per second; prompt {answer.prompt_tokens:,},"
            f" {answer.prompt_tokens_per_second:,.1f} per second; {_ENDED[answer.finish_reason]}]"
        )


_ENDED = {"stop": "ended by itself", "length": "--max-tokens reached", "interrupted": "interrupted"}


def answer_prompts(options: GenerateOptions, printer: Printer) -> None:
    """Answer every prompt on its own."""

    async def run() -> None:
        several = len(options.prompts) > 1
        fresh = True
        waiting = list(options.prompts)
        async with contextlib.aclosing(generate(options, printer.view)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if several and fresh:
                    printer.note(f"> {waiting.pop(0)}")
                fresh = piece.answer is not None
                printer.text(piece.text)
                if piece.answer is not None:
                    printer.end(piece.answer)

    asyncio.run(run())


def chat_loop(options: GenerateOptions, printer: Printer) -> None:
    """Talk until the input ends. Ctrl-C ends an answer; where nothing is being answered, it ends the chat."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        failed: BaseException | None = None
        try:
            session = runner.run(_enter(stack, options, printer))
            chat = Chat(session)
            if sys.stdin.isatty():
                printer.note("Ctrl-C ends an answer, Ctrl-D the chat.")
            for message in _messages(options.prompts):
                try:
                    runner.run(_show(chat, message, printer))
                except KeyboardInterrupt:
                    runner.run(session.interrupt())
        except BaseException as error:
            failed = error
            raise
        finally:
            # Not run() of a coroutine that waits for Ctrl-C: whatever ended the chat, the worker must go.
            kind = type(failed) if failed is not None else None
            with contextlib.suppress(BaseException if failed is not None else ()):
                runner.run(_leave(stack, kind, failed))


async def _enter(stack: contextlib.AsyncExitStack, options: GenerateOptions, printer: Printer):  # type: ignore[no-untyped-def]
    return await stack.enter_async_context(open_session(options, printer.view))


async def _leave(stack: contextlib.AsyncExitStack, kind: type[BaseException] | None, error: BaseException | None) -> None:
    await stack.__aexit__(kind, error, None)


async def _show(chat: Chat, message: str, printer: Printer) -> None:
    """Print one answer as it comes; a cut one ends its line too."""
    said: list[str] = []
    answer: Answer | None = None
    try:
        async with contextlib.aclosing(chat.say(message)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                said.append(piece.text)
                printer.text(piece.text)
                answer = piece.answer
    finally:
        if answer is None and asyncio.current_task() is not None:
            answer = Answer(message, "".join(said), 0, "interrupted", 0, 0.0, 0.0)
        if answer is not None:
            printer.end(answer)
