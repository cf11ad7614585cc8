"""Runs that were never trained: what they would have left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coordinator.config import TrainConfig
from coordinator.config_file import write_yaml
from coordinator.runfolder import Recorder, RunFolder
from coordinator.running import index
from coordinator.stream import RunEvent, RunFinished, RunStarted, StepFinished, Validated

SUMMARY = (("adapter", "adapters"),)
COMMANDS = (("try it", "coordinator generate"),)


def started(run: str, steps: int, first: int = 1) -> RunStarted:
    return RunStarted(run, "adapters", {}, steps, steps, first, (("model", "tiny"), ("data", "30 rows")))


def step(number: int, loss: float) -> StepFinished:
    return StepFinished({"step": number, "iter": number, "loss": loss, "tokens": 10, "seconds": 0.5}, report=False)


def validation(number: int, loss: float) -> Validated:
    return Validated({"step": number, "val_loss": loss, "val_tokens": 5, "seconds": 0.1}, best=False)


def events_of(run: str, losses: list[float]) -> list[RunEvent]:
    """A whole run: a validation before the first step and after the last."""
    trained = [step(i + 1, loss) for i, loss in enumerate(losses)]
    last = validation(len(losses), losses[-1] + 0.1)
    finished = RunFinished("done", SUMMARY, COMMANDS)
    return [started(run, len(losses)), validation(0, 9.0), *trained, last, finished]


def write(folder: Path, events: list[RunEvent]) -> None:
    """Have these written to a run's folder."""
    recorder = Recorder(RunFolder(folder), print)
    for event in events:
        recorder.handle(event)


def make_run(run: str, folder: Path, losses: list[float], status: str = "done", **options: Any) -> Path:
    """A run's folder and its entry in the index; an older run's files go to ``previous/``."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = RunFolder(folder)
    kept.archive()
    config = TrainConfig(model="tiny", adapter_path=str(folder), iters=len(losses), steps_per_report=2, **options)
    kept.begin(run, write_yaml(config))
    (folder / "adapters.safetensors").write_text("weights")
    events = events_of(run, losses)
    write(folder, events if status == "done" else events[:-1])
    facts = {"final_loss": losses[-1], "steps": len(losses)} if status == "done" else {}
    index.record(run, folder=str(folder), model="tiny", data="data", total_steps=len(losses), status=status, **facts)
    return folder


def entry(run: str) -> dict[str, Any]:
    """What the index says of a run."""
    found = json.loads(index.entry_path(run).read_text())
    assert isinstance(found, dict)
    return found
