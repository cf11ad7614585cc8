from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from coordinator.cli import coordinator
from coordinator.fusing import FuseOptions
from node.clikit import run_cli
from node.errors import UserError
from tests.fixtures.adapters import random_adapter
from tests.fixtures.models import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its adapter where it is looked for, and another model."""
    folder = tmp_path_factory.mktemp("fusing")
    tiny_model(folder / "model", "llama")
    tiny_model(folder / "wide", "llama", hidden=128)
    random_adapter(folder / "adapters", folder / "model")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``adapters`` in it."""
    (tmp_path / "adapters").symlink_to(made / "adapters")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"adapters"}


def test_by_default_the_fused_model_says_what_the_adapter_does(
    made: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(coordinator, ["fuse"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote fused_model",
        "try it:",
        "  coordinator generate --model fused_model --prompt 'Hello'",
    ]
    tokens = mx.array([[5, 6, 7, 8, 9]])
    fused = mlx_lm.load("fused_model")[0](tokens)
    adapted = mlx_lm.load(str(made / "model"), adapter_path="adapters")[0](tokens)
    plain = mlx_lm.load(str(made / "model"))[0](tokens)
    assert mx.allclose(fused, adapted, atol=1e-4)
    assert not mx.allclose(fused, plain, atol=1e-2)


def test_every_output_is_named_and_its_next_command_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fuse", "--no-fused-model", "--save-path", "out", "--export-gguf", "--gguf-type", "q8_0"]
    assert run_cli(coordinator, [*command, "--export-peft", "peft", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["written"] == ["peft", "out/ggml-model-q8_0.gguf", "out/Modelfile"]
    assert [entry["purpose"] for entry in printed["next_commands"]] == ["in llama.cpp", "in Ollama"]
    assert all(Path(path).exists() for path in printed["written"])
    assert names(here / "out") == {"ggml-model-q8_0.gguf", "Modelfile"}
    assert (here / "peft" / "adapter_model.safetensors").is_file()


def test_a_pasted_mlx_lm_command_line_works(made: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fuse", "--model", str(made / "model"), "--adapter-path", "adapters", "--save-path", "merged"]
    command += ["--de-quantize", "--gguf-path", "mine.gguf", "--export-gguf"]
    assert run_cli(coordinator, command) == 0
    assert {"mine.gguf", "config.json", "model.safetensors"} <= names(here / "merged")
    capsys.readouterr()
    assert run_cli(coordinator, [*command[:3], "--dequantise"]) == 2
    assert "--dequantize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "{made}/wide"], "does not belong to this model"),
        (["--model", "{made}/wide", "--export-peft", "peft"], "does not belong to this model"),
        (["--adapter-path", "elsewhere"], "--adapter-path elsewhere: no such folder"),
        (["--adapter-path", "{made}/model"], "a whole model, not an adapter"),
        (["--model", "{made}"], "no config.json"),
        (["--save-path", "{made}/model"], "name another folder"),
        (["--upload-repo", "not a name"], "it should look like owner/name"),
        (["--no-fused-model"], "leaves nothing to write"),
        (["--no-fused-model", "--export-gguf", "--upload-repo", "me/it"], "exclude each other"),
        (["--gguf-type", "q2_k"], "q2_k"),
    ],
)
def test_mistakes_get_one_line_and_write_nothing(
    made: Path, here: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert run_cli(coordinator, ["fuse", *(word.format(made=made) for word in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert names(here) == set()
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_a_gguf_name_without_a_gguf_file_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(coordinator, ["fuse", "--gguf-path", "x.gguf", "--adapter-path", "adapters", "--quiet"]) == 0
    assert "that takes --export-gguf" in capsys.readouterr().err
    assert not (here / "fused_model" / "x.gguf").exists()


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="--save-path"):
        FuseOptions(save_path="")
