from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coordinator.stream import Noted, RunFinished, StepFinished, Validated
from coordinator.view.reporters import check_reporters, make_reporters
from node.errors import UserError
from tests.coordinator.view.synthetic import started, step_metrics, validation_metrics, whole_run


class StandIn(ModuleType):
    """What wandb and swanlab have in common at their edge, recorded."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._fails_at = fails_at

    def _called(self, name: str, /, **values: Any) -> None:
        self.calls.append((name, values))
        if name == self._fails_at:
            raise ConnectionError("no route to host\nand a long tail")

    def init(self, **values: Any) -> None:
        self._called("init", **values)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._called("log", figures=figures, at=step)

    def finish(self, **values: Any) -> None:
        self._called("finish", **values)

    def logged(self) -> list[tuple[int, dict[str, float]]]:
        return [(values["at"], values["figures"]) for name, values in self.calls if name == "log"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StandIn:
    module = StandIn("wandb", getattr(request, "param", ""))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_nothing_asked_for_is_nothing(tmp_path: Path) -> None:
    assert make_reporters(None, None, tmp_path, {}) == []
    assert make_reporters(" , ", None, tmp_path, {}) == []


def test_figures_carry_the_names_of_mlx_lm(stand_in: StandIn, tmp_path: Path) -> None:
    (reporter,) = make_reporters("wandb", "sql", tmp_path / "adapters", {"iters": 100})
    for event in whole_run():
        reporter.handle(event)
    reporter.close()
    wanted = {"project": "sql", "name": "adapters", "dir": str(tmp_path / "adapters"), "config": {"iters": 100}}
    assert stand_in.calls[0] == ("init", wanted)
    assert stand_in.calls[-1] == ("finish", {"exit_code": 0})
    figures = stand_in.logged()
    assert figures[0] == (0, {"iteration": 0, "val_loss": pytest.approx(3.3), "val_time": 4.2})
    step, train = figures[1]
    assert step == 10
    assert set(train) == {
        *["iteration", "train_loss", "learning_rate", "grad_norm", "iterations_per_second", "tokens_per_second"],
        *["trained_tokens", "peak_memory"],
    }
    steps = [step_metrics(number) for number in range(1, 11)]
    tokens = sum(metrics["tokens"] for metrics in steps)
    assert train["trained_tokens"] == tokens
    assert train["train_loss"] == pytest.approx(sum(m["loss"] * m["tokens"] for m in steps) / tokens)
    assert train["peak_memory"] == pytest.approx(steps[-1]["peak_memory_bytes"] / 1e9)
    assert figures[-1] == (100, {"iteration": 100, "test_loss": 1.5})
    assert [step for step, _ in figures] == sorted(step for step, _ in figures)


def test_iterations_are_batches_under_accumulation(stand_in: StandIn, tmp_path: Path) -> None:
    (reporter,) = make_reporters(["wandb"], None, tmp_path, {})
    reporter.handle(started(25, total_iters=100))
    for step in range(1, 6):
        reporter.handle(StepFinished(step_metrics(step, iter=4 * step, seconds=2.0), report=step == 5))
    ((iteration, figures),) = stand_in.logged()
    assert iteration == 20
    assert figures["iterations_per_second"] == pytest.approx(2.0)


@pytest.mark.parametrize("stand_in", ["log"], indirect=True)
def test_a_tracker_that_fails_is_told_of_once_and_left_alone(stand_in: StandIn, tmp_path: Path) -> None:
    notes: list[Noted] = []
    (reporter,) = make_reporters("wandb", None, tmp_path, {}, warn=notes.append)
    for event in whole_run():
        reporter.handle(event)
    reporter.close()
    assert len(stand_in.logged()) == 1
    assert [(n.level, n.message) for n in notes] == [
        ("warning", "--report-to wandb stopped working (no route to host); training goes on without it")
    ]


@pytest.mark.parametrize("stand_in", ["init"], indirect=True)
def test_a_tracker_that_cannot_start_is_refused(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--report-to wandb could not start: no route to host$"):
        make_reporters("wandb", None, tmp_path, {})


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("interrupted", 0)])
def test_the_tracker_learns_how_it_ended(stand_in: StandIn, tmp_path: Path, status: str, code: int) -> None:
    (reporter,) = make_reporters("wandb", None, tmp_path, {})
    reporter.handle(RunFinished(status, (), ()))
    reporter.close()
    assert stand_in.calls[-1] == ("finish", {"exit_code": code})


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UserError, match=r"--report-to swanlab needs .* pip install swanlab"):
        make_reporters("wandb,swanlab", None, Path("unused"), {})
    assert stand_in.calls == []


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UserError, match=r"wanbd: unknown; choose from wandb, swanlab, tensorboard"):
        check_reporters("tensorboard,wanbd")


def test_swanlab_is_fed_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = StandIn("swanlab")
    monkeypatch.setitem(sys.modules, "swanlab", module)
    (reporter,) = make_reporters("swanlab", "sql", tmp_path / "adapters", {})
    for event in whole_run():
        reporter.handle(event)
    reporter.close()
    assert module.calls[0][1]["experiment_name"] == "adapters"
    assert module.calls[-1] == ("finish", {})
    assert len(module.logged()) == 17


def read_back(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    (reporter,) = make_reporters("tensorboard", None, tmp_path, {})
    for event in whole_run():
        reporter.handle(event)
    reporter.close()
    scalars = read_back(tmp_path)
    assert list(scalars["train_loss"]) == list(range(10, 101, 10))
    assert scalars["val_loss"][0] == pytest.approx(3.3)
    assert scalars["val_loss"][100] == pytest.approx(validation_metrics(100)["val_loss"])
    assert scalars["learning_rate"][10] == pytest.approx(step_metrics(10)["learning_rate"])
    assert scalars["test_loss"] == {100: 1.5}


def test_steps_that_were_recovered_by_resuming_are_told_too(stand_in: StandIn, tmp_path: Path) -> None:
    history = tuple(step_metrics(step) for step in range(1, 25))
    recovered = tuple(StepFinished(step_metrics(step), report=step % 10 == 0) for step in range(15, 25))
    (reporter,) = make_reporters("wandb", None, tmp_path, {})
    reporter.handle(started(first_step=25, history=history, recovered=recovered))
    for step in range(25, 31):
        reporter.handle(StepFinished(step_metrics(step), report=step % 10 == 0))
    reporter.close()
    assert [step for step, _ in stand_in.logged()] == [20, 30]
    tokens = sum(step_metrics(step)["tokens"] for step in range(1, 31))
    assert stand_in.logged()[-1][1]["trained_tokens"] == tokens, "each step once"


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    for first, history, loss in ((1, (), 9.0), (21, tuple(step_metrics(s) for s in range(1, 21)), 1.0)):
        (reporter,) = make_reporters("tensorboard", None, tmp_path, {})
        reporter.handle(started(first_step=first, history=history))
        for step in range(first, first + 40):
            reporter.handle(StepFinished(step_metrics(step, loss=loss), report=step % 10 == 0))
        reporter.handle(Validated(validation_metrics(first + 39), best=True))
        reporter.close()
    found = read_back(tmp_path)["train_loss"]
    assert found == {10: 9.0, 20: 9.0, 30: 1.0, 40: 1.0, 50: 1.0, 60: 1.0}
