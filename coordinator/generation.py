"""``coordinator generate``: text from a model, piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coordinator.adapters import model_of, read_adapter
from coordinator.answers import Answer, GenerateOptions, Piece
from coordinator.background import in_background
from coordinator.data.tokenizer import vocabulary_size
from coordinator.detokenise import TextStream
from coordinator.models import resolve
from coordinator.prompts import Prompter
from coordinator.stream import Noted, Reader
from coordinator.workers import SILENCE_SECONDS, task_worker
from node import events
from node.errors import UserError, WorkerLost
from node.spec import Generate, Int32, ModelSpec
from node.supervisor import WorkerLink

__all__ = ["Answer", "Chat", "GenerateOptions", "Piece", "Session", "answers", "generate", "open_session"]

Message = dict[str, Any]


class Session:
    """A loaded model that answers. Made by ``open_session``."""

    def __init__(
        self, worker: WorkerLink, prompter: Prompter, options: GenerateOptions, vocabulary: int | None
    ) -> None:
        self._worker = worker
        self._prompter = prompter
        self._options = options
        self._vocabulary = vocabulary
        self._stop = (*prompter.stop, *(prompter.token_id(text) for text in options.extra_stop))
        self._id = 0
        self._busy = False
        self._current = Answer("", "", 0, "interrupted", 0, 0.0, 0.0)
        self._receiving: asyncio.Task[events.Event] | None = None

    @property
    def plain(self) -> bool:
        """Whether prompts are continued as plain text."""
        return self._options.raw or not self._prompter.has_chat_template

    @property
    def so_far(self) -> Answer:
        """What there is of the answer that is under way; the whole of it afterwards."""
        return self._current

    async def ask(self, prompt: str) -> AsyncGenerator[Piece, None]:
        """Answer one prompt on its own."""
        async for piece in self.answer([*self.opening(), {"role": "user", "content": prompt}]):
            yield piece

    def opening(self) -> list[Message]:
        """What stands before the first message of a conversation."""
        system = self._options.system_prompt
        return [{"role": "system", "content": system}] if system else []

    async def answer(self, messages: Sequence[Message]) -> AsyncGenerator[Piece, None]:
        """Answer the last message of a conversation.

        An answer that is not followed to its end goes on in the worker until the next call, or ``interrupt``.

        Raises:
            UserError: the conversation cannot be put into the model's chat template.
            TandemError: the worker failed.
        """
        if self._busy:
            await self.interrupt()
        prompt = self._tokens(messages)
        request = self._request(prompt)
        stream = TextStream(self._prompter.decode, prompt.tolist() if self.plain else ())
        self._current = Answer(str(messages[-1]["content"]), "", 0, "interrupted", len(prompt), 0.0, 0.0)
        self._busy = True
        await self._worker.send(request)
        while True:
            event = await self._next()
            if not isinstance(event, events.TokensGenerated) or event.id != request.id:
                continue
            text = stream.add(event.tokens.tolist()) + (stream.finish() if event.finished else "")
            current = self._current
            self._current = replace(current, text=current.text + text, tokens=current.tokens + len(event.tokens))
            if event.finished:
                break
            if text:
                yield Piece(text)
        self._busy = False
        self._current = replace(
            self._current,
            finish_reason=event.finished,
            tokens_per_second=event.tokens_per_second,
            prompt_tokens_per_second=event.prompt_tokens_per_second,
        )
        yield Piece(text, self._current)

    async def interrupt(self) -> None:
        """End the answer that the worker is at."""
        self._worker.cancel()
        self._id += 1
        # An empty answer: when it comes, the worker has let go of the one before.
        await self._worker.send(Generate(self._id, np.zeros(0, np.int32), (), max_tokens=0))
        while True:
            event = await self._next()
            if isinstance(event, events.TokensGenerated) and event.id == self._id:
                self._busy = False
                return

    async def close(self) -> None:
        """Take no more events."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
            self._receiving = None

    def _tokens(self, messages: Sequence[Message]) -> Int32:
        if self.plain:
            tokens = self._prompter.text("\n".join(str(message["content"]) for message in messages))
        else:
            tokens = self._prompter.chat(messages, **self._options.template_options)
        if self._vocabulary is not None and int(tokens.max()) >= self._vocabulary:
            raise UserError(
                f"the tokenizer does not fit the model: it gives token {int(tokens.max())}, the model knows "
                f"{self._vocabulary}; use the tokenizer files that belong to this model"
            )
        return tokens

    def _request(self, prompt: Int32) -> Generate:
        options = self._options
        self._id += 1
        return Generate(
            id=self._id,
            prompt=prompt,
            stop=self._stop,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            repetition_context=options.repetition_context,
            seed=secrets.randbits(31) if options.seed is None else options.seed,
        )

    async def _next(self) -> events.Event:
        """The next event. Cancelling this wait loses none: the message under way is kept for the next call."""
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._worker.receive())
        done, _ = await asyncio.wait({self._receiving}, timeout=SILENCE_SECONDS)
        if not done:
            raise WorkerLost(f"the worker said nothing for {SILENCE_SECONDS:.0f} s")
        task, self._receiving = self._receiving, None
        return task.result()


