from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from node.errors import UserError
from node.spec import ModelSpec, TuningSpec
from node.worker import tuning
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, as_rows, difference, random_batches

LORA = TuningSpec(num_layers=-1, rank=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_grad_checkpoint_saves_memory_and_keeps_names(tmp_path: Path) -> None:
    deep = tiny_model(tmp_path / "model", "llama", layers=8)
    rows = as_rows(random_batches(1, rows=8, longest=200)[0])

    def peak(run: InProcess) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run.step(rows)
        return mx.get_peak_memory() - before

    plain, lean = InProcess(deep, LORA), InProcess(deep, TuningSpec(num_layers=-1, rank=4, grad_checkpoint=True))
    assert set(dict(tree_flatten(lean.model.parameters()))) == set(dict(tree_flatten(plain.model.parameters())))
    assert peak(lean) < 0.6 * peak(plain)


def test_initial_weights_are_those_that_mlx_lm_draws(model: Path) -> None:
    assert difference(InProcess(model, LORA, seed=1).weights, InProcess(model, LORA, seed=1).weights) == 0
    assert difference(InProcess(model, LORA, seed=1).weights, InProcess(model, LORA, seed=2).weights) > 0.01


def test_only_what_was_asked_for_is_trained(model: Path) -> None:
    full = InProcess(model, TuningSpec("full", num_layers=1))
    assert {name.split(".")[2] for name in full.weights} == {"1"}
    before = {name: mx.array(value) for name, value in tree_flatten(full.model.parameters())}
    full.run(random_batches(2))
    after = dict(tree_flatten(full.model.parameters()))
    changed = {name for name in after if not mx.array_equal(after[name], before[name])}
    assert changed == set(full.weights)


def test_weights_to_start_from_are_used(model: Path, tmp_path: Path) -> None:
    trained = InProcess(model, LORA).run(random_batches(2)).weights
    file = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(file), trained)
    again = InProcess(model, TuningSpec(num_layers=-1, rank=4, initial_weights=str(file)), seed=5)
    assert difference(again.weights, trained) == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TuningSpec(num_layers=1, rank=4), "is not trained here"),
        (TuningSpec("full", num_layers=-1), "is not trained here"),
        (TuningSpec(num_layers=-1, rank=8), "--lora-rank must be the one"),
    ],
)
def test_weights_of_other_layers_are_refused(model: Path, tmp_path: Path, spec: TuningSpec, said: str) -> None:
    file = tmp_path / "adapters.safetensors"
    mx.save_safetensors(str(file), InProcess(model, LORA).weights)
    changed = TuningSpec(spec.fine_tune_type, spec.num_layers, spec.rank, initial_weights=str(file))
    with pytest.raises(UserError, match=said) as caught:
        InProcess(model, changed)
    assert one_line(caught).startswith(f"--resume-adapter-file {file}: ")


@pytest.mark.parametrize("content", [None, b"", b"no weights at all", b"\xff" * 64])
def test_an_unreadable_weights_file_is_refused(model: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "adapters.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        InProcess(model, TuningSpec(num_layers=-1, initial_weights=str(file)))
    assert one_line(caught).startswith(f"--resume-adapter-file {file}: ")


def break_model(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif how == "unknown architecture":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"model_type": "abacus"}))
    elif how == "no weights":
        weights.unlink()
    elif how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "weights are no safetensors":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif how == "other shapes":
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"intermediate_size": 96}))


@pytest.mark.parametrize(
    "how",
    [
        "no config",
        "config is not JSON",
        "unknown architecture",
        "no weights",
        "weights cut short",
        "weights are no safetensors",
        "other shapes",
    ],
)
def test_a_broken_model_is_refused(tmp_path: Path, how: str) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    break_model(folder, how)
    with pytest.raises(UserError) as caught:
        tuning.load(ModelSpec(str(folder)))
    assert one_line(caught).startswith(f"cannot load the model in {folder}: ")


@pytest.mark.parametrize("how", ["no folder", "no config", "config is not JSON", "weights cut short", "other rank"])
def test_a_broken_adapter_is_refused(model: Path, tmp_path: Path, how: str) -> None:
    adapter = tmp_path / "adapter"
    if how != "no folder":
        adapter.mkdir()
        file = adapter / "adapters.safetensors"
        mx.save_safetensors(str(file), InProcess(model, LORA).weights)
        rank = 8 if how == "other rank" else 4
        parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0}
        config = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
        if how != "no config":
            text = "{" if how == "config is not JSON" else json.dumps(config)
            (adapter / "adapter_config.json").write_text(text)
        if how == "weights cut short":
            file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError) as caught:
        tuning.load(ModelSpec(str(model), str(adapter)))
    assert f"the adapter in {adapter}" in one_line(caught)
