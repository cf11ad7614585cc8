"""``--report-to``: the run's figures for experiment trackers, under the names that ``mlx_lm`` gives them."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from coordinator.stream import Noted, Reader, RunEvent, RunFinished, RunStarted, StepFinished, Tested, Validated
from coordinator.view.format import finite, number
from coordinator.view.state import RunState
from node.errors import UserError

BYTES_PER_GB = 1e9  # mlx_lm reports decimal gigabytes to trackers
NAMES = ("wandb", "swanlab", "tensorboard")
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where figures go; any method may raise whatever its package raises."""

    def begin(self, first_iteration: int) -> None:
        """The run begins; figures of this and later iterations, from a run that was cut off, no longer count."""

    def log(self, figures: dict[str, float], iteration: int) -> None:
        """Keep some figures."""

    def close(self, *, failed: bool) -> None:
        """Send what is left; called once."""


class WandbTracker:
    """Weights & Biases; its own settings (``WANDB_MODE``, the key, …) apply."""

    def __init__(self, package: ModuleType, project: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        self._package = package
        package.init(project=project, name=folder.name, dir=str(folder), config=dict(config))

    def begin(self, first_iteration: int) -> None:
        """Every session is a run of its own there."""

    def log(self, figures: dict[str, float], iteration: int) -> None:
        self._package.log(figures, step=iteration)

    def close(self, *, failed: bool) -> None:
        self._package.finish(exit_code=int(failed))


class SwanlabTracker:
    """SwanLab; its own settings apply."""

    def __init__(self, package: ModuleType, project: str | None, folder: Path, config: Mapping[str, Any]) -> None:
        self._package = package
        package.init(project=project, experiment_name=folder.name, logdir=str(folder / "swanlog"), config=dict(config))

    def begin(self, first_iteration: int) -> None:
        """Every session is a run of its own there."""

    def log(self, figures: dict[str, float], iteration: int) -> None:
        self._package.log(figures, step=iteration)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  what failed is in the notes of the run
        self._package.finish()


class TensorboardTracker:
    """Event files in the run's folder, for ``tensorboard --logdir``."""

    def __init__(self, package: ModuleType, project: str | None, folder: Path, config: Mapping[str, Any]) -> None:  # noqa: ARG002
        self._events = importlib.import_module(f"{package.__name__}.compat.proto.event_pb2")
        self._summaries = importlib.import_module(f"{package.__name__}.compat.proto.summary_pb2")
        writers = importlib.import_module(f"{package.__name__}.summary.writer.event_file_writer")
        self._writer = writers.EventFileWriter(str(folder / "tensorboard"))

    def begin(self, first_iteration: int) -> None:
        if first_iteration > 1:
            session = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(self._events.Event(session_log=session, step=first_iteration))

    def log(self, figures: dict[str, float], iteration: int) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=iteration, summary=summary))

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  files have no status
        self._writer.close()


TRACKERS: dict[str, Callable[[ModuleType, str | None, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "swanlab": SwanlabTracker,
    "tensorboard": TensorboardTracker,
}


class Reporter:
    """Feeds a tracker from the run's events. A tracker that fails is told of once and then left alone.

    Args:
        name: of the tracker.
        tracker: where figures go.
        warn: told of the failure.
    """

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[Noted], None]) -> None:
        self._name = name
        self._tracker = tracker
        self._warn = warn
        self._state = RunState()
        self._failed_run = True
        self._quiet = False

    def handle(self, event: RunEvent) -> None:
        if isinstance(event, RunStarted) and event.recovered:
            # As they would have come: a tracker has heard of none of them.
            late = {step.metrics["step"] for step in event.recovered}
            told = tuple(entry for entry in event.history if "loss" not in entry or entry.get("step") not in late)
            self.handle(dataclasses.replace(event, history=told, recovered=()))
            for step in event.recovered:
                self.handle(step)
            return
        state = self._state
        state.apply(event)
        match event:
            case RunStarted():
                self._try(lambda: self._tracker.begin(state.iterations + 1))
            case StepFinished(metrics, True):
                self._log(train_figures(metrics, state))
            case Validated(metrics):
                found = {"val_loss": metrics.get("val_loss"), "val_time": metrics.get("seconds")}
                self._log(found)
            case Tested(loss):
                self._log({"test_loss": loss})
            case RunFinished(status):
                self._failed_run = status == "failed"

    def close(self) -> None:
        self._try(lambda: self._tracker.close(failed=self._failed_run))

    def _log(self, figures: Mapping[str, object]) -> None:
        known = {name: found for name, value in figures.items() if (found := number(value)) is not None}
        iteration = self._state.iterations
        self._try(lambda: self._tracker.log({"iteration": iteration, **known}, iteration))

    def _try(self, action: Callable[[], None]) -> None:
        if self._quiet:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001  a tracker's network may fail in any way; the run goes on
            self._quiet = True
            message = f"--report-to {self._name} stopped working ({_reason(error)}); training goes on without it"
            self._warn(Noted("warning", message, "warning", {"reporter": self._name}))


def train_figures(metrics: Mapping[str, Any], state: RunState) -> dict[str, object]:
    """The figures of one report, named as ``mlx_lm`` names them; peak memory in GB of 10^9 bytes."""
    per_step = state.seconds_per_step
    batches_per_step = state.iterations / state.step if state.step else 1.0
    peak = finite(metrics.get("peak_memory_bytes"))
    return {
        "train_loss": state.training_loss,
        "learning_rate": metrics.get("learning_rate"),
        "grad_norm": metrics.get("grad_norm"),
        "iterations_per_second": batches_per_step / per_step if per_step else None,
        "tokens_per_second": state.tokens_per_second,
        "trained_tokens": state.trained_tokens,
        "peak_memory": peak / BYTES_PER_GB if peak is not None else None,
    }


def check_reporters(names: str | Sequence[str] | None) -> dict[str, ModuleType]:
    """Import the trackers' packages.

    Args:
        names: ``wandb,tensorboard`` or a list; None or "" for none.

    Returns:
        The packages by name.

    Raises:
        UserError: a name is unknown or its package is not installed.
    """
    parts = names.split(",") if isinstance(names, str) else list(names or ())
    wanted = list(dict.fromkeys(part.strip().lower() for part in parts if part.strip()))
    for name in wanted:
        if name not in TRACKERS:
            raise UserError(f"--report-to {name}: unknown; choose from {', '.join(NAMES)}")
    return {name: _package(name) for name in wanted}


def make_reporters(
    names: str | Sequence[str] | None,
    project_name: str | None,
    folder: Path,
    config: Mapping[str, Any],
    warn: Callable[[Noted], None] | None = None,
) -> list[Reader]:
    """Open the trackers that ``--report-to`` names. Call it before a view draws: a tracker may ask for a login.

    Args:
        names: ``wandb,tensorboard`` or a list; None or "" for none.
        project_name: the project in the tracker.
        folder: the run's folder: its name becomes the run's name, and local files go there.
        config: every option, resolved.
        warn: told when a tracker stops working during the run; by default the log is.

    Raises:
        UserError: a name is unknown, its package is not installed, or it could not be opened.
    """
    readers: list[Reader] = []
    for name, package in check_reporters(names).items():
        try:
            tracker = TRACKERS[name](package, project_name, folder, config)
        except Exception as error:
            for reader in readers:
                reader.close()
            raise UserError(f"--report-to {name} could not start: {_reason(error)}") from error
        readers.append(Reporter(name, tracker, warn or _to_log))
    return readers


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--report-to {name} needs the package {name}; install it: pip install {name}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _to_log(note: Noted) -> None:
    log.warning(note.message)
