"""What a person sees of a run. Every view reads the event stream and never talks to the job."""

from __future__ import annotations

import os
import sys
from typing import Literal

from coordinator.stream import Reader
from coordinator.view.plain import JsonView, PlainView

ViewMode = Literal["auto", "plain", "json", "quiet"]


def make_view(mode: ViewMode = "auto", total_memory_bytes: int = 0, dashboard: str = "") -> Reader:
    """The view on standard output that was asked for.

    Args:
        mode: ``auto`` draws in a terminal and writes plain lines elsewhere.
        total_memory_bytes: of this machine, for the colour of the memory in use; 0 when it is not known.
        dashboard: the address of the run's page, which what is drawn keeps in sight; "" where there is none.
    """
    if mode == "json":
        return JsonView(sys.stdout)
    if mode == "auto" and _can_draw():
        # rich takes a while to import, and only a terminal needs it.
        from coordinator.view.terminal import TerminalView

        return TerminalView(total_memory_bytes=total_memory_bytes, dashboard=dashboard)
    return PlainView(sys.stdout, quiet=mode == "quiet")


def _can_draw() -> bool:
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in {"", "dumb"} and encoding == "utf8"
