"""Machines and memory from Python, and what the README says of it."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import coordinator
from coordinator import Callbacks, Fleet, TrainConfig, UserError, estimate, train
from coordinator.commands.estimate import estimate as estimate_command
from coordinator.commands.nodes import nodes as nodes_command
from coordinator.stream import FleetFormed, RunEvent
from node.clikit import run_cli
from tests.fixtures.nodes import loopback, serving
from tests.fixtures.runs import metrics

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text()


def test_every_name_is_there_and_no_module_takes_its_place() -> None:
    modules = {module.name for module in pkgutil.iter_modules(coordinator.__path__)}
    assert not modules & set(coordinator.__all__)
    assert set(coordinator.__all__) == set(coordinator._EXPORTS) <= set(dir(coordinator))
    for name in coordinator.__all__:
        found = getattr(coordinator, name)
        assert inspect.isfunction(found) == (name[0].islower())
        assert inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="nothing"):
        _ = coordinator.nothing


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import sys, coordinator; print([name for name in sys.modules if name.startswith('coordinator.')])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_estimate_is_the_commands(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(inputs / "model")
    found = estimate(model, batch_size=2, max_seq_length=512, lora_rank=4, memory="16GB")
    options = ["--batch-size", "2", "--max-seq-length", "512", "--lora-rank", "4", "--memory", "16GB", "--json"]
    assert run_cli(estimate_command, ["--model", model, *options], "coordinator estimate") == 0
    said = json.loads(capsys.readouterr().out)
    assert found.total_bytes == said["chosen"]["total_bytes"]
    assert found.limit_bytes == said["machine"]["limit_bytes"]
    assert [(line.method, line.needed.total, line.verdict) for line in found.methods] == [
        (line["method"], line["total_bytes"], line["verdict"]) for line in said["methods"]
    ]
    assert found.fits is True
    assert found.advice is None


def test_an_estimate_that_is_too_much_says_what_helps(inputs: Path) -> None:
    found = estimate(str(inputs / "model"), batch_size=4096, memory=800 << 20)
    assert found.fits is False
    assert found.advice is not None
    assert found.advice.best is not None
    with pytest.raises(UserError, match="--batch-size must be at least 1"):
        estimate(str(inputs / "model"), batch_size=0)


def test_a_fleet_lists_plans_and_trains(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in loopback().items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(
        model=str(inputs / "model"),
        data=str(inputs / "data"),
        adapter_path=str(tmp_path / "adapters"),
        iters=6,
        batch_size=5,
        force_all=True,
    )
    with serving(tmp_path, "anna") as (anna,):
        fleet = Fleet.find("auto")
        (node,) = fleet
        assert (node.name, node.state, node.free, node.own) == ("anna", "free", True, False)
        assert node.address.endswith(f":{anna.port}")
        assert node.info is not None
        assert node.info.facts.total_memory_bytes
        assert str(fleet).startswith("anna · ")
        assert run_cli(nodes_command, ["--json"], "coordinator nodes") == 0
        (said,) = json.loads(capsys.readouterr().out)["nodes"]
        assert (node.id, node.fingerprint) == (said["id"], said["fingerprint"])
        plan = Fleet.find("anna").plan(config)
        assert "anna" in {member.candidate.name for member in plan.members}
        assert "anna" in str(plan)
        assert not (tmp_path / "adapters").exists()
        told: list[RunEvent] = []
        assert fleet.train(config, callbacks=Callbacks(on_event=told.append)).status == "done"
        assert fleet.start_training(config).result(200).status == "done"
        alone = dataclasses.replace(config, nodes="local", adapter_path=str(tmp_path / "alone"))
        assert train(alone).status == "done"
        more = dataclasses.replace(alone, nodes=TrainConfig.nodes, iters=8)
        assert fleet.train(more, resume=True).steps == 8
        assert [line["nodes"] for line in metrics(tmp_path / "alone") if "loss" in line][-1] == 2, "on these machines"
    (formed,) = (event for event in told if isinstance(event, FleetFormed))
    assert len(formed.members) == 2
    assert {len(line["per_node"]) for line in metrics(tmp_path / "adapters") if "loss" in line} == {2}


def test_a_fleet_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet.find()
    assert (len(fleet), fleet.wanted) == (0, "auto")
    assert str(fleet).startswith("no node found; looked ")
    with pytest.raises(UserError, match="no node of this name"):
        Fleet.find("carl")


def test_what_the_readme_shows_runs(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is a cell of one notebook."""
    monkeypatch.chdir(tmp_path)
    os.symlink(inputs / "data", "data")
    section = README.split("## From Python\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert blocks == re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    cells = "\n\0".join(blocks).replace("mlx-community/Qwen3-0.6B-4bit", str(inputs / "model"))
    assert cells.count("iters=600") == 1
    names: dict[str, Any] = {}
    for cell in cells.replace("iters=600", "iters=6").split("\0"):
        # As a notebook does it: with `await` at its top level.
        result = eval(compile(cell, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        if inspect.iscoroutine(result):
            asyncio.run(result)
    assert names["result"].status == "done"
    assert names["answer"].finish_reason in {"stop", "length"}
