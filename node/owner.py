"""What the owner of a machine allows: paused or not, when idle or on battery, how much memory, models' own code."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from node.files import make_private_folder, write_text_atomically
from node.hardware import Run, run_text
from node.info import Battery

IDLE_SECONDS = 300.0
IDLE_LOAD = 0.5
"""Runnable processes per core below which a machine without input devices counts as idle."""
LEAST_MEMORY_BYTES = 64 << 20
"""Below it no job of any kind would fit: such a limit is a slip."""
MEMORY_LIMIT = "TANDEM_MAX_MEMORY_BYTES"
"""Bytes that a worker may use, in the environment that its node gives it."""


def load_per_core() -> float:
    """Runnable processes per core over the last minute; negative when unknown."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return -1.0


def idle_seconds(run: Run = run_text) -> float | None:
    """Time since somebody last used keyboard, mouse or screen of this Mac; None when it cannot be known."""
    shown = run(["ioreg", "-c", "IOHIDSystem", "-d", "4"]) or ""
    match = re.search(r'"HIDIdleTime"\s*=\s*(\d+)', shown)
    return int(match[1]) / 1e9 if match else None


class Owner:
    """The wishes of a machine's owner.

    Args:
        home: the ``TANDEM_HOME``; being paused outlives the program.
        max_memory_bytes: for a worker; 0 sets no limit.
        only_when_idle: take jobs only while nobody uses the machine.
        allow_battery: take jobs on battery power, too.
        trusts_code: let models' own Python files come here and run, where their coordinators want it, too.
        idle: how long nobody has, or None where that cannot be known; then the load decides.
        load: see ``load_per_core``.
    """

    def __init__(
        self,
        home: Path,
        *,
        max_memory_bytes: int = 0,
        only_when_idle: bool = False,
        allow_battery: bool = False,
        trusts_code: bool = False,
        idle: Callable[[], float | None] | None = None,
        load: Callable[[], float] = load_per_core,
    ) -> None:
        self._mark = home / "paused"
        self.max_memory_bytes = max_memory_bytes
        self.trusts_code = trusts_code
        self._only_when_idle = only_when_idle
        self._allow_battery = allow_battery
        self._idle = idle or (idle_seconds if platform.system() == "Darwin" else lambda: None)
        self._load = load

    @property
    def paused(self) -> bool:
        """Whether the owner has said ``node pause``."""
        return self._mark.exists()

    def pause(self, *, paused: bool) -> None:
        """Take no further jobs, or take them again."""
        if paused:
            make_private_folder(self._mark.parent)
            write_text_atomically(self._mark, "")
        else:
            self._mark.unlink(missing_ok=True)

    @property
    def waits_for(self) -> str:
        """Why no job is taken just now, as the end of a sentence; "" when one is."""
        if not self._only_when_idle:
            return ""
        idle = self._idle()
        if idle is not None:
            return "" if idle >= IDLE_SECONDS else "takes jobs only when nobody has used it for five minutes"
        return "" if self._load() < IDLE_LOAD else "takes jobs only when it has nothing else to do"

    def waits_for_mains(self, on_battery: Battery) -> str:
        """Why no job is taken on this power, as the end of a sentence; "" when one is. The unknown is no reason."""
        if self._allow_battery or on_battery != "yes":
            return ""
        return "runs on battery power (node serve --allow-battery takes jobs all the same)"

    def environment(self) -> dict[str, str]:
        """What a worker must know of it."""
        return {MEMORY_LIMIT: str(self.max_memory_bytes)} if self.max_memory_bytes else {}
