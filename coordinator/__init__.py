"""The coordinator: reads data, feeds workers, follows what they say, writes the run's folder.

``from coordinator import train, TrainConfig`` is the Python interface; it is loaded when first used, so that the
command line starts in a moment.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

if "ipykernel.zmqshell" in sys.modules:
    # When the Hub's library loads tqdm, that tells a notebook without ipywidgets of bars that are not shown here. It is
    # loaded now, and not when a training does so in a thread: what is ignored meanwhile is ignored in all threads.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        importlib.import_module("tqdm.auto")

if TYPE_CHECKING:  # what each name below is; `_EXPORTS` says the same when the program runs
    from coordinator.api import fuse, generate, test, train
    from coordinator.callbacks import Callbacks, StopTraining
    from coordinator.config import TrainConfig
    from coordinator.estimates import estimate
    from coordinator.evaluation import TestOptions
    from coordinator.fusing import FuseOptions
    from coordinator.generation import GenerateOptions
    from coordinator.job import RunResult
    from coordinator.listing import FleetNode
    from coordinator.machines import Fleet
    from coordinator.training import Training, start_training
    from node.errors import Interrupted, TandemError, UserError

_EXPORTS = {
    "Callbacks": "coordinator.callbacks",
    "Fleet": "coordinator.machines",
    "FleetNode": "coordinator.listing",
    "FuseOptions": "coordinator.fusing",
    "GenerateOptions": "coordinator.generation",
    "Interrupted": "node.errors",
    "RunResult": "coordinator.job",
    "StopTraining": "coordinator.callbacks",
    "TandemError": "node.errors",
    "TestOptions": "coordinator.evaluation",
    "TrainConfig": "coordinator.config",
    "Training": "coordinator.training",
    "UserError": "node.errors",
    "estimate": "coordinator.estimates",
    "fuse": "coordinator.api",
    "generate": "coordinator.api",
    "start_training": "coordinator.training",
    "test": "coordinator.api",
    "train": "coordinator.api",
}

__all__ = [
    "Callbacks",
    "Fleet",
    "FleetNode",
    "FuseOptions",
    "GenerateOptions",
    "Interrupted",
    "RunResult",
    "StopTraining",
    "TandemError",
    "TestOptions",
    "TrainConfig",
    "Training",
    "UserError",
    "estimate",
    "fuse",
    "generate",
    "start_training",
    "test",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
