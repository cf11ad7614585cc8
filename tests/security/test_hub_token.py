"""The token of the user's Hub account stays where the coordinator is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.runs import Run, write_chat_data

INJECTED = Path(__file__).parent / "injected"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
STORED = "hf_zyxwvutsrqponmlkjihgfedcba9876543210"
NODES = ("ann", "ben")


@pytest.mark.slow
def test_nothing_that_is_sent_or_written_holds_it(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = write_chat_data(tmp_path / "data", train=8, valid=2, test=2)
    hub = tmp_path / "hub-home"
    hub.mkdir()
    (hub / "token").write_text(STORED)  # as `hf auth login` leaves it
    record, home, adapter, fused = (tmp_path / name for name in ("record", "home", "adapter", "fused"))
    serving = {
        "TANDEM_TEST_RECORD": str(record),
        "PYTHONPATH": os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")]),
    }
    secrets = {
        "HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HF_HOME": str(hub), "TANDEM_HOME": str(home),
        "TANDEM_DEBUG": "1",
    }  # fmt: skip
    ann, ben = (ServingNode(name, tmp_path / f"home-{name}", environment=serving, friends=[home]) for name in NODES)
    with ann, ben:
        run = Run(
            "train", "--model", model, "--data", data, "--iters", "4", "--batch-size", "4", "--save-every", "2",
            "--nodes", f"{ann.address},{ben.address}", "--force-all", "--no-local", "--adapter-path", adapter,
            "--sample-prompt", "the quick", "--test", "--test-batches", "1", "--fuse", "--save-path", fused,
            environment=secrets,
        )  # fmt: skip
        output, errors = run.process.communicate(timeout=200)
        assert run.process.returncode == 0, errors
        said = output + errors + ann.errors() + ben.errors()
    sent = record.read_bytes()
    for method in ("Work", "Pull", "Describe", "PutFile"):
        assert f"/{method}'".encode() in sent, "the record is of what was said"
    assert b"user-agent" in sent
    assert b"tokenizer_config.json" in sent, "metadata and messages"
    written = [path for folder in (adapter, home, fused, ann.home, ben.home) for path in folder.rglob("*")]
    names = {path.name for path in written}
    assert {"config.yaml", "events.jsonl", "metrics.jsonl", "report.html", "run.json", "README.md"} <= names
    everything = {str(path): path.read_bytes() for path in written if path.is_file()}
    everything |= {"sent": sent, "said": said.encode()}
    for where, content in everything.items():
        for token in (TOKEN, STORED):
            assert token.encode() not in content, where
