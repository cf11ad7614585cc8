"""The coordinator: reads data, feeds workers, follows what they say, writes the run's folder.

``from coordinator import train, TrainConfig`` is the Python interface; it is loaded when first used, so that the
command line starts in a moment.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FuseOptions": "coordinator.fusing",
    "GenerateOptions": "coordinator.generation",
    "TestOptions": "coordinator.evaluation",
    "TrainConfig": "coordinator.config",
    "fuse": "coordinator.api",
    "generate": "coordinator.api",
    "test": "coordinator.api",
    "train": "coordinator.api",
}

__all__ = ["FuseOptions", "GenerateOptions", "TestOptions", "TrainConfig", "fuse", "generate", "test", "train"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
