"""The coordinator: reads data, feeds workers, follows what they say, writes the run's folder.

``from coordinator import train, TrainConfig`` is the Python interface; it is loaded when first used, so that the
command line starts in a moment.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {"train": "coordinator.api", "TrainConfig": "coordinator.config"}

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
