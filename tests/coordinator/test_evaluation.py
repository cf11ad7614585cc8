from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

from coordinator import evaluation
from coordinator.cli import coordinator
from coordinator.evaluation import TestOptions, TestResult
from coordinator.workers import Quiet
from node.clikit import run_cli
from node.errors import UserError, WorkerError
from tests.fixtures.adapters import random_adapter
from tests.fixtures.models import tiny_model

PAIRS = [{"prompt": f"question {'so ' * (i % 7)}?", "completion": f"answer {i} {'and ' * (i % 5)}"} for i in range(23)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a data set, and an adapter whose run masked the prompts."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model(folder / "model", "llama")
    tiny_model(folder / "wide", "llama", hidden=128)
    tiny_model(folder / "deep", "llama", layers=3)
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    settings = {"data": str(folder / "data"), "mask_prompt": True, "batch_size": 3, "max_seq_length": 40}
    random_adapter(folder / "adapter", folder / "model", **settings)
    return folder


def measured(**options: Any) -> TestResult:
    return asyncio.run(evaluation.test(TestOptions(**options), Quiet()))


def expected(folder: Path, adapter: Path | None, *, mask_prompt: bool, limit: int) -> tuple[float, int]:
    """Row by row, without padding."""
    model, tokenizer = mlx_lm.load(str(folder / "model"), adapter_path=str(adapter) if adapter else None)[:2]
    loss, count = 0.0, 0
    for row in PAIRS:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        tokens = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        start = len(prompt) - 1 if mask_prompt else 0
        tokens = tokens[:limit]
        losses = nn.losses.cross_entropy(model(mx.array([tokens[:-1]])), mx.array([tokens[1:]]))[0, start:]
        loss += float(losses.sum().item())
        count += len(tokens) - 1 - start if len(tokens) - 1 > start else 0
    return loss / count, count


def test_an_adapter_is_measured_as_its_run_was_set_up(folder: Path) -> None:
    result = measured(adapter_path=str(folder / "adapter"))
    loss, tokens = expected(folder, folder / "adapter", mask_prompt=True, limit=40)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert (result.rows, result.total_rows, result.batches) == (23, 23, 8)
    assert result.model == str(folder / "model")


def test_what_is_said_wins_over_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["test", "--adapter-path", str(folder / "adapter"), "--mask", "all", "--batch-size", "5"]
    assert run_cli(coordinator, [*command, "--max-seq-length", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    loss, tokens = expected(folder, folder / "adapter", mask_prompt=False, limit=64)
    assert (result["tokens"], result["rows"], result["batches"]) == (tokens, 23, 5)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


def test_the_model_alone_and_fewer_batches(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["test", "--model", str(folder / "model"), "--data", str(folder / "data")]
    assert run_cli(coordinator, [*command, "--test-batches", "2", "--quiet"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("test: loss ")
    assert " of 8 of 23 rows in " in line


@pytest.mark.parametrize("model", ["wide", "deep"])
def test_an_adapter_of_another_model_is_refused(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["test", "--model", str(folder / model), "--adapter-path", str(folder / "adapter")]
    assert run_cli(coordinator, command) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: test: 5 of 23 rows are longer")
    assert error.startswith("error: the adapter in ")
    assert "does not belong to this model" in error
    assert len(error) < 500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--model: say which"),
        ({"adapter_path": "nowhere"}, "--adapter-path nowhere: no such folder"),
        ({"adapter_path": "model"}, "a whole model"),
        ({"adapter_path": "data"}, "this is no adapter"),
        ({"adapter_path": "adapter", "split": "valid"}, "has no valid set"),
        ({"adapter_path": "adapter", "data": "nowhere"}, "nowhere"),
        ({"adapter_path": "adapter", "model": "gone/"}, "--model gone/: no such folder"),
        ({"model": "empty"}, "no config.json"),
        ({"adapter_path": "adapter", "batch_size": 0}, "--batch-size must be at least 1"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    folder: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    monkeypatch.setattr(evaluation, "task_worker", None)
    with pytest.raises(UserError, match=words) as caught:
        measured(**options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("split", "batches"), [("dev", 1), ("test", 0), ("test", -2)])
def test_options_are_checked(split: str, batches: int) -> None:
    with pytest.raises(UserError, match=r"--split|--test-batches"):
        TestOptions(split=split, test_batches=batches)


def test_code_in_a_models_folder_does_not_run_because_an_adapter_says_so(folder: Path, tmp_path: Path) -> None:
    model, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder / "model", model)
    (model / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_file": "theirs.py"}))
    settings = {"data": str(folder / "data"), "trust_remote_code": True}
    adapter = random_adapter(tmp_path / "adapter", folder / "model", **settings)
    recorded = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**recorded, "model": str(model)}))
    with pytest.raises(UserError, match="trust"):
        measured(adapter_path=str(adapter))
    assert not marker.exists()
    with pytest.raises(WorkerError, match="has no attribute 'Model'"):
        measured(adapter_path=str(adapter), trust_remote_code=True)
    assert marker.exists(), "the marker shows that it would have run"
