"""Whole runs on real nodes: alone, in line, too few, struck by a death, and pestered by a stranger."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path

import pytest

from coordinator.api import train
from coordinator.config import TrainConfig
from coordinator.config_file import read_yaml
from node.client import NodeClient
from node.home import home
from node.info import NodeInfo
from tests.fixtures.nodes import ServingNode, loopback, serving
from tests.fixtures.processes import command_of
from tests.fixtures.runs import Run, assert_same_losses, losses, metrics, notes

ITERS = 60
UNKNOWN_ROUTES = 20


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process, its coordinators and nodes find each other by Bonjour on this machine, and nobody else."""
    environment = loopback()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


def arguments(inputs: Path, adapter: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(inputs / "model"), "--data", str(inputs / "data"), "--adapter-path", str(adapter),
        "--iters", str(ITERS), "--batch-size", "5", "--learning-rate", "1e-4", "--num-layers", "-1",
        "--lora-dropout", "0.1", "--save-every", "10", "--force-all", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The curve of one machine."""
    folder = tmp_path_factory.mktemp("reference") / "adapters"
    train(
        TrainConfig(
            model=str(inputs / "model"),
            data=str(inputs / "data"),
            adapter_path=str(folder),
            iters=ITERS,
            batch_size=5,
            learning_rate=1e-4,
            num_layers=-1,
            lora_dropout=0.1,
            nodes="local",
        )
    )
    return losses(folder)


def assert_same_curve(folder: Path, reference: list[tuple[int, float]]) -> None:
    assert_same_losses(losses(folder), reference, 1e-4)


def one_line(errors: str) -> str:
    """The error that a person sees; it is one line."""
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    return lines[0]


def describe(node: ServingNode) -> NodeInfo:
    async def ask() -> NodeInfo:
        client = NodeClient(node.address, node.name, node.certificate)
        try:
            return await client.describe()
        finally:
            await client.close()

    return asyncio.run(ask())


def last_step(run: Run) -> int:
    """The last one that a run has told."""
    return max(event["step"] for event in run.events if event["event"] == "step")


def test_nobody_there_is_said_and_this_machine_trains(
    inputs: Path, fleet: dict[str, str], reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", "auto"))
    code, errors = run.wait()
    assert code == 0, errors
    (note,) = (event for event in run.events if event.get("kind") == "nodes")
    assert "no other node found" in note["message"]
    assert "this machine alone" in note["message"]
    assert_same_curve(tmp_path / "adapters", reference)


@pytest.mark.slow
def test_nodes_are_called_by_name(
    inputs: Path, fleet: dict[str, str], reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    with serving(tmp_path, "anna", "ben"):
        run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", "ben,anna", "--no-local"))
        code, errors = run.wait()
    assert code == 0, errors
    assert {len(entry["per_node"]) for entry in metrics(tmp_path / "adapters") if "loss" in entry} == {2}
    assert_same_curve(tmp_path / "adapters", reference)


@pytest.mark.slow
def test_nodes_of_this_machine_train_without_it_when_they_are_named(
    inputs: Path, fleet: dict[str, str], reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    with (
        ServingNode("amber", home(), environment=fleet, friends=[]),
        ServingNode("birch", home(), environment=fleet, friends=[]) as birch,
    ):
        named = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", f"amber,{birch.address}", "--no-local"))
        code, errors = named.wait()
        assert code == 0, errors
        code, errors = Run(*arguments(inputs, tmp_path / "none", "--nodes", "auto", "--no-local")).wait()
        assert code == 3
        assert "amber: it is on this machine, which --no-local leaves out" in one_line(errors)
    assert {len(entry["per_node"]) for entry in metrics(tmp_path / "adapters") if "loss" in entry} == {2}
    assert_same_curve(tmp_path / "adapters", reference)


def test_this_machine_takes_part_unless_told_not_to(
    inputs: Path, fleet: dict[str, str], reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    with serving(tmp_path, "anna"):
        run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", "auto"))
        code, errors = run.wait()
    assert code == 0, errors
    assert {entry["nodes"] for entry in metrics(tmp_path / "adapters") if "loss" in entry} == {2}
    assert_same_curve(tmp_path / "adapters", reference)


@pytest.mark.slow
def test_gradients_travel_over_the_streams_when_told_to(
    inputs: Path, reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    with serving(tmp_path, "anna", "ben") as nodes:
        addresses = ",".join(node.address for node in nodes)
        run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", addresses, "--no-local", "--reduce", "grpc"))
        run.until_step(2)
        below = [command_of(pid) for node in nodes for pid in node.worker_pids()]
        code, errors = run.wait()
    assert code == 0, errors
    assert sum("node.worker" in command for command in below) == 2
    assert not any("node.reducer" in command for command in below)
    assert {len(entry["per_node"]) for entry in metrics(tmp_path / "adapters") if "loss" in entry} == {2}
    assert not notes(tmp_path / "adapters", "synchronised")
    assert_same_curve(tmp_path / "adapters", reference)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("asked", "chosen"), [("bf16", "bf16"), ("auto", "fp32")])
def test_as_what_gradients_travel_is_chosen_once(
    asked: str, chosen: str, inputs: Path, reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    with serving(tmp_path, "anna", "ben") as nodes:
        who = ("--nodes", ",".join(node.address for node in nodes), "--no-local")
        run = Run(*arguments(inputs, folder, *who, "--gradient-dtype", asked))
        run.until_step(15)
        run.interrupt()
        code, errors = run.wait()
        assert code == 130, errors
        assert read_yaml(folder / "config.yaml")["gradient_dtype"] == chosen
        code, errors = Run("train", "--resume", "--adapter-path", folder, "--gradient-dtype", "auto", *who).wait()
        assert code == 0, errors
    assert read_yaml(folder / "config.yaml")["gradient_dtype"] == chosen
    assert not notes(folder, "synchronised")
    advice = [line for entry in notes(folder, "fleet") for line in entry["lines"] if "gradients travel as" in line]
    assert len(advice) == (2 if chosen == "bf16" else 0), "each sitting says so"
    assert_same_losses(losses(folder), reference, 5e-3)


def test_a_busy_node_says_who_has_it_and_can_be_waited_for(inputs: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "anna") as (anna,):
        asked = ("--nodes", anna.address, "--no-local")
        first = Run(*arguments(inputs, tmp_path / "first", *asked, "--iters", "100000"))
        first.until_step(2)
        busy = describe(anna).busy
        assert busy is not None

        code, errors = Run(*arguments(inputs, tmp_path / "refused", *asked)).wait()
        assert code != 0
        message = one_line(errors)
        for word in ("anna", "busy", busy.run, busy.owner, "since", "--wait"):
            assert word in message

        waiting = Run(*arguments(inputs, tmp_path / "waiting", *asked, "--wait"))
        line = waiting.until(lambda event: event.get("kind") == "queued")["message"]
        assert busy.run in line
        assert busy.owner in line
        first.interrupt()
        assert first.wait()[0] == 130
        code, errors = waiting.wait()
        assert code == 0, errors
        assert describe(anna).busy is None


@pytest.mark.parametrize(("ends_by", "code"), [("broken data", 2), ("Ctrl-C", 130)])
def test_nodes_that_came_while_the_data_was_read_are_let_go_at_once(
    inputs: Path, tmp_path: Path, ends_by: str, code: int
) -> None:
    data = Path(shutil.copytree(inputs / "data", tmp_path / "data"))
    if ends_by == "broken data":
        (data / "valid.jsonl").write_text("what is no JSON\n")  # it is read last
    with serving(tmp_path, "anna") as (anna,):
        asked = ("--data", str(data), "--nodes", anna.address, "--no-local")
        run = Run(*arguments(inputs, tmp_path / "adapters", *asked))
        run.until(lambda event: event.get("task") == "reading the model")
        if ends_by == "Ctrl-C":
            run.interrupt()
        ended, errors = run.wait()
        assert describe(anna).busy is None
    assert ended == code, errors
    assert "measuring the machines" not in {event.get("task") for event in run.events}
    assert ("valid.jsonl" if ends_by == "broken data" else "nothing was written") in one_line(errors)
    assert not (tmp_path / "adapters").exists()


def test_too_few_nodes_end_with_a_code_of_their_own(inputs: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "anna", "ben") as nodes:
        addresses = ",".join(node.address for node in nodes)
        asked = ("--nodes", addresses, "--no-local", "--min-nodes", "3")
        code, errors = Run(*arguments(inputs, tmp_path / "adapters", *asked)).wait()
    assert code == 3
    assert "3" in one_line(errors)
    assert not (tmp_path / "adapters" / "adapters.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_stopped_run_goes_on_with_other_nodes(
    inputs: Path, reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    with serving(tmp_path, "anna", "ben") as (anna, ben):
        run = Run(*arguments(inputs, folder, "--nodes", f"{anna.address},{ben.address}", "--no-local"))
        run.until_step(15)
        run.interrupt()
        code, errors = run.wait()
        assert code == 130, errors
        done = [step for step, _ in losses(folder)]
        assert done == list(range(1, len(done) + 1))
        assert describe(anna).busy is None

        again = Run("train", "--resume", "--adapter-path", folder, "--nodes", anna.address)
        code, errors = again.wait()
        assert code == 0, errors
    assert_same_curve(folder, reference)


@pytest.mark.slow
def test_a_stranger_at_the_relay_disturbs_nothing(
    inputs: Path, reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    with serving(tmp_path, "anna", "ben") as nodes:
        ports = [describe(node).relay_port for node in nodes]
        addresses = ",".join(node.address for node in nodes)
        run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", addresses, "--no-local"))
        strangers: list[socket.socket] = []
        try:
            # Before the ring forms, and while it works: nothing, nonsense, nearly the right thing.
            for step in (0, 5):
                if step:
                    run.until_step(step)
                for port in ports:
                    for number in range(UNKNOWN_ROUTES):
                        stranger = socket.create_connection(("127.0.0.1", port), timeout=10)
                        strangers.append(stranger)
                        words = (b"", os.urandom(4096), b"TNDM\x01\x01" + os.urandom(18), b"GET / HTTP/1.1\r\n\r\n")
                        stranger.sendall(words[number % len(words)])
            code, errors = run.wait()
        finally:
            for stranger in strangers:
                stranger.close()
    assert code == 0, errors
    assert_same_curve(tmp_path / "adapters", reference)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_who_comes_while_this_machine_trains_alone_takes_part(
    inputs: Path, fleet: dict[str, str], tmp_path: Path
) -> None:
    endless = ("--iters", "100000", "--steps-per-eval", "100000", "--val-batches", "1", "--save-every", "100000")
    grown, alone = tmp_path / "grown", tmp_path / "alone"
    run = Run(*arguments(inputs, grown, "--nodes", "auto", *endless))
    run.until_step(10)
    (worker,) = run.worker_pids()
    with serving(tmp_path, "anna") as (anna,):
        joined = run.until(lambda event: event.get("kind") == "generation")
        assert "anna joins: " in joined["message"]
        assert run.worker_pids() == [worker], "this machine's worker is still the same one"
        run.until_step(last_step(run) + 20)
        # What anna did stays when she goes, and this machine goes on alone.
        anna.stop()
        run.until(lambda event: event.get("kind") == "generation" and "anna has left" in event["message"])
        run.until_step(last_step(run) + 20)
    run.interrupt()
    code, errors = run.wait()
    assert code == 130, errors
    counts = [entry["nodes"] for entry in metrics(grown) if "loss" in entry]
    assert counts[:10] == [1] * 10
    assert 2 in counts
    assert counts[-1] == 1
    parts = [sorted(entry["per_node"]) for entry in metrics(grown) if "loss" in entry]
    (this,) = parts[0]
    assert [names for names in parts if len(names) == 1] == [[this]] * counts.count(1), "before, and after"
    assert set().union(*parts) == {this, "anna"}
    assert not notes(grown, "restarted")

    reference = Run(*arguments(inputs, alone, "--nodes", "local", *endless))
    reference.until_step(len(counts))
    reference.interrupt()
    assert reference.wait()[0] == 130
    assert_same_losses(losses(grown), losses(alone)[: len(counts)], 1e-4)


@pytest.mark.timeout(120)
def test_a_run_for_this_machine_alone_takes_nobody_in(inputs: Path, fleet: dict[str, str], tmp_path: Path) -> None:
    with serving(tmp_path, "anna"):
        run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", "local"))
        code, errors = run.wait()
    assert code == 0, errors
    assert {entry["nodes"] for entry in metrics(tmp_path / "adapters") if "loss" in entry} == {1}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_machines_train_by_themselves_for_rounds_of_steps(
    inputs: Path, reference: list[tuple[int, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    with serving(tmp_path, "anna", "ben", "cleo") as (anna, ben, cleo):
        first, all_of_them = [",".join(node.address for node in nodes) for nodes in ((anna, ben), (anna, ben, cleo))]
        run = Run(
            *arguments(inputs, folder, "--nodes", first, "--no-local", "--local-steps", "4", "--save-every", "50")
        )
        run.until_step(15)
        run.interrupt()
        code, errors = run.wait()
        assert code == 130, errors
        saved = last_step(run)
        assert saved % 4 == 0, "what is kept is a round's end"
        more = ("--nodes", all_of_them, "--no-local", "--iters", str(ITERS))
        code, errors = Run("train", "--resume", "--adapter-path", folder, *more).wait()
    assert code == 0, errors
    (warning,) = [note["message"] for note in notes(folder, "warning") if "--local-steps" in note["message"]]
    assert f"the state of step {saved} was saved between two checkpoints" in warning
    steps = [entry for entry in metrics(folder) if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, ITERS + 1))
    closing = [entry["step"] for entry in steps if entry["wait_seconds"] > 0]
    assert closing == [step for step in range(1, ITERS + 1) if step % 4 == 0 or step == 50]
    assert {entry["nodes"] for entry in steps if entry["step"] <= saved} == {2}
    assert {entry["nodes"] for entry in steps if entry["step"] > saved} == {3}
    assert not notes(folder, "synchronised")
    assert not notes(folder, "different")
    # Not the numbers of one machine, but as good ones.
    assert sum(loss for _, loss in losses(folder)[-10:]) < 1.02 * sum(loss for _, loss in reference[-10:])
    assert losses(folder) != reference
