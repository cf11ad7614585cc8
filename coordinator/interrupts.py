"""Ctrl-C while a script or a notebook's cell waits for a run: the first stops it in order, the second at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A ``with`` block in which signals stop a run. In other threads than the main one, none can be caught.

    Args:
        stop: asks the run to save and end; takes no lock.
        abort: has it end at once; likewise.

    Attributes:
        pressed: whether a signal came.
    """

    def __init__(self, stop: Callable[[], None], abort: Callable[[], None]) -> None:
        self._stop = stop
        self._abort = abort
        self._before: dict[signal.Signals, Any] = {}
        self.pressed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.pressed:
            self.pressed = True
            self._stop()
        elif number != signal.SIGHUP:  # a closing terminal tells its programs more than once
            self._abort()
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # nohup is meant to outlive its terminal.
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    with contextlib.suppress(ValueError):  # not the main interpreter
                        self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            # None: a handler that was not set by Python, and that it cannot put back.
            signal.signal(number, signal.SIG_DFL if before is None else before)
