"""A run in the background, and the handle by which a script, a notebook or an asyncio program holds it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Any

from coordinator.callbacks import Callbacks, CallbacksLike, as_tuple, call_back
from coordinator.config import TrainConfig
from coordinator.event_log import EventLog
from coordinator.given import check_given, check_view
from coordinator.job import RunResult, Stopped
from coordinator.job import train as run_job
from coordinator.loop_thread import CANCELLED_SECONDS, LoopThread, left_at_once
from coordinator.resume import taken_up
from coordinator.stream import Broadcast, Reader, RunEvent, RunStarted, StepFinished

AWAKE_SECONDS = 0.5
CALLBACK_SECONDS = 2.0
"""For a callback to return when the run was aborted."""


class Training:
    """A run that goes on in the background; made by ``start_training``.

    Iterating over it, by ``for`` or ``async for``, gives its events from the first on, and ends when the run does;
    several may do so at once, and one that reads far too slowly is told how many it missed. ``await`` gives its result;
    whoever is cancelled meanwhile stops the run. As a context manager, ``with`` or ``async with``, it is waited for at
    the end of the block, and stopped when the block fails.

    A program that ends before the run does stops it: the state is saved, and a line on stderr says so.

    Attributes:
        config: the options.
        stopped: how it was stopped before its end, or None; the message says where, and what is saved.
    """

    def __init__(
        self,
        config: TrainConfig,
        view: Reader | None,
        *,
        resume: bool,
        callbacks: tuple[Callbacks, ...] = (),
        nodes: str | None = None,
    ) -> None:
        check_given("config", config, TrainConfig, "a TrainConfig(model=..., data=...)")
        check_view(view)
        options = taken_up(config) if resume else config
        self.config = options if nodes is None else dataclasses.replace(options, nodes=nodes)
        self.stopped: Stopped | None = None
        self._view = view
        self._resume = resume
        self._callbacks = callbacks
        self._callback_error: BaseException | None = None
        self._left = ""
        self._log = EventLog()
        self._stop = asyncio.Event()
        self._stop_asked = False
        self._aborted = False
        self._work = LoopThread(self._run, f"training {config.adapter_path}", self.stop, self._last_words)
        # However it ends, and if it never began: nobody waits for more.
        self._work.outcome.add_done_callback(lambda _: self._log.close())

    # --- its end --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._work.outcome.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; an interrupt ends the waiting only.

        Args:
            timeout: seconds to wait at most; None as long as it takes.

        Returns:
            Whether it has ended.
        """
        return self._work.wait(timeout)

    def result(self, timeout: float | None = None) -> RunResult:
        """Wait for the result; an interrupt (Ctrl-C, a notebook's stop button) stops the run, too.

        Args:
            timeout: seconds to wait at most; None as long as it takes.

        Returns:
            How it ended; ``status`` is ``interrupted`` when it was stopped before its end.

        Raises:
            TimeoutError: it has not ended yet.
            UserError: a mistake in what was asked for; nothing was written.
            Interrupted: it was aborted.
            TandemError: the run failed.
        """
        try:
            return self._work.outcome.result(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise

    def stop(self) -> None:
        """Ask it to finish the running step, save its state and end; returns at once. ``resume`` goes on later."""
        self._stop_asked = True
        self._work.call(self._stop.set)

    def abort(self) -> None:
        """Have it end at once, and save nothing more: what is on disk is whole. Returns at once.

        A callback that does not return within two seconds is left behind in its thread, which the result's error says.
        """
        self._aborted = True
        # In this order: a run that is only asked to stop first may save its state and end before it is cancelled.
        self._work.cancel()
        self.stop()

    # --- events ---------------------------------------------------------------------------------------------------

    @property
    def events(self) -> tuple[RunEvent, ...]:
        """What it has told so far; of a very long run the last part."""
        return tuple(self._log.since(0)[0])

    def __iter__(self) -> Iterator[RunEvent]:
        return iter(self._log)

    def __aiter__(self) -> AsyncIterator[RunEvent]:
        return aiter(self._log)

    def __repr__(self) -> str:
        events = self.events
        begun = next((event for event in reversed(events) if isinstance(event, RunStarted)), None)
        last = next((event for event in reversed(events) if isinstance(event, StepFinished)), None)
        state = "running"
        if self.done:
            failure = self._work.outcome.exception()
            state = self._work.outcome.result().status if failure is None else f"failed: {failure}"
        where = f", step {last.step} of {begun.total_steps}, loss {last.loss:.4g}" if begun and last else ""
        return f"<Training {self.config.adapter_path}: {state}{where}>"

    # --- as a context, and awaited ----------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, RunResult]:
        return self._awaited().__await__()

    async def _awaited(self) -> RunResult:
        ended = asyncio.wrap_future(self._work.outcome)
        # Who is cancelled does not fetch it.
        ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        try:
            # A notebook's kernel heeds its stop button only when its loop wakes up for something else.
            while not (await asyncio.wait([ended], timeout=AWAKE_SECONDS))[0]:
                pass
            return ended.result()
        except asyncio.CancelledError:
            self.stop()
            raise

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._leave()
            return
        try:
            self.result()
        except KeyboardInterrupt:
            self._leave()
            raise

    def _leave(self) -> None:
        """Stop, and wait for that; at once when one is interrupted meanwhile."""
        self.stop()
        try:
            self.wait(CANCELLED_SECONDS if self._aborted else None)
        except KeyboardInterrupt:
            self.abort()
            self.wait(CANCELLED_SECONDS)
            raise

    async def __aenter__(self) -> Training:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            await self._leave_async()
            return
        try:
            await self
        except asyncio.CancelledError:
            await self._leave_async()
            raise

    async def _leave_async(self) -> None:
        self.stop()
        try:
            ended: asyncio.Future[Any] = asyncio.gather(asyncio.wrap_future(self._work.outcome), return_exceptions=True)
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            self.abort()
            raise

    # --- inside -----------------------------------------------------------------------------------------------------

    def start(self) -> Training:
        """Begin; ``start_training`` has done so."""
        self._work.start()
        return self

    async def _run(self) -> RunResult:
        """The whole run, in its own thread and loop."""
        if self._stop_asked:
            self._stop.set()
        called = self._begin_to_call() if self._callbacks else None
        view = Broadcast([self._log] if self._view is None else [self._view, self._log])
        try:
            result = await run_job(self.config, view, resume=self._resume, stop=self._stop)
        except Stopped as stopped:
            self.stopped, result = stopped, stopped.result
        finally:
            self._log.close()
            if called is not None:
                await self._until_called(called)
            if self._callback_error is not None:
                raise self._callback_error
        return result

    def _begin_to_call(self) -> asyncio.Event:
        """Call the callbacks in a thread of their own; the event is set when all has been told.

        One that hangs keeps neither an executor of the loop nor the program from ending.
        """
        loop, called = asyncio.get_running_loop(), asyncio.Event()

        def follow() -> None:
            try:
                call_back(itertools.takewhile(lambda _: not self._left, self._log), self._callbacks, self.stop)
            except BaseException as error:
                if self._left:  # nobody asks for it any more
                    raise
                self._callback_error = error
                self.stop()
            with contextlib.suppress(RuntimeError):  # its loop has ended without it
                loop.call_soon_threadsafe(called.set)

        threading.Thread(target=follow, name=f"{self._work.name}: callbacks", daemon=True).start()
        return called

    async def _until_called(self, called: asyncio.Event) -> None:
        """Wait until the callbacks have been told all; a moment only when the run is aborted, also meanwhile.

        Raises:
            Interrupted: one of them is left behind.
        """
        task = asyncio.current_task()
        assert task is not None
        waiting = asyncio.ensure_future(called.wait())
        while not waiting.done():
            with contextlib.suppress(asyncio.CancelledError):  # `cancelling` tells it
                await asyncio.wait([waiting], timeout=CALLBACK_SECONDS if task.cancelling() else None)
                if not waiting.done():
                    self._left = "a callback has not returned; it is left behind in its thread, and is told no more"
                    raise left_at_once(self._work.name, self._left)
        if task.cancelling():
            raise asyncio.CancelledError

    def _last_words(self) -> str:
        return "; ".join(filter(None, (str(self.stopped or ""), self._left)))


def start_training(
    config: TrainConfig, view: Reader | None = None, *, resume: bool = False, callbacks: CallbacksLike = ()
) -> Training:
    """Begin to fine-tune a model in the background.

    Args:
        config: all options.
        view: follows the run, in the run's own thread; must not take long. None shows nothing.
        resume: go on with the run in ``config.adapter_path``, from the newest state that anyone holds, and with its
            own options where ``config`` has defaults.
        callbacks: called in another thread of their own.

    Raises:
        UserError: an argument is not of the kind that is expected; other mistakes are told by the result.
    """
    return Training(config, view, resume=resume, callbacks=as_tuple(callbacks)).start()
