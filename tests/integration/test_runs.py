"""Runs beside the terminal: detached, watched, stopped, killed, listed. Every process is a real one."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.running import control, presence
from coordinator.running.index import log_path
from coordinator.view.records import read_run
from node.errors import UserError
from tests.fixtures.runs import ENTRY, Run, losses, wait_for_end

ENDLESS = 1_000_000
COMMAND = [sys.executable, "-P", "-c", ENTRY]


def options(inputs: Path, iters: int) -> list[str]:
    return [
        *("--model", str(inputs / "model"), "--data", str(inputs / "data"), "--iters", str(iters)),
        *("--nodes", "local", "--num-layers", "2", "--steps-per-eval", "10", "--save-every", "20"),
    ]


def coordinator(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of ours that must not hang."""
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False, timeout=200
    )


def data(*words: str | Path, cwd: Path) -> Any:
    done = coordinator(*words, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """No run outlives its test."""
    yield
    for holder in presence.find_all():
        try:
            control.stop_now(holder.run)
        except UserError:
            continue


def detached(inputs: Path, cwd: Path, iters: int = ENDLESS, *more: str) -> str:
    started = data("train", *options(inputs, iters), "--detach", *more, cwd=cwd)
    assert started["folder"] == str(cwd / "adapters")
    return str(started["run"])


def test_a_detached_run_is_seen_watched_and_stopped(inputs: Path, tmp_path: Path) -> None:
    run = detached(inputs, tmp_path)
    (working,) = data("status", cwd=tmp_path)["runs"]
    assert (working["run"], working["state"], working["total_steps"]) == (run, "running", ENDLESS)
    assert os.getsid(working["pid"]) == working["pid"], "a session of its own"
    watching = Run("watch", "last", cwd=tmp_path)
    # Who watches sees what happens from then on: some step, and the validation after it.
    watching.until_step(1)
    watching.until(lambda event: event["event"] == "validation")
    watching.interrupt()
    code, errors = watching.wait()
    assert code == 0
    assert f"no longer watching; the run goes on (coordinator stop {run} stops it)" in errors
    watching = Run("watch", run[:-2], cwd=tmp_path)
    watching.until_step(losses(tmp_path / "adapters")[-1][0])
    done = coordinator("stop", "adapters", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = losses(tmp_path / "adapters")[-1][0]
    assert f"{run}: stopped at step {last} of {ENDLESS}; everything is saved" in done.stdout
    code, errors = watching.wait()
    assert code == 130, "as the run itself"
    assert f"stopped at step {last} of {ENDLESS}" in errors
    (finished,) = (event for event in watching.events if event["event"] == "finished")
    assert (finished["status"], finished["exit_code"]) == ("interrupted", 130)
    steps = [event["step"] for event in watching.events if event["event"] == "step"]
    assert steps == list(range(steps[0], last + 1)), "each step once"
    assert data("status", cwd=tmp_path)["runs"] == []
    (listed,) = data("runs", cwd=tmp_path)["runs"]
    assert (listed["state"], listed["steps"]) == ("interrupted", last)
    assert listed["final_loss"] == read_run(tmp_path / "adapters").training_loss
    again = detached(inputs, tmp_path, last + 5, "--resume")
    assert again == run
    assert coordinator("watch", run, cwd=tmp_path).returncode == 0
    assert [step for step, _ in losses(tmp_path / "adapters")] == list(range(1, last + 6))
    assert "saved" in log_path(run).read_text()


def test_a_run_under_nohup_can_be_stopped(inputs: Path, tmp_path: Path) -> None:
    run = Run("train", *options(inputs, ENDLESS), cwd=tmp_path, prefix=("nohup",))
    run.until_step(3)
    done = coordinator("stop", "last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run.wait()[0] == 130


def test_a_run_outlives_the_terminal_that_it_was_started_in(inputs: Path, tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [*COMMAND, "train", *options(inputs, ENDLESS), "--detach"])
    shown = b""
    while b"its log" not in shown and select.select([terminal], [], [], 100)[0]:
        shown += os.read(terminal, 1 << 16)
    assert b"goes on without this terminal" in shown, shown
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] in (0, signal.SIGHUP)
    watching = Run("watch", "adapters", cwd=tmp_path)
    watching.until_step(30)
    watching.interrupt()
    assert watching.wait()[0] == 0


def test_a_run_in_a_terminal_is_watched_and_stopped_from_another(inputs: Path, tmp_path: Path) -> None:
    run = Run("train", *options(inputs, ENDLESS), cwd=tmp_path)
    run.until_step(3)
    watching = Run("watch", "last", cwd=tmp_path)
    watching.until_step(5)
    done = coordinator("stop", "last", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "everything is saved" in done.stdout
    code, errors = run.wait()
    assert code == 130
    assert "everything is saved" in errors
    assert watching.wait()[0] == 130
    assert coordinator("stop", "last", cwd=tmp_path).returncode == 2


def test_a_killed_run_is_said_to_be_broken_off_and_goes_on(inputs: Path, tmp_path: Path) -> None:
    run = detached(inputs, tmp_path)
    watching = Run("watch", run, cwd=tmp_path)
    watching.until_step(25)
    (holder,) = presence.find_all()
    os.kill(holder.pid, signal.SIGKILL)
    code, errors = watching.wait()
    assert code == 1
    assert f"run {run} ended without a word" in errors
    assert f"coordinator train --resume --adapter-path {tmp_path / 'adapters'}" in errors
    wait_for_end(holder.pid)
    (listed,) = data("runs", cwd=tmp_path)["runs"]
    assert listed["state"] == "broken_off"
    assert listed["steps"] >= 25
    assert data("status", cwd=tmp_path)["runs"] == []
    assert coordinator("stop", run, cwd=tmp_path).returncode == 2
    more = listed["steps"] + 20
    assert detached(inputs, tmp_path, more, "--resume") == run
    assert coordinator("watch", run, cwd=tmp_path).returncode == 0
    assert [step for step, _ in losses(tmp_path / "adapters")] == list(range(1, more + 1))


def test_stop_now_leaves_at_once(inputs: Path, tmp_path: Path) -> None:
    run = detached(inputs, tmp_path)
    done = coordinator("stop", run, "--now", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{run}: left at once" in done.stdout
    assert data("runs", "show", run, cwd=tmp_path)["state"] == "interrupted"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (("--batch-size", "0"), "--batch-size"),
        (("--min-nodes", "2"), "--min-nodes 2 and --nodes local exclude each other"),
        (("--data", "nowhere"), "no data folder nowhere"),
        (("--model", "nowhere"), "nowhere is no folder"),
        (("--data", "bad"), "train.jsonl:2: "),
        (("--lora-rank", "4096"), "--lora-rank 4096 is more than the model is wide"),
        (("--plan",), "--plan and --detach exclude each other"),
    ],
)
def test_a_mistake_is_told_before_the_terminal_is_left(
    inputs: Path, tmp_path: Path, tandem_home: Path, wrong: tuple[str, ...], line: str
) -> None:
    (tmp_path / "bad").mkdir()
    good = (inputs / "data" / "train.jsonl").read_text().splitlines()[0]
    (tmp_path / "bad" / "train.jsonl").write_text(f"{good}\nno row\n")
    done = coordinator("train", *options(inputs, 10), "--detach", *wrong, cwd=tmp_path)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert line in said
    assert not (tmp_path / "adapters").exists()
    for kept in ("runs", "working", "jobs"):
        assert not list((tandem_home / kept).glob("*")), "no entry, no log, no lock"
    assert data("runs", cwd=tmp_path) == {"runs": [], "broken": []}


def test_ctrl_c_before_it_trains_stops_it(inputs: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "train", *options(inputs, ENDLESS), "--detach"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Its log is there before the process that writes it.
    while not list((Path(os.environ["TANDEM_HOME"]) / "runs").glob("*.log")) and process.poll() is None:
        select.select([], [], [], 0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "stopped" in errors
    assert presence.find_all() == []
    assert not (tmp_path / "adapters" / "metrics.jsonl").exists()


def test_two_runs_of_one_folder(inputs: Path, tmp_path: Path) -> None:
    first = detached(inputs, tmp_path, 5)
    assert coordinator("watch", first, cwd=tmp_path).returncode == 0
    second = detached(inputs, tmp_path)
    refused = coordinator("train", *options(inputs, 5), "--detach", cwd=tmp_path)
    assert refused.returncode == 2
    assert "another run is writing here" in refused.stderr
    refused = coordinator("train", "--resume", "--detach", cwd=tmp_path)
    assert refused.returncode == 2
    assert f"run {second} is at work already" in refused.stderr
    assert coordinator("stop", second, cwd=tmp_path).returncode == 0
    older = data("runs", "show", first, cwd=tmp_path)
    assert (older["state"], older["files"]) == ("done", str(tmp_path / "adapters" / "previous" / first))
    compared = data("runs", "compare", first, second, cwd=tmp_path)
    assert compared["options"]["iters"] == [5, ENDLESS]
    assert compared["figures"]["steps"][0] == 5
