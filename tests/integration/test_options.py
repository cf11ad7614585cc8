"""Options of whole runs, through the real program: sampling, pruning, stopping early, testing, epochs, fusing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.cli import coordinator
from node.clikit import run_cli
from tests.fixtures.models import tiny_model
from tests.fixtures.runs import losses, metrics, notes, validations, write_chat_data


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model", "llama")
    write_chat_data(folder / "data", train=10, valid=3, test=3)
    return folder


def train(inputs: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    """Train in the working directory; the run's events."""
    command = ["train", "--model", str(inputs / "model"), "--data", str(inputs / "data"), "--json", *flags]
    code = run_cli(coordinator, command, prog_name="coordinator")
    output, errors = capsys.readouterr()
    assert code == 0, errors
    assert errors == ""
    return [json.loads(line) for line in output.splitlines()]


def evaluated(inputs: Path, adapter: str, split: str, capsys: pytest.CaptureFixture[str]) -> float:
    """The loss that ``coordinator test`` measures."""
    command = ["test", "--adapter-path", adapter, "--data", str(inputs / "data"), "--split", split, "--json"]
    assert run_cli(coordinator, command, prog_name="coordinator") == 0
    return float(json.loads(capsys.readouterr().out)["loss"])


def test_epochs_samples_pruning_test_fuse_and_gguf_in_one_run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    events = train(
        inputs,
        capsys,
        *("--epochs", "2", "--batch-size", "4", "--learning-rate", "1e-3", "--num-layers", "-1"),
        *("--save-every", "1", "--steps-per-eval", "2", "--keep-last", "2"),
        *("--sample-prompt", "Where, and when?", "--sample-prompt", "dog", "--sample-tokens", "5"),
        *("--test", "--fuse", "--export-gguf", "--gguf-type", "q8_0"),
    )
    adapters = Path("adapters")
    # Ten rows in batches of four are three batches, the last one smaller; twice.
    assert [step for step, _ in losses(adapters)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in validations(adapters)] == [0, 2, 4, 6]
    config = (adapters / "config.yaml").read_text()
    assert "iters: 6" in config
    assert "\nepochs:" not in config

    samples = notes(adapters, "sample")
    assert [(found["step"], found["prompt"]) for found in samples] == [
        (step, prompt) for step in (0, 2, 4, 6) for prompt in ("Where, and when?", "dog")
    ]
    assert all(isinstance(found["text"], str) for found in samples)

    best = min((loss, step) for step, loss in validations(adapters) if step > 0)[1]
    expected = sorted({5, 6, best})
    assert sorted(int(path.name) for path in (adapters / "checkpoints").iterdir()) == expected
    assert sorted(adapters.glob("0*_adapters.safetensors")) == [
        adapters / f"{step:07d}_adapters.safetensors" for step in expected
    ]
    newest = adapters / "checkpoints" / "0000006" / "weights.safetensors"
    assert (adapters / "adapters.safetensors").read_bytes() == newest.read_bytes()

    (tested,) = notes(adapters, "test")
    assert tested["loss"] == pytest.approx(evaluated(inputs, "adapters", "test", capsys), abs=1e-6)

    fused = load_file("fused_model/model.safetensors")
    base = load_file(inputs / "model" / "model.safetensors")
    changed = {name for name in base if not np.array_equal(base[name], fused[name])}
    assert fused.keys() == base.keys()
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name or "norm" in name for name in changed)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader("fused_model/ggml-model-q8_0.gguf").tensors}
    assert "Q8_0" in types

    finished = events[-1]
    assert (finished["event"], finished["status"]) == ("finished", "done")
    said = json.dumps(finished["summary"])
    for path in ("adapters/adapters.safetensors (step 6)", "fused_model", "ggml-model-q8_0.gguf", "report.html"):
        assert path in said
    assert Path("adapters/report.html").stat().st_size > 1000


def test_an_early_stop_leaves_the_best_adapter(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Steps far too large: the first one helps or not, what follows only harms.
    events = train(
        inputs,
        capsys,
        *("--iters", "40", "--learning-rate", "0.3", "--warmup", "0", "--optimizer", "sgd"),
        *("--steps-per-eval", "1", "--save-every", "100", "--early-stop", "2", "--test", "--lora-scale", "20"),
    )
    adapters = Path("adapters")
    found = [(loss, step) for step, loss in validations(adapters) if step > 0]
    best_loss, best = min(found)
    last = losses(adapters)[-1][0]
    assert last == best + 2 < 40
    assert events[-1]["status"] == "stopped_early"
    published, kept = adapters / "adapters.safetensors", adapters / f"checkpoints/{best:07d}/weights.safetensors"
    assert published.read_bytes() == kept.read_bytes()
    assert evaluated(inputs, "adapters", "valid", capsys) == pytest.approx(best_loss, abs=1e-5)
    (tested,) = notes(adapters, "test")
    assert tested["loss"] == pytest.approx(evaluated(inputs, "adapters", "test", capsys), abs=1e-5)
    assert f"adapters.safetensors (step {best})" in json.dumps(events[-1]["summary"])
    assert "no better validation than" in notes(adapters, "early_stop")[0]["message"]
    assert metrics(adapters)[-1]["step"] == last


def test_a_run_from_an_adapter_file_can_be_resumed_when_the_file_is_gone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train(inputs, capsys, "--iters", "2", "--adapter-path", "first", "--learning-rate", "1e-3")
    first = Path("first/adapters.safetensors")
    begun = load_file(first)
    train(inputs, capsys, "--iters", "2", "--learning-rate", "0", "--resume-adapter-file", str(first))
    ended = load_file("adapters/adapters.safetensors")
    assert all(np.array_equal(begun[name], ended[name]) for name in begun), "it begins from these weights"
    first.unlink()
    events = train(inputs, capsys, "--resume", "--iters", "3")
    assert [step for step, _ in losses(Path("adapters"))] == [1, 2, 3]
    assert events[-1]["status"] == "done"
