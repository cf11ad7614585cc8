"""Work with an event loop of its own, in a thread: beside a notebook's loop, an asyncio program, or a plain script."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import concurrent.futures.thread  # registers its own end before ours, so that ours comes first
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from node.errors import Interrupted

_T = TypeVar("_T")

EXIT_SECONDS = 120.0
"""For work to end by itself when the program ends, and to save what it has."""
CANCELLED_SECONDS = 30.0
"""For what was cancelled to end."""


class LoopThread(Generic[_T]):
    """One coroutine in a thread of its own.

    Args:
        make: makes the coroutine, in that thread.
        name: what it is, for people.
        stop: asks it to end by itself; None cancels it. Called when the program ends before the work does.
        last_words: what to tell a person when that has happened, or "".

    Attributes:
        outcome: its result. Who was cancelled failed by ``Interrupted``.
    """

    def __init__(
        self,
        make: Callable[[], Coroutine[Any, Any, _T]],
        name: str,
        stop: Callable[[], None] | None = None,
        last_words: Callable[[], str] = str,
    ) -> None:
        self._make = make
        self.name = name
        self.stop = stop or self.cancel
        self.last_words = last_words
        self.outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
        self._reach: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._cancelled = False
        # Not waited for by the interpreter itself: `_end_all` asks it to end, and bounds the waiting.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self.outcome.set_running_or_notify_cancel()  # from now on nobody else cancels it
        _living.add(self)
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> None:
        """Have a function called in the work's loop, if it runs. Takes no lock: for signal handlers, too."""
        reach = self._reach
        if reach is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended meanwhile
                reach[0].call_soon_threadsafe(function)

    def cancel(self) -> None:
        """Cancel the coroutine, also before it has begun. For signal handlers, too."""
        self._cancelled = True
        reach = self._reach
        if reach is not None:
            self.call(reach[1].cancel)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; whether it has come."""
        return bool(concurrent.futures.wait([self.outcome], timeout).done)

    async def _main(self) -> _T:
        task = asyncio.current_task()
        assert task is not None
        self._reach = asyncio.get_running_loop(), task
        if self._cancelled:
            raise asyncio.CancelledError
        return await self._make()

    def _run(self) -> None:
        try:
            result = asyncio.run(self._main())
        except asyncio.CancelledError:
            self.outcome.set_exception(left_at_once(self.name))
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(result)
        finally:
            _living.discard(self)


def left_at_once(name: str, left: str = "") -> Interrupted:
    """What work that was cancelled ends by.

    Args:
        name: of the work.
        left: what goes on without it, or "".
    """
    return Interrupted(f"{name}: left at once; what is on disk is whole{f'; {left}' if left else ''}")


_living: set[LoopThread[Any]] = set()


def _end_all() -> None:
    """The program ends: so does all that it has left running, in order."""
    living = tuple(_living)
    for work in living:
        work.stop()
    for work in living:
        if not work.wait(EXIT_SECONDS):
            work.cancel()
            work.wait(CANCELLED_SECONDS)
        if told := work.last_words():
            sys.stderr.write(f"{work.name}: the program ended first; {told}\n")


# `atexit` is too late: no thread starts any more by then, and saving a state needs some.
getattr(threading, "_register_atexit", atexit.register)(_end_all)


def run_to_end(make: Callable[[], Coroutine[Any, Any, _T]], name: str = "coordinator") -> _T:
    """Run a coroutine, also where an event loop is running already (a notebook); Ctrl-C cancels it.

    Args:
        make: makes the coroutine.
        name: what it is, for people.
    """
    work = LoopThread(make, name)
    work.start()
    try:
        return work.outcome.result()
    except KeyboardInterrupt:
        work.cancel()
        work.wait(CANCELLED_SECONDS)
        raise
