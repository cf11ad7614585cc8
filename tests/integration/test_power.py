"""Runs on the own machine's battery: it is kept awake, told of, never refused; its share follows what presses it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from coordinator.api import train
from coordinator.config import TrainConfig
from coordinator.stream import FleetFormed, Noted, RunEvent, StepFinished
from node import awake, power
from tests.fixtures.awake import FakeCaffeinate
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.runs import write_chat_data

ON_BATTERY = "this machine runs on battery power: plug it in, or the run ends with the battery"


class Told:
    """Keeps what a run says; at each step, which of the helpers so far runs."""

    def __init__(self, fake: FakeCaffeinate) -> None:
        self.fake = fake
        self.events: list[RunEvent] = []
        self.awake: list[list[bool]] = []

    def handle(self, event: RunEvent) -> None:
        self.events.append(event)
        if isinstance(event, StepFinished):
            self.awake.append([call.runs for call in self.fake.calls(1)])

    def close(self) -> None:
        pass

    def lines(self, kind: str) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Noted) and event.kind == kind]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """What is told on a machine that runs on its battery and is short of memory."""
    fake = FakeCaffeinate(tmp_path)
    monkeypatch.setattr(awake, "PROGRAMS", {platform.system(): fake.program})
    monkeypatch.setattr(power, "on_battery", lambda: True)
    monkeypatch.setattr(power, "pressure", lambda: power.Pressure("critical"))
    return Told(fake)


def config(folder: Path, **options: object) -> TrainConfig:
    return TrainConfig(
        model=str(tiny_model(folder / "model", "llama")),
        data=str(write_chat_data(folder / "data")),
        adapter_path=str(folder / "adapters"),
        iters=2,
        val_batches=0,
        **options,  # type: ignore[arg-type]
    )


def test_alone(tmp_path: Path, told: Told) -> None:
    train(config(tmp_path, nodes="local"), told)
    assert told.awake == [[True], [True]]
    (call,) = told.fake.calls(1)
    assert not call.runs
    assert told.lines("battery") == [ON_BATTERY]


def test_with_others(tmp_path: Path, told: Told) -> None:
    with ServingNode("studio", tmp_path / "theirs") as studio:
        train(config(tmp_path, nodes=studio.address, min_nodes=2, force_all=True), told)
    (formed,) = (event for event in told.events if isinstance(event, FleetFormed))
    assert len(formed.members) == 2, "the own machine takes part"
    assert told.awake == [[True, True]] * 2, "for the run, and by the own machine's node"
    assert not any(call.runs for call in told.fake.calls(2))
    assert told.lines("battery") == [ON_BATTERY]
    (line,) = [line for line in told.lines("condition") if not line.startswith("studio")]
    assert line.endswith(": memory pressure is red, it runs on battery power; its share is lowered to 40 %")
