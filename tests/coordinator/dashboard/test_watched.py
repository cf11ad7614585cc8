"""What is made of a run's files while they grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.dashboard.app import titles
from coordinator.dashboard.compare import compare_snapshot
from coordinator.dashboard.snapshot import run_snapshot
from coordinator.dashboard.watched import Watched
from coordinator.running.compare import SAME_FOR_NOBODY
from coordinator.view.records import read_run
from tests.coordinator.view.synthetic import fleet_metrics, step_metrics, validation_metrics, write_run


def add(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def event(kind: str, **more: Any) -> dict[str, Any]:
    return {"time": 1.78e9, "kind": kind, "message": kind, "level": "info", **more}


def test_what_is_read_bit_by_bit_is_what_is_read_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "whole", total=60, evaluate=20)
    run = Watched(tmp_path / "grown", "grown")
    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (tmp_path / "whole" / name).read_text().splitlines():
            add(tmp_path / "grown" / name, json.loads(line))
            run.refresh()
    (tmp_path / "grown" / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    run.refresh()
    assert run.record == read_run(tmp_path / "whole")
    assert run.status == "done"


def test_nothing_new_is_no_new_version(tmp_path: Path) -> None:
    write_run(tmp_path, total=10)
    run = Watched(tmp_path, "x")
    run.refresh()
    version = run.version
    run.refresh()
    assert run.version == version
    add(tmp_path / "metrics.jsonl", step_metrics(11))
    run.refresh()
    assert run.version == version + 1
    assert run.record.steps[-1] == 11


def test_a_resumed_run_forgets_the_steps_that_are_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add(path, validation_metrics(0), *(step_metrics(step) for step in range(1, 9)))
    run = Watched(tmp_path, "x")
    run.refresh()
    kept = path.read_text().splitlines(keepends=True)[:6]
    (tmp_path / "new").write_text("".join(kept))
    (tmp_path / "new").replace(path)
    add(tmp_path / "events.jsonl", event("resumed"))
    run.refresh()
    assert run.record.steps == [1, 2, 3, 4, 5]
    assert [step for step, _ in run.record.validations] == [0]
    add(path, step_metrics(6, loss=7.5))
    run.refresh()
    assert run.record.steps == [1, 2, 3, 4, 5, 6]
    assert run.record.columns["loss"][-1] == 7.5
    assert run.status == "running"


def test_another_run_in_the_folder_takes_the_place_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    write_run(folder, total=20)
    (folder / "run.json").write_text('{"run": "one"}')
    run = Watched(folder, "x")
    run.refresh()
    assert run.status == "done"
    (folder / "previous" / "one").mkdir(parents=True)
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml", "run.json"):
        (folder / name).rename(folder / "previous" / "one" / name)
    (folder / "run.json").write_text('{"run": "two"}')
    run.refresh()
    assert (run.status, run.record.steps, run.record.config) == ("", [], {})
    add(folder / "events.jsonl", event("started"))
    add(folder / "metrics.jsonl", step_metrics(1))
    run.refresh()
    assert (run.status, run.record.steps) == ("running", [1])
    old = Watched(folder / "previous" / "one", "x")
    old.refresh()
    assert old.record.steps[-1] == 20


def test_a_fleet_is_split_by_node_into_compute_network_and_waiting(tmp_path: Path) -> None:
    add(tmp_path / "metrics.jsonl", *(fleet_metrics(step) for step in range(1, 6)))
    add(tmp_path / "metrics.jsonl", fleet_metrics(6, ("Studio", "Mini", "Air")))
    link = {"one": "Studio", "other": "Air", "bits_per_second": 2.1e10, "latency_seconds": 4e-4, "text": "en3 <b>"}
    add(tmp_path / "events.jsonl", event("fleet", links=[{**link, "bits_per_second": 1e9}]))
    add(tmp_path / "events.jsonl", event("links", links=[link, 7]), event("odd", links="none"))
    run = Watched(tmp_path, "x")
    run.refresh()
    snapshot = run_snapshot(run)
    charts = {chart["key"]: chart for chart in snapshot["charts"]}
    assert "Step of Studio" in charts["seconds-1"]["html"]
    split = {curve["label"]: curve["y"][0] for curve in charts["seconds-1"]["curves"]}
    assert split == pytest.approx({"compute": 0.75, "network": 0.1, "waiting for others": 0.25})
    memories = {curve["label"]: curve["y"][-1] for curve in charts["memories"]["curves"]}
    assert memories == {"Studio": 48, "Air": 15, "Mini": 15}
    (mini,) = [curve for curve in charts["memories"]["curves"] if curve["label"] == "Mini"]
    assert mini["x"] == [6]
    links = snapshot["parts"]["links"]
    assert "Air ↔ Studio" in links
    assert "<td>21 Gbit/s</td><td>0.8 ms</td>" in links
    assert "1.0 Gbit/s" not in links
    assert "en3 &lt;b&gt;" in links


def test_a_machine_spends_nothing_in_the_steps_between_that_it_took_no_part_in(tmp_path: Path) -> None:
    both, one = ("Studio", "Air"), ("Studio",)
    parts = [both, both, one, one, both]
    add(tmp_path / "metrics.jsonl", *(fleet_metrics(step, names) for step, names in enumerate(parts, start=1)))
    run = Watched(tmp_path, "x")
    run.refresh()
    (chart,) = (chart for chart in run_snapshot(run)["charts"] if "Step of Air" in chart["html"])
    compute, network, _ = (curve["y"] for curve in chart["curves"])
    for seconds in (compute, network):
        assert [value > 0 for value in seconds] == [True, True, False, False, True]


def test_runs_are_compared_by_their_curves_figures_and_options(tmp_path: Path) -> None:
    runs = []
    for name, rank in (("a", 8), ("b", 16)):
        write_run(tmp_path / name, total=40, evaluate=20)
        config = tmp_path / name / "config.yaml"
        files = "".join(f"{option}: {name}/of-its-own\n" for option in SAME_FOR_NOBODY if option != "adapter_path")
        config.write_text(config.read_text().replace("rank: 8", f"rank: {rank}") + files)
        runs.append(Watched(tmp_path / name, name))
        runs[-1].refresh()
    snapshot = compare_snapshot(runs)
    charts = {chart["key"]: [curve["label"] for curve in chart["curves"]] for chart in snapshot["charts"]}
    assert charts == {key: ["a", "b"] for key in ("loss", "validation", "rate", "seconds")}
    assert "lora_parameters" in snapshot["parts"]["options"]
    assert "learning_rate" not in snapshot["parts"]["options"]
    assert "of-its-own" not in snapshot["parts"]["options"]
    assert 'href="/run/1">b</a>' in snapshot["parts"]["runs"]


def test_an_empty_folder_and_a_missing_one_can_be_watched(tmp_path: Path) -> None:
    runs = [Watched(tmp_path / "none", "none"), Watched(tmp_path, "empty")]
    for run in runs:
        run.refresh()
        assert "No training step" in run_snapshot(run)["parts"]["waiting"]
    assert compare_snapshot(runs)["charts"] == []


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert titles([tmp_path / "a" / "adapters"]) == ["adapters"]
    assert titles([tmp_path / "a" / "adapters", tmp_path / "b" / "adapters"]) == ["a/adapters", "b/adapters"]
    assert titles([tmp_path / "a", tmp_path / "a"]) == ["a", "a (2)"]
