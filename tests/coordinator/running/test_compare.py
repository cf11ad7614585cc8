"""Runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.running.compare import compare
from coordinator.running.known import resolve
from coordinator.view.comparison import comparison_lines
from tests.coordinator.running.made import make_run
from tests.coordinator.running.test_known import coordinator


def test_what_differs_and_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("r1", tmp_path / "one", [3.0, 2.0], lora_rank=8)
    make_run("r2", tmp_path / "two", [3.0, 2.5, 1.5], lora_rank=16)
    found = compare([resolve("r1"), resolve("r2")])
    assert found.options == {"iters": [2, 3], "lora_rank": [8, 16]}
    assert found.figures["training_loss"] == [2.5, 2.0], "of the last two batches: --steps-per-report"
    assert found.figures["best_validation"] == [2.1, 1.6]
    assert found.figures["tokens_per_second"] == [20.0, 20.0]
    assert found.validations == {0: [9.0, 9.0]}
    lines = {line.split("  ")[0]: line.split()[-2:] for line in comparison_lines(found)}
    assert lines["run"] == ["r1", "r2"]
    assert lines["lora_rank"] == ["8", "16"]
    assert lines["training loss"] == ["2.500", "2.000"]
    assert lines["validation at 0"] == ["9.000", "9.000"]
    assert coordinator("runs", "compare", "r1", tmp_path / "two", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"] == ["r1", "r2"]
    assert data["options"]["lora_rank"] == [8, 16]


def test_a_run_without_a_step(tmp_path: Path) -> None:
    make_run("r1", tmp_path / "one", [3.0])
    folder = make_run("r2", tmp_path / "two", [3.0])
    (folder / "metrics.jsonl").unlink()
    found = compare([resolve("r1"), resolve("r2")])
    assert found.figures["training_loss"] == [3.0, None]
    assert any(line.startswith("training loss") and line.endswith("-") for line in comparison_lines(found))
