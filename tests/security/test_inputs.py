"""Data files, models and messages that are too large, too deep or lead elsewhere: one line, soon, and little memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.cli import coordinator
from coordinator.config_file import read_yaml
from coordinator.data.formats import LONGEST_LINE_BYTES, raw_lines
from coordinator.data.tokenizer import load_tokenizer
from coordinator.models import check_folder
from coordinator.runfolder import Recorder, RunFolder
from coordinator.stream import Noted
from node import wire
from node.channel import frame
from node.clikit import run_cli
from node.errors import RowError, TandemError, UserError
from node.jsons import MOST_CONFIG_BYTES, MOST_TOKENIZER_BYTES
from node.spec import CopyState, Evaluate, Rows, TuningSpec
from node.worker.inbox import MOST_AHEAD, UNREADABLE
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, as_rows, random_batches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


def test_a_line_of_a_gigabyte_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    with file.open("wb") as out:
        out.write(b'{"text": "fine"}\n{"text": "')
        out.truncate(1 << 30)  # with a hole: it takes no room
    tracemalloc.start()
    try:
        with pytest.raises(RowError, match=r"train\.jsonl:2: a line of more than 64 MB; split the row"):
            list(raw_lines(file))
        assert tracemalloc.get_traced_memory()[1] < 3 * LONGEST_LINE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("row", ["[" * 1_000_000, '{"text": ' * 1_000_000, '{"text": ' + "9" * 100_000 + "}"])
def test_rows_that_are_nested_without_end(
    row: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(row + "\n")
    code = run_cli(coordinator, ["train", "--model", str(model), "--data", str(data), "--nodes", "local"])
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert code == 2
    assert "train.jsonl:1: " in line
    assert len(line) < 500


def test_options_that_are_nested_without_end(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.yaml: nested too deeply"):
        read_yaml(file)
    file.write_text("a" * (MOST_CONFIG_BYTES + 1))
    with pytest.raises(UserError, match=r"config\.yaml: more than"):
        read_yaml(file)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["[" * 1_000_000, '{"a":' * 1_000_000, "[]", "7", '"text"', "null", "\ufeff{}"])
def test_files_of_a_model_that_are_no_objects(name: str, content: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: (not readable as JSON|must hold a JSON object)"):
        load_tokenizer(folder)


def test_files_of_a_model_that_are_too_large(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    for name, most in (("tokenizer.json", MOST_TOKENIZER_BYTES), ("config.json", MOST_CONFIG_BYTES)):
        before = (folder / name).stat().st_size
        os.truncate(folder / name, most + 1)
        with pytest.raises(UserError, match=rf"{name}: .* are more than such a file has \(at most .*\); copy it again"):
            load_tokenizer(folder)
        if name == "config.json":
            with pytest.raises(UserError, match=r"config\.json: .* are more"):
                check_folder(folder)
        os.truncate(folder / name, before)


@pytest.mark.parametrize("kind", [7, None, ["llama"], {"a": 1}, "../../llama", "os.path", "llama\0"])
def test_kinds_of_models_that_are_none(kind: Any, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(UserError, match=r"config\.json: (has no model_type|the installed mlx_lm does not know)"):
        check_folder(folder)


def test_a_model_whose_files_lead_elsewhere_is_not_used(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    folder = tiny_model(tmp_path / "model", "llama")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"vocab\.txt: a link that leads out of the model's folder \(to .*id_rsa\)"):
        check_folder(folder)
    (folder / "vocab.txt").unlink()
    # Links that stay inside, the Hub's cache, and weights that lie elsewhere are used.
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (folder / "tokenizer.json").rename(folder / "other.json")
    (folder / "tokenizer.json").symlink_to("other.json")
    check_folder(folder)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.resolve().rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        if file.name == "tokenizer.json":
            (folder / "other.json").write_text("{}")
    (snapshot / "other.json").unlink(missing_ok=True)
    check_folder(snapshot)


def test_records_are_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "bashrc"
    victim.write_text("before\n")
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "events.jsonl").symlink_to(victim)
    said: list[str] = []
    Recorder(RunFolder(folder), said.append).handle(Noted("nodes", "hello"))
    assert victim.read_text() == "before\n"
    assert len(said) == 1
    assert "cannot write" in said[0]


def rows(**changes: Any) -> dict[str, Any]:
    good = as_rows(random_batches(1, rows=2)[0])
    return {field.name: getattr(good, field.name) for field in dataclasses.fields(good)} | changes


BAD_ROWS: dict[str, dict[str, Any]] = {
    "a missing id": {"ids": np.zeros(1, np.int32)},
    "too few tokens": {"tokens": np.zeros(1, np.int32)},
    "negative lengths": {"lengths": np.array([-1, 5], np.int32)},
    "negative tokens": {"lengths": np.array([1, 1], np.int32), "tokens": np.array([-7, 1], np.int32)},
    "too many spans": {"span_counts": np.array([1 << 30, 1], np.int32)},
    "endless padding": {"padded_length": (1 << 31) - 1},
    "negative padding": {"padded_length": -1},
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_do_not_fit_together_are_no_message(name: str) -> None:
    message = wire.encode_request(Evaluate(0, Rows(**rows())), 0)
    assert wire.decode_request(message)
    with pytest.raises(TandemError):
        Rows(**rows(**BAD_ROWS[name]))


@pytest.mark.parametrize("rank", [0, -1, 10**9])
def test_a_rank_that_would_fill_any_memory(rank: int, model: Path) -> None:
    with pytest.raises(UserError, match="a rank is a whole number from 1 to 65536"):
        InProcess(model, TuningSpec(rank=rank))


def test_a_worker_remembers_only_so_many_requests(tmp_path: Path) -> None:
    """The process ends with a word, whatever it is busy with; here it is busy with waiting."""
    request = wire.encode_request(CopyState(0), 0)
    program = (
        "import socket, sys, threading\n"
        "from node.channel import BlockingChannel\n"
        "from node.worker.inbox import Inbox\n"
        "Inbox(BlockingChannel(socket.socket(fileno=int(sys.argv[1]))))\n"
        "threading.Event().wait(60)\n"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", program, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as process:
            with contextlib.suppress(OSError):
                ours.sendall(frame(request) * (MOST_AHEAD + 1))
            _, errors = process.communicate(timeout=60)
    assert process.returncode == UNREADABLE
    assert errors.splitlines()[-1].endswith("more was asked for in advance than a worker remembers")
