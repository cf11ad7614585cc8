from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.demo.story import Plan, tell
from node.errors import UserError

SMALL = Plan(texts=90, vocabulary=400, hidden=64, layers=1, sentence_steps=20, lora_steps=20, lora_rate=3e-3, shown=2)


def _surroundings() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("TANDEM_HOME", "OPENBLAS_NUM_THREADS")}


def test_every_stage_runs_and_its_figures_are_kept(tmp_path: Path) -> None:
    lines: list[str] = []
    before = _surroundings()
    result = tell(tmp_path, lines.append, SMALL)
    assert _surroundings() == before
    assert len(result.sentence_losses) == len(result.lora_losses) == 20
    assert result.sentence_losses[-1] < result.sentence_losses[0]
    assert result.test_after["loss"] < result.test_before["loss"]
    assert len(result.validation_losses) == 2
    assert result.asked == len(result.answers) == 40
    for name in ("base", "adapter", "fused", "gguf"):
        assert Path(result.files[name]).exists(), name
    headings = [line for line in lines if not line.startswith(" ")]
    assert [heading[:3] for heading in headings] == [f"{number}/6" for number in range(1, 7)]


@pytest.mark.parametrize("kind", ["a file", "a full folder"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    from coordinator.commands.demo import demo

    path = tmp_path / "kept"
    if kind == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        demo.main(["--keep", str(path)], standalone_mode=False)


@pytest.mark.slow
def test_the_whole_demo_teaches_what_it_says(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from coordinator.cli import main; raise SystemExit(main())", "demo", "--json"]
    command = [*program, "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sentence_losses"][-1] < 0.5 < 5 < result["sentence_losses"][0]
    assert result["test_after"]["loss"] < 1 < 2 < result["test_before"]["loss"]
    assert result["right_before"] == 0
    assert result["right_after"] >= 24
    assert (tmp_path / "kept" / "fused_model" / "ggml-model-f16.gguf").exists()
