"""The coordinator is killed: nodes keep what they have, and any of them is enough to go on without losing a step."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import time
from pathlib import Path

import pytest

from coordinator.api import train
from coordinator.checkpoint import Checkpoints
from coordinator.config import TrainConfig
from coordinator.config_file import write_yaml
from coordinator.specs import MOST_REPLAYED_STEPS
from node.client import NodeClient
from node.copies import StateCopy
from node.errors import TandemError
from node.info import NodeInfo
from tests.fixtures.nodes import ServingNode, serving
from tests.fixtures.runs import (
    Run,
    assert_same_losses,
    losses,
    metrics,
    notes,
    validations,
    wait_for_end,
)

ITERS = 60
FREE_SECONDS = 15.0


def options(inputs: Path, adapter: Path) -> TrainConfig:
    """Checkpoints are rare: what is not lost is not lost because somebody holds it."""
    return TrainConfig(
        model=str(inputs / "model"),
        data=str(inputs / "data"),
        adapter_path=str(adapter),
        iters=ITERS,
        batch_size=5,
        learning_rate=1e-4,
        warmup=6,
        num_layers=-1,
        lora_dropout=0.1,
        save_every=40,
        steps_per_eval=14,
        force_all=True,
    )


def arguments(inputs: Path, adapter: Path, *more: str) -> list[str]:
    file = adapter.with_suffix(".yaml")
    file.write_text(write_yaml(options(inputs, adapter)))
    return ["train", "-c", str(file), *more]


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one machine, undisturbed."""
    folder = tmp_path_factory.mktemp("reference") / "adapters"
    train(dataclasses.replace(options(inputs, folder), nodes="local"))
    return folder


def assert_same_curve(folder: Path, reference: Path) -> None:
    assert_same_losses(losses(folder), losses(reference), 1e-4)
    assert_same_losses(validations(folder), validations(reference), 1e-4)


def ask(node: ServingNode, run: str) -> tuple[NodeInfo, StateCopy | None]:
    """How the node is, and what it holds of a run; it answers when it has ended what it did for that run."""

    async def both() -> tuple[NodeInfo, StateCopy | None]:
        client = NodeClient(node.address, node.name, node.certificate)
        try:
            held = await client.held(run, FREE_SECONDS)
            return await client.describe(), held
        finally:
            await client.close()

    return asyncio.run(both())


def kill_coordinator(run: Run, nodes: list[ServingNode]) -> dict[str, int]:
    """kill -9; the step that each node holds then. Fails unless their workers end within seconds."""
    (started,) = (event for event in run.events if event["event"] == "started")
    workers = [pid for node in nodes for pid in node.worker_pids()]
    assert len(workers) >= len(nodes)
    began = time.monotonic()
    run.kill()
    for pid in workers:
        wait_for_end(pid)
    answers = {node.name: ask(node, started["run"]) for node in nodes}
    assert time.monotonic() - began < FREE_SECONDS
    assert not any(info.busy for info, _ in answers.values())
    steps = {}
    for name, (_, held) in answers.items():
        assert held is not None, f"{name} holds nothing"
        steps[name] = held.step
    return steps


def taken_up(folder: Path) -> list[tuple[int, str]]:
    return [(note["step"], note["holder"]) for note in notes(folder, "taken_up")]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_nodes_hold_what_they_have_and_any_of_them_is_enough(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    with serving(tmp_path, "anna", "ben") as (anna, ben):
        both = f"{anna.address},{ben.address}"
        run = Run(*arguments(inputs, folder, "--nodes", both, "--no-local"))
        run.until_step(15)
        first = kill_coordinator(run, [anna, ben])
        assert not list((folder / "checkpoints").glob("*")), "nothing was saved yet"
        recorded = losses(folder)[-1][0]
        assert 15 <= recorded <= min(first.values())

        # One of the two goes on, without any checkpoint.
        run = Run("train", "--resume", "--adapter-path", folder, "--nodes", ben.address, "--no-local")
        run.until_step(recorded + 8)
        assert taken_up(folder) == [(first["ben"], "ben")]
        second = kill_coordinator(run, [ben])
        assert ask(anna, run_id(run))[1] is not None

        # Both again: the newer state is ben's.
        run = Run("train", "--resume", "--adapter-path", folder, "--nodes", both, "--no-local")
        code, errors = run.wait()
        assert code == 0, errors
        assert taken_up(folder)[1:] == [(second["ben"], "ben")]
        assert {entry["nodes"] for entry in metrics(folder)[-5:] if "loss" in entry} == {2}
        assert not notes(folder, "replay")
        assert [ask(node, run_id(run))[1] for node in (anna, ben)] == [None, None], "the run is over"
    assert_same_curve(folder, reference)


def run_id(run: Run) -> str:
    (started,) = (event for event in run.events if event["event"] == "started")
    return str(started["run"])


@pytest.mark.timeout(200)
def test_a_copy_that_a_killed_coordinators_own_worker_left_is_gone_on_from(
    inputs: Path, reference: Path, tmp_path: Path, tandem_home: Path
) -> None:
    folder = tmp_path / "adapters"
    run = Run(*arguments(inputs, folder, "--nodes", "local"))
    run.until_step(21)
    run.kill()
    recorded = losses(folder)[-1][0]
    result = train(dataclasses.replace(options(inputs, folder), nodes="local"), resume=True)
    ((step, holder),) = taken_up(folder)
    assert holder == "this machine"
    assert result.replayed_steps == max(0, recorded - step) <= MOST_REPLAYED_STEPS
    assert losses(folder) == losses(reference)
    assert validations(folder) == validations(reference)
    assert not [path for path in (tandem_home / "held").iterdir() if path.is_dir()], "the run is over"


@pytest.mark.parametrize("where", ["this machine", "ben"])
def test_a_run_that_could_save_nothing_loses_nothing(
    inputs: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "adapters"
    short = dataclasses.replace(options(inputs, folder), iters=20)
    with contextlib.ExitStack() as stack:
        config = dataclasses.replace(short, nodes="local")
        if where == "ben":
            (ben,) = stack.enter_context(serving(tmp_path, "ben"))
            config = dataclasses.replace(short, nodes=ben.address, local=False)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", full)
            with pytest.raises(TandemError, match="make room on the disk and go on with --resume"):
                train(config)
        result = train(dataclasses.replace(config, iters=24), resume=True)
    assert taken_up(folder) == [(20, where)]
    assert result.replayed_steps == 0
    assert_same_losses(losses(folder), losses(reference)[:24], 1e-4)