@contextlib.asynccontextmanager
async def open_session(options: GenerateOptions, view: Reader) -> AsyncIterator[Session]:
    """Load a model to answer prompts.

    Args:
        options: which model, and how to answer.
        view: is told of progress and warnings.

    Raises:
        UserError: a mistake in what was asked for.
        TandemError: the worker failed.
    """
    adapter = read_adapter(options.adapter_path) if options.adapter_path else None
    name = model_of(options.model, adapter)
    model = await in_background(
        lambda advance: resolve(name, progress=advance, trust_remote_code=options.trust_remote_code), view
    )
    spec = ModelSpec(str(model.path), str(adapter.path) if adapter else "", options.trust_remote_code)
    # Both take seconds, and neither needs the other.
    loading = asyncio.create_task(asyncio.to_thread(Prompter, model.path, trust_remote_code=options.trust_remote_code))
    try:
        async with task_worker(spec, view) as worker:
            prompter = await loading
            if not options.raw and not prompter.has_chat_template:
                _tell_plain(options, model.name, view)
            session = Session(worker, prompter, options, vocabulary_size(model.path))
            try:
                yield session
            finally:
                await session.close()
    finally:
        await asyncio.gather(loading, return_exceptions=True)


async def generate(options: GenerateOptions, view: Reader) -> AsyncGenerator[Piece, None]:
    """Answer every prompt of the options, in order; the last piece of each answer holds it whole.

    Raises:
        UserError: a mistake in what was asked for.
        TandemError: the worker failed.
    """
    if not options.prompts:
        raise UserError("--prompt: say what to answer")
    async with open_session(options, view) as session:
        for prompt in options.prompts:
            async for piece in session.ask(prompt):
                yield piece


async def answers(options: GenerateOptions, view: Reader) -> tuple[Answer, ...]:
    """The whole answers to every prompt of the options."""
    return tuple([piece.answer async for piece in generate(options, view) if piece.answer is not None])


class Chat:
    """A conversation that remembers what was said."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._messages = session.opening()

    async def say(self, text: str) -> AsyncGenerator[Piece, None]:
        """Answer a message; whatever was said of the answer is remembered, even when it is cut off."""
        self._messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            async for piece in self._session.answer(self._messages):
                said.append(piece.text)
                yield piece
        finally:
            self._messages.append({"role": "assistant", "content": "".join(said)})


def _tell_plain(options: GenerateOptions, name: str, view: Reader) -> None:
    if options.system_prompt:
        raise UserError(f"--system-prompt: {name} has no chat template to put it in; write it into the prompt")
    view.handle(Noted("plain_text", f"{name} has no chat template: prompts are continued as plain text", "warning"))
