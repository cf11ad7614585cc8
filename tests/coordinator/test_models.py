from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import errors
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, MODEL_REMAPPING

from coordinator import hub
from coordinator.models import looks_like_path, peek, remapped_model_types, resolve, weight_shapes
from coordinator.weight_files import read_header
from node.errors import TandemError, UserError
from tests.fixtures.models import tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny-llama"))


def test_a_folder_is_found_and_whole(model: Path) -> None:
    found = resolve(str(model))
    assert (found.path, found.name, found.revision) == (model, str(model), None)
    assert found.config["model_type"] == "llama"
    assert peek(str(model)).shapes == weight_shapes(model)


def test_shapes_are_those_that_mlx_loads(model: Path) -> None:
    types = {"F32": mx.float32}
    loaded: Any = mx.load(str(model / "model.safetensors"))
    found = weight_shapes(model)
    assert found.keys() == loaded.keys()
    for name, (dtype, shape) in found.items():
        assert (types[dtype], shape) == (loaded[name].dtype, tuple(loaded[name].shape))


def write(model: Path, name: str, content: str | bytes) -> None:
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def config_with(model: Path, **entries: Any) -> None:
    write(model, "config.json", json.dumps(json.loads((model / "config.json").read_text()) | entries))


def cut(model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)


BROKEN: dict[str, tuple[Any, str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), r"no config\.json, so this is no model folder"),
    "config cut off": (lambda m: write(m, "config.json", '{"model_type":'), r"config\.json: not readable as JSON"),
    "config is bytes": (lambda m: write(m, "config.json", b"\xff\xfe\x00"), r"config\.json: not readable as JSON"),
    "config is a list": (lambda m: write(m, "config.json", "[]"), "must hold a JSON object"),
    "no model type": (lambda m: write(m, "config.json", "{}"), "has no model_type"),
    "unknown type": (lambda m: config_with(m, model_type="lama"), r"does not know model_type 'lama' .*llama"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights"),
    "weights cut off": (cut, r"cut off at \d+ of \d+ bytes"),
    "weights empty": (lambda m: write(m, "model.safetensors", b""), "not a whole safetensors file"),
    "weights damaged": (lambda m: write(m, "model.safetensors", b"\x02" + 7 * b"\0" + b"{]"), "header is damaged"),
    "header is a list": (lambda m: write(m, "model.safetensors", b"\x02" + 7 * b"\0" + b"[]"), "header is damaged"),
    "header too long": (lambda m: write(m, "model.safetensors", b"\xff" * 64), "not a whole safetensors file"),
    "LFS pointer": (lambda m: write(m, "model.safetensors", "version https://git-lfs.github.com"), "git lfs pull"),
    "shard missing": (
        lambda m: write(m, "model.safetensors.index.json", '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        r"model-00002-of-00002\.safetensors is missing",
    ),
    "shard missing, no index": (
        lambda m: (
            (m / "model.safetensors.index.json").unlink(),
            (m / "model.safetensors").rename(m / "model-00001-of-00003.safetensors"),
        ),
        r"model-00002-of-00003\.safetensors is missing \(2 of 3",
    ),
    "index damaged": (lambda m: write(m, "model.safetensors.index.json", "{"), "cannot be read as an index"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_line(case: str, model: Path) -> None:
    breaks, message = BROKEN[case]
    breaks(model)
    with pytest.raises(UserError, match=message) as caught:
        resolve(str(model))
    assert "\n" not in str(caught.value)
    assert str(model) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("model.gguf", "only as model.gguf"), ("pytorch_model.bin", "mlx_lm.convert")]
)
def test_other_weights_are_named(name: str, message: str, model: Path) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(UserError, match=message):
        resolve(str(model))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write(tmp_path, "adapter_config.json", "{}")
    with pytest.raises(UserError, match="--adapter-path"):
        resolve(str(tmp_path))


def test_paths_and_repositories_are_told_apart(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert all(map(looks_like_path, ["./typo", "../x", "/x/y", "~/x", "a/b/c", "tiny-llama", "typo/"]))
    assert not any(map(looks_like_path, ["typo", "org/name", "mlx-community/Llama-3.2-1B-Instruct-4bit"]))
    with pytest.raises(UserError, match=r"no such folder; did you mean tiny-llama\?"):
        resolve("./tiny-lama")
    with pytest.raises(UserError, match=r"no such folder \(nowhere does not exist either\)"):
        resolve("./nowhere/at-all")
    with pytest.raises(UserError, match="a file; pass the folder"):
        resolve("./tiny-llama/config.json")
    with pytest.raises(UserError, match="neither a folder nor a repository id"):
        resolve("what is this?")


def answer(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://example.org"))


FAILURES: list[tuple[Exception, str]] = [
    (errors.GatedRepoError("m", response=answer(403)), "org/name is gated: accept its terms at https"),
    (
        errors.RepositoryNotFoundError("m", response=answer(401)),
        "no folder and no Hugging Face model is called org/name",
    ),
    (errors.RevisionNotFoundError("m", response=answer(404)), "has no revision v9"),
    (errors.LocalEntryNotFoundError("m"), "not in the Hugging Face cache"),
    (errors.OfflineModeIsEnabled("m"), "the Hub cannot be reached"),
    (httpx2.ConnectError("m"), "the Hub cannot be reached"),
    (ConnectionResetError("m"), "the Hub cannot be reached"),
    (errors.HfHubHTTPError("busy\nnow", response=answer(503)), "failed: busy now; run the same command again"),
    (OSError(28, "No space left on device"), "no room on the disk"),
]


@pytest.mark.parametrize(("error", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_the_hubs_errors_become_ours(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "cached_snapshot", lambda repository, revision: None)
    with pytest.raises(TandemError, match=message) as caught:
        resolve("org/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_a_repository_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(tmp_path))
    with pytest.raises(UserError, match=r"org/name has no config\.json: it is no model"):
        resolve("org/name")


def test_a_peek_fetches_the_configuration_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(*arguments: Any, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("m")
        return str(model)

    def no_metadata(*arguments: Any, **options: Any) -> None:
        raise errors.NotASafetensorsRepoError("m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", no_metadata)
    found = peek("org/name")
    assert (found.name, found.config["model_type"], found.shapes) == ("org/name", "llama", None)
    assert asked[1:] == [["config.json"]]


def cached_repository(model: Path, home: Path) -> str:
    """Lay a model out as the Hugging Face cache does."""
    commit = "a" * 40
    repository = home / "hub" / "models--org--name"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


def test_a_cached_revision_is_used_where_it_lies_when_offline(model: Path, tmp_path: Path) -> None:
    commit = cached_repository(model, tmp_path / "cache")
    program = (
        "from coordinator.models import peek, resolve\n"
        "found = resolve('org/name')\n"
        "print(found.revision, found.path, found.name, len(peek('org/name').shapes))\n"
        "from node.errors import UserError\n"
        "try: resolve('org/other')\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    path = tmp_path / "cache" / "hub" / "models--org--name" / "snapshots" / commit
    assert first == f"{commit} {path} org/name {len(weight_shapes(model))}"
    assert second.startswith("org/other is no folder and not in the Hugging Face cache")
    assert done.stderr == ""


def test_what_we_know_of_mlx_lm_is_still_so(model: Path) -> None:
    assert remapped_model_types() == MODEL_REMAPPING
    assert list(hub.ALLOW_PATTERNS) == DEFAULT_ALLOW_PATTERNS
    config_with(model, model_type="mistral")
    assert resolve(str(model)).config["model_type"] == "mistral"


def test_nothing_heavy_is_imported(model: Path) -> None:
    program = (
        f"import sys\nfrom coordinator.models import resolve\nresolve({str(model)!r})\n"
        "from coordinator.memory import advise\nimport coordinator.commands.estimate, coordinator.preflight\n"
        "print(sorted({'mlx', 'mlx_lm', 'numpy', 'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {"[]", "['numpy']"}


def test_a_download_tells_its_bytes() -> None:
    told: list[tuple[str, int, int]] = []
    bar = hub._bar(lambda task, done, total: told.append((task, done, total)))
    with bar(total=10, unit="B", desc="Reconstructing", name="x") as shown:
        shown.update(4)
        shown.update(6)
    assert told == [("downloading model", 4, 10), ("downloading model", 10, 10)]


def test_headers_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_header(tmp_path / "model.safetensors")
