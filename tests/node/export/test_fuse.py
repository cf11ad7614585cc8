from __future__ import annotations

import filecmp
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import load_model

from node.errors import TandemError, UserError
from node.spec import Fuse, ModelSpec
from node.worker import export
from tests.fixtures.models import FAMILIES, tiny_model
from tests.node.export.adapters import logits, random_adapter


def fused(tmp_path: Path, base: Path, adapter: Path | None = None, **options: Any) -> Path:
    spec = ModelSpec(str(base), str(adapter) if adapter else "")
    options.setdefault("save_path", str(tmp_path / "fused"))
    export.fuse(spec, Fuse(model=spec, **options), lambda _task, _done, _total: None)
    return Path(options["save_path"])


def with_adapter(base: Path, adapter: Path) -> np.ndarray:
    model, *_ = load(str(base), adapter_path=str(adapter))
    return logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_lora_answers_as_base_and_adapter_do(tmp_path: Path, family: str) -> None:
    base = tiny_model(tmp_path / "base", family)
    adapter = random_adapter(tmp_path / "adapter", base)
    expected = with_adapter(base, adapter)
    model, *_ = load(str(fused(tmp_path, base, adapter)))
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)
    assert np.abs(expected - logits(load_model(base)[0])).max() > 0.1


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_methods(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    adapter = random_adapter(tmp_path / "adapter", base, kind=kind)
    expected = with_adapter(base, adapter)
    model, *_ = load(str(fused(tmp_path, base, adapter)))
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_bfloat16_stays_bfloat16(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base", "llama", dtype="bfloat16")
    adapter = random_adapter(tmp_path / "adapter", base, kind=kind)
    model, _ = load_model(fused(tmp_path, base, adapter))
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.bfloat16}


@pytest.mark.parametrize(("family", "kind"), [("qwen2", "lora"), ("qwen2", "dora"), ("mixtral", "lora")])
def test_quantized_base_stays_quantized(tmp_path: Path, family: str, kind: str) -> None:
    base = tiny_model(tmp_path / "base", family, quantize=8)
    adapter = random_adapter(tmp_path / "adapter", base, kind=kind)
    expected = with_adapter(base, adapter)
    folder = fused(tmp_path, base, adapter)
    model, *_ = load(str(folder))
    assert json.loads((folder / "config.json").read_text())["quantization"]["bits"] == 8
    assert "model.layers.0.self_attn.q_proj.scales" in dict(tree_flatten(model.parameters()))
    # The median token: where two experts tie, rounding may choose the other one for some.
    assert np.median(np.abs(logits(model) - expected).mean(axis=-1)) < 0.05
    assert np.median(np.abs(logits(load_model(base)[0]) - expected).mean(axis=-1)) > 0.2


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_dequantized_weights_are_exact(tmp_path: Path, family: str) -> None:
    base = tiny_model(tmp_path / "base", family, quantize=4)
    adapter = random_adapter(tmp_path / "adapter", base)
    expected = with_adapter(base, adapter)
    folder = fused(tmp_path, base, adapter, dequantize=True)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
    model, *_ = load(str(folder))
    np.testing.assert_allclose(logits(model), expected, atol=2e-4)


def test_tokenizer_files_are_the_same_bytes(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "gemma")
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    folder = fused(tmp_path, base)
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
    assert filecmp.cmpfiles(base, folder, names, shallow=False)[0] == names


def test_model_card_names_the_base_and_its_licence(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n\n# Base\n")
    card = (fused(tmp_path, base, source="owner/base-7b") / "README.md").read_text()
    assert "base_model: owner/base-7b\n" in card
    assert "license: apache-2.0\n" in card
    assert "library_name: mlx\n" in card


def test_nothing_opens_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = tiny_model(tmp_path / "base", "llama")
    adapter = random_adapter(tmp_path / "adapter", base)
    fused(tmp_path, base, adapter, source="owner/base-7b", gguf_path="m.gguf", peft_path=str(tmp_path / "peft"))


def test_everything_at_once_is_reported(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    adapter = random_adapter(tmp_path / "adapter", base)
    spec = ModelSpec(str(base), str(adapter))
    save, peft = tmp_path / "fused", tmp_path / "peft"
    told: list[tuple[str, int, int]] = []
    request = Fuse(model=spec, save_path=str(save), gguf_path="m.gguf", peft_path=str(peft))
    files = export.fuse(spec, request, lambda task, done, total: told.append((task, done, total)))
    assert files == (str(peft), str(save), str(save / "m.gguf"), str(save / "Modelfile"))
    assert all(Path(file).exists() for file in files)
    assert told[-1] == ("fusing", 1, 1)
    task, done, total = told[-3]
    assert task == "writing GGUF"
    assert done == total > 10


def test_gguf_alone_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    fused(tmp_path, base, save_path=str(tmp_path / "out"), gguf_path="m.gguf", fused_model=False)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", "m.gguf"]


def test_gguf_may_lie_elsewhere(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    fused(tmp_path, base, gguf_path=str(tmp_path / "elsewhere" / "m.gguf"))
    assert (tmp_path / "elsewhere" / "m.gguf").exists()
    assert not list((tmp_path / "fused").glob("*.gguf"))


def test_our_own_folder_is_replaced_whole(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    folder = fused(tmp_path, base, gguf_path="m.gguf")
    fused(tmp_path, tiny_model(tmp_path / "other", "llama", seed=1))
    assert not (folder / "m.gguf").exists()
    np.testing.assert_array_equal(logits(load_model(folder)[0]), logits(load_model(tmp_path / "other")[0]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "fused", "other"]


@pytest.mark.parametrize("failing", ["save_config", "write_gguf", "model_card"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    folder = fused(tmp_path, base)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(5, "Input/output error", "x")

    monkeypatch.setattr(export, failing, fail)
    with pytest.raises(UserError, match="cannot write x: Input/output error"):
        fused(tmp_path, base, gguf_path="m.gguf")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "fused"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), RuntimeError("[write] Unable to write 9 bytes to file.")]
)
def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(export, "save_model", fail)
    with pytest.raises(TandemError, match=r"the disk is full: .*fused was not written"):
        fused(tmp_path, tiny_model(tmp_path / "base", "llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB are free on that disk"):
        fused(tmp_path, base)
    assert not (tmp_path / "fused").exists()


def _foreign_file(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "thesis.txt").write_text("precious")
    return {}


def _foreign_model(tmp_path: Path) -> dict[str, Any]:
    tiny_model(tmp_path / "fused", "llama")
    return {}


def _file(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "fused").write_text("precious")
    return {}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_foreign_file, "fused holds thesis.txt; name a folder that is empty or does not exist yet"),
        (_foreign_model, "holds a model that was not written here"),
        (_file, "is a file; name a folder"),
        (lambda tmp_path: {"save_path": str(tmp_path / "base")}, "that was not written here|base model"),
        (lambda _: {"fused_model": False}, "nothing to write"),
        (lambda _: {"gguf_path": "m.gguf", "gguf_type": "q9"}, "--gguf-type 'q9': choose one of f32, f16, bf16, q8_0"),
        (lambda tmp_path: {"gguf_path": str(tmp_path)}, "is a folder; name a file"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, prepare: Any, message: str) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    options = prepare(tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        fused(tmp_path, base, **options)
    assert "\n" not in str(error.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    adapter = random_adapter(tmp_path / "adapter", tiny_model(tmp_path / "wider", "llama", hidden=128))
    with pytest.raises(UserError, match="does not belong to this model"):
        fused(tmp_path, base, adapter)
    assert not (tmp_path / "fused").exists()


def test_a_family_without_gguf_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "minicpm")
    with pytest.raises(UserError, match="cannot write model type 'minicpm'; supported: llama, mistral, mixtral"):
        fused(tmp_path, base, gguf_path="m.gguf")
    assert not (tmp_path / "fused").exists()
