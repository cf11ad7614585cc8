"""Whatever is killed, whenever: the same curve."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.api import train
from coordinator.config import TrainConfig
from coordinator.config_file import read_yaml, write_yaml
from coordinator.specs import MOST_REPLAYED_STEPS
from tests.fixtures.runs import Run, losses, notes, validations, write_chat_data

# More steps than ten rounds of at most four can pass.
ITERS = 96


def options(inputs: Path, adapter: Path) -> TrainConfig:
    return TrainConfig(
        model=str(inputs / "model"),
        data=str(inputs / "data"),
        adapter_path=str(adapter),
        iters=ITERS,
        batch_size=4,
        grad_accumulation_steps=2,
        learning_rate=1e-3,
        lora_dropout=0.1,
        neftune_alpha=5.0,
        num_layers=2,
        save_every=8,
        steps_per_eval=12,
        lr_schedule={"name": "cosine_decay", "arguments": [1e-3, 48], "warmup": 4},
    )


def arguments(inputs: Path, adapter: Path) -> list[str]:
    config = options(inputs, adapter)
    file = adapter.with_suffix(".yaml")
    file.write_text(write_yaml(config))
    return ["train", "-c", str(file)]


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("reference") / "adapters"
    train(options(inputs, folder))
    return folder


def assert_same_curve(folder: Path, reference: Path) -> None:
    assert losses(folder) == losses(reference)
    assert validations(folder) == validations(reference)
    ours, theirs = (load_file(path / "adapters.safetensors") for path in (folder, reference))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_reference_is_complete(reference: Path) -> None:
    assert [step for step, _ in losses(reference)] == list(range(1, ITERS // 2 + 1))
    assert [step for step, _ in validations(reference)] == list(range(0, 49, 6))


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_ten_kills_at_random_times_leave_the_same_curve(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    chance = random.Random(20)
    command = arguments(inputs, folder)
    run = Run(*command)
    replayed = 0
    for round_ in range(10):
        done = max((step for step, _ in losses(folder)), default=0) if folder.exists() else 0
        run.until_step(min(done + chance.randint(1, 4), ITERS // 2 - 1))
        if round_ % 2:
            run.kill_worker()
            event = run.until(lambda event: event.get("kind") == "restarted")
            replayed += event["details"]["replayed_steps"]
            continue
        run.kill()
        resumable = (folder / "checkpoints").exists() and any((folder / "checkpoints").glob("[0-9]*"))
        run = Run("train", "--resume", "--adapter-path", folder) if resumable else Run(*command)
    code, errors = run.wait()
    assert code == 0, errors
    # Five times a worker was killed.
    assert 0 < replayed <= 5 * MOST_REPLAYED_STEPS
    assert_same_curve(folder, reference)


def test_ctrl_c_saves_and_resume_goes_on(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    run = Run(*arguments(inputs, folder))
    run.until_step(5)
    run.interrupt()
    code, errors = run.wait()
    assert code == 130
    assert errors.strip().splitlines() == [errors.strip()], "one line"
    stopped = losses(folder)[-1][0]
    assert f"stopped at step {stopped} of {ITERS // 2}" in errors
    finished = run.events[-1]
    assert finished["event"] == "finished"
    assert finished["status"] == "interrupted"
    command = finished["next_commands"][0][1].split()
    assert command[:2] == ["coordinator", "train"]
    again = Run(*command[1:])
    assert again.wait()[0] == 0
    assert_same_curve(folder, reference)


@pytest.mark.slow
def test_a_terminal_that_closes_saves_too(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    run = Run(*arguments(inputs, folder))
    run.until_step(5)
    for _ in range(2):  # the kernel and the shell both tell the whole process group
        os.killpg(run.process.pid, signal.SIGHUP)
    code, errors = run.wait()
    assert code == 130, errors
    stopped = losses(folder)[-1][0]
    assert f"stopped at step {stopped} of {ITERS // 2}; everything is saved" in errors
    train(options(inputs, folder), resume=True)
    assert_same_curve(folder, reference)


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    newest = max((folder / "checkpoints").glob("[0-9]*"))
    broken = bytearray((newest / "optimizer.safetensors").read_bytes())
    broken[-3] ^= 0xFF
    (newest / "optimizer.safetensors").write_bytes(broken)
    train(dataclasses.replace(options(inputs, folder), warmup=None), resume=True)
    (damage,) = notes(folder, "damaged_checkpoint")
    assert newest.name in damage["message"]
    assert [step for step, _ in losses(folder)] == list(range(1, ITERS // 2 + 1))
    assert_same_curve(folder, reference)


def test_the_last_line_of_the_metrics_may_be_cut_off(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    for checkpoint in sorted((folder / "checkpoints").glob("[0-9]*"))[-2:]:
        shutil.rmtree(checkpoint)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 49, "lo')
    train(options(inputs, folder), resume=True)
    assert_same_curve(folder, reference)


def test_resuming_with_other_data_is_refused(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    other = write_chat_data(tmp_path / "data", seed=1)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(inputs / "data"), str(other)))
    before = (folder / "metrics.jsonl").read_bytes()
    code, errors = Run("train", "--resume", "--adapter-path", folder).wait()
    assert code == 2
    assert "the training data is not what this run began with" in errors
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resuming_with_another_option_is_refused(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    code, errors = Run("train", "--resume", "--adapter-path", folder, "--batch-size", "2").wait()
    assert code == 2
    assert "--batch-size was 4 in this run and cannot become 2" in errors


def test_resume_can_train_further(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    code, errors = Run("train", "--resume", "--adapter-path", folder, "--iters", str(ITERS + 4)).wait()
    assert code == 0, errors
    assert [step for step, _ in losses(folder)] == list(range(1, ITERS // 2 + 3))
    assert losses(folder)[: ITERS // 2] == losses(reference)


def test_an_older_run_is_moved_aside_and_nothing_of_it_is_lost(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    old = json.loads((folder / "run.json").read_text())["run"]
    before = {path.name for path in reference.iterdir()}
    result = train(dataclasses.replace(options(inputs, folder), iters=4))
    assert result.run != old
    kept = folder / "previous" / old
    assert {path.name for path in kept.iterdir()} == before
    assert losses(kept) == losses(reference)
    (archived,) = notes(folder, "archived")
    assert str(kept) in archived["message"]


def test_a_run_from_its_own_folders_older_adapter_survives_its_worker(
    inputs: Path, reference: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    began = load_file(folder / "adapters.safetensors")
    old = json.loads((folder / "run.json").read_text())["run"]
    config = dataclasses.replace(
        options(inputs, folder), iters=8, save_every=100, resume_adapter_file=str(folder / "adapters.safetensors")
    )
    undisturbed = dataclasses.replace(
        config,
        adapter_path=str(tmp_path / "undisturbed"),
        resume_adapter_file=str(reference / "adapters.safetensors"),
    )
    train(undisturbed)
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(config))
    run = Run("train", "-c", file)
    run.until_step(2)
    run.kill_worker()
    code, errors = run.wait()
    assert code == 0, errors
    assert losses(folder) == losses(tmp_path / "undisturbed")
    kept = Path(read_yaml(folder / "config.yaml")["resume_adapter_file"])
    assert kept == folder / "previous" / old / "adapters.safetensors"
    assert all(np.array_equal(began[name], value) for name, value in load_file(kept).items())


def test_steps_that_a_killed_coordinator_had_recorded_are_counted_as_replayed(
    inputs: Path, reference: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    for checkpoint in sorted((folder / "checkpoints").glob("[0-9]*"))[-2:]:
        shutil.rmtree(checkpoint)
    last = int(max((folder / "checkpoints").glob("[0-9]*")).name) // 2
    result = train(options(inputs, folder), resume=True)
    assert result.replayed_steps == ITERS // 2 - last == 8
    (replay,) = notes(folder, "replay")
    assert replay["replayed_steps"] == 8


def test_a_step_that_was_cut_short_by_the_end_cannot_be_taken_up_again(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    train(dataclasses.replace(options(inputs, folder), iters=5))
    code, errors = Run("train", "--resume", "--adapter-path", folder, "--iters", "8").wait()
    assert code == 2
    assert "--iters 8" in errors
    assert "--grad-accumulation-steps 2" in errors


def test_fewer_steps_than_were_done_are_refused_and_said_to_be(inputs: Path, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(reference, folder)
    before = losses(folder)
    code, errors = Run("train", "--resume", "--adapter-path", folder, "--iters", str(ITERS - 1)).wait()
    assert code == 2
    assert f"--iters {ITERS - 1}: the run has done {ITERS} already; give more to go on" in errors
    assert losses(folder) == before
