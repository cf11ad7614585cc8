"""Hold a machine's sleep off while a job runs."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from types import TracebackType

PROGRAMS = {"Darwin": "/usr/bin/caffeinate"}
"""What holds sleep off, by system; elsewhere a machine at work is left to its settings."""
ENDING_SECONDS = 5.0


class Awake:
    """This machine does not fall asleep from ``start`` to ``stop``, nor within a ``with`` block.

    The helper ends with this process, however that ends: ``caffeinate -w`` watches it.

    Args:
        program: ``caffeinate``, or what stands in for it; None takes this system's, "" holds nothing off.

    Attributes:
        trouble: why sleep is not held off although it should be, or "".
    """

    def __init__(self, program: str | None = None) -> None:
        self._program = PROGRAMS.get(platform.system(), "") if program is None else program
        self._process: subprocess.Popen[bytes] | None = None
        self.trouble = ""

    def start(self) -> None:
        """Hold sleep off; that it cannot be done is no failure, ``trouble`` says it."""
        if not self._program or self._process is not None:
            return
        try:
            self._process = subprocess.Popen(
                # No idle sleep, neither of the machine nor of its disk; the display may go dark.
                [self._program, "-i", "-m", "-w", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C that asks us to save must not end it
            )
        except OSError as error:
            self.trouble = f"this machine may fall asleep during the job: {self._program}: {error.strerror}"

    def stop(self) -> None:
        """Let it sleep again. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)

    def __enter__(self) -> Awake:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
