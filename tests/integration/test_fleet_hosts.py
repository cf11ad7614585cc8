"""Three hosts on a network: found by multicast, given the model, trained on, one of them fuses."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from coordinator.api import train
from coordinator.config import TrainConfig
from tests.fixtures.hosts import Host, hosts, hosts_available
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.runs import Run, assert_same_losses, losses, metrics, notes, write_chat_data

REASON = hosts_available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OPTIONS: dict[str, Any] = {"iters": 20, "batch_size": 7, "learning_rate": 1e-4, "num_layers": -1, "lora_dropout": 0.1}


def environment_of(host: Host, home: Path) -> dict[str, str]:
    """A home and a Bonjour of its own."""
    return {"TANDEM_HOME": str(home), "TANDEM_BONJOUR": host.address, "TANDEM_FLEET": host.namespace.rpartition("-")[0]}


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_three_hosts_train_one_model_and_one_of_them_fuses(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = write_chat_data(tmp_path / "data")
    config = {"model": str(model), "data": str(data), **OPTIONS}
    train(TrainConfig(**config, adapter_path=str(tmp_path / "alone"), nodes="local", fuse=True,
                      save_path=str(tmp_path / "fused-alone")))  # fmt: skip

    with hosts(3) as lab, contextlib.ExitStack() as stack:
        homes = [tmp_path / f"home{number}" for number in (1, 2, 3)]
        nodes = []
        for host, home, name in zip(lab, homes, ("anna", "ben", "cleo"), strict=True):
            # anna's owner lets jobs have little memory: another one is better suited to fuse.
            limit = ("--max-memory", "2GB") if name == "anna" else ()
            environment = environment_of(host, home)
            nodes.append(
                stack.enter_context(
                    ServingNode(
                        name, home, environment=environment, prefix=host.prefix, arguments=limit, friends=homes[:1]
                    )
                )
            )
        here = environment_of(lab[0], homes[0])

        # The listing is quick rather than patient: on a machine that does other things, too, an answer may come late.
        for _ in range(5):
            listed = lab[0].run(str(Path(sys.executable).parent / "coordinator"), "nodes", "--json", environment=here)
            names = {node["name"] for node in json.loads(listed.stdout)["nodes"]}
            if names == {"anna", "ben", "cleo"}:
                break
        assert names == {"anna", "ben", "cleo"}

        flags = [word for name, value in config.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        run = Run(
            "train", *flags, "--nodes", "auto", "--force-all", "--min-nodes", "3", "--fuse",
            "--adapter-path", tmp_path / "together", "--save-path", tmp_path / "fused",
            environment=here, prefix=lab[0].prefix,
        )  # fmt: skip
        code, errors = run.wait()
        assert code == 0, errors

        sent = [event["message"] for event in run.events if event.get("kind") == "model_sent"]
        assert sent, "nobody was given the model"
        for home in homes[1:]:
            (folder,) = (home / "store" / "models").iterdir()
            assert (folder / "model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size
        (fused,) = (event for event in run.events if event.get("kind") == "fused")
        assert fused["details"]["node"] in ("ben", "cleo")
        for node, home in zip(nodes, homes, strict=True):
            assert node.stop() == 0, node.errors()
            assert not list((home / "jobs").glob("*/*.safetensors")), f"{node.name} kept files of the job"

    assert_same_losses(losses(tmp_path / "together"), losses(tmp_path / "alone"), 1e-4)
    steps = [entry["per_node"] for entry in metrics(tmp_path / "together") if "loss" in entry]
    assert all(set(step) == {"anna", "ben", "cleo"} for step in steps)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "fused-alone"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == pytest.approx(theirs[name], abs=1e-4) for name in ours)
    assert {path.name for path in (tmp_path / "fused").iterdir()} == {
        path.name for path in (tmp_path / "fused-alone").iterdir()
    }


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_coordinator_that_comes_back_before_its_node_has_missed_it_loses_nothing(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = write_chat_data(tmp_path / "data")
    config = {"model": str(model), "data": str(data), **OPTIONS, "iters": 80, "save_every": 1000}
    train(TrainConfig(**config, adapter_path=str(tmp_path / "alone"), nodes="local"))
    folder = tmp_path / "adapters"
    with hosts(3) as (first, second, third), contextlib.ExitStack() as stack:
        other = environment_of(second, tmp_path / "home2")
        home = tmp_path / "home1"
        ben = stack.enter_context(
            ServingNode("ben", tmp_path / "home2", environment=other, prefix=second.prefix, friends=[home])
        )
        at = ("--nodes", f"{second.address}:{ben.port}", "--no-local")
        flags = [word for name, value in config.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        begun = ("train", *flags, *at, "--adapter-path", folder)
        run = Run(*begun, environment=environment_of(first, home), prefix=first.prefix)
        run.until_step(12)
        # Nobody tells the node, not even the system of the machine that is gone: it has another address now.
        first.cut()
        run.kill()
        again = ("train", "--resume", *at, "--adapter-path", folder)
        run = Run(*again, environment=environment_of(third, home), prefix=third.prefix)
        code, errors = run.wait()
        assert code == 0, errors
        assert [event["message"] for event in run.events if event.get("kind") == "waiting"] == [
            "ben still works for this run; waiting for what it has"
        ]
    (taken,) = notes(folder, "taken_up")
    assert taken["holder"] == "ben"
    assert taken["step"] >= 12
    assert not notes(folder, "replay")
    assert_same_losses(losses(folder), losses(tmp_path / "alone"), 1e-4)
