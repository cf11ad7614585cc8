"""The first moments of ``coordinator`` and ``tandem``; see ``node.starting``."""

from __future__ import annotations

from collections.abc import Callable

from node.starting import start


def coordinator() -> int:
    """The ``coordinator`` script."""

    def load() -> Callable[[], int]:
        from coordinator.cli import main

        return main

    return start(load)


def tandem() -> int:
    """The ``tandem`` script."""

    def load() -> Callable[[], int]:
        from coordinator.tandem import main

        return main

    return start(load)
