"""Blocking work beside the event loop: its progress goes to the reader, and Ctrl-C ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from coordinator.stream import DOWNLOADING, Advanced, Reader
from node.errors import Interrupted

_T = TypeVar("_T")
Progress = Callable[[str, int, int], None]


async def in_background(work: Callable[[Progress], _T], reader: Reader) -> _T:
    """Run a function in a thread.

    Args:
        work: is given the function to report progress to, which raises when the caller was cancelled meanwhile.
        reader: is told of the progress.
    """
    cancelled = False

    def advance(task: str, done: int, total: int) -> None:
        if cancelled:
            raise Interrupted("stopped")
        reader.handle(Advanced(task, done, total, in_bytes=task == DOWNLOADING))

    try:
        return await asyncio.to_thread(work, advance)
    except asyncio.CancelledError:
        cancelled = True
        raise
