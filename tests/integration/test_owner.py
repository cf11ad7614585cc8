"""Homes of their own on one machine: the model is sent, the better node fuses, owners have their say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from node.files import sha256_of
from tests.fixtures.nodes import ServingNode, loopback
from tests.fixtures.runs import ENTRY, Run, losses

NODE = "import sys; from node.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in loopback().items():
        monkeypatch.setenv(name, value)


def arguments(inputs: Path, adapter: Path, *more: str) -> list[str]:
    return [
        "train", "--model", str(inputs / "model"), "--data", str(inputs / "data"), "--adapter-path", str(adapter),
        "--iters", "6", "--batch-size", "6", "--learning-rate", "1e-4", "--num-layers", "-1", *more,
    ]  # fmt: skip


def call(entry: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", entry, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_machine_with_more_memory_fuses_and_the_result_comes_here(
    inputs: Path, tmp_path: Path, tandem_home: Path
) -> None:
    alone = Run(*arguments(inputs, tmp_path / "alone", "--nodes", "local"))
    code, errors = alone.wait()
    assert code == 0, errors
    with (
        ServingNode("small", tandem_home, arguments=("--max-memory", "2GB")),
        ServingNode("large", tmp_path / "large") as large,
    ):
        run = Run(
            *arguments(inputs, tmp_path / "together", "--nodes", large.address, "--force-all", "--min-nodes", "2"),
            *("--fuse", "--save-path", tmp_path / "fused", "--export-gguf", "--export-peft", tmp_path / "peft"),
        )
        code, errors = run.wait()
        assert code == 0, errors
        (told,) = (event for event in run.events if event.get("kind") == "fused")
        assert told["details"]["node"] == "large"
        (sent,) = (event for event in run.events if event.get("kind") == "model_sent")
        assert sent["message"].endswith("to large")
        listed = call(NODE, "store", "list", "--json")
        assert "model" in listed.stdout, "what was adopted here is listed, too"
    assert losses(tmp_path / "together") == [
        (step, pytest.approx(loss, abs=1e-4)) for step, loss in losses(tmp_path / "alone")
    ]
    again = call(
        ENTRY, "fuse", "--adapter-path", str(tmp_path / "together"), "--save-path", str(tmp_path / "fused-here"),
        "--export-gguf", "--export-peft", str(tmp_path / "peft-here"),
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    for there, here in (("fused", "fused-here"), ("peft", "peft-here")):
        names = {path.name for path in (tmp_path / here).iterdir()}
        assert {path.name for path in (tmp_path / there).iterdir()} == names
        for name in names:
            if name.endswith((".safetensors", ".gguf")):
                assert sha256_of(tmp_path / there / name) == sha256_of(tmp_path / here / name), name
    assert not list((tmp_path / "large" / "jobs").glob("*"))


@pytest.mark.slow
def test_an_owner_pauses_and_resumes(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "theirs"
    with ServingNode("studio", home) as studio:
        with monkeypatch.context() as theirs:
            theirs.setenv("TANDEM_HOME", str(home))
            assert call(NODE, "pause").stdout == "paused: studio\n"
        listed = json.loads(call(ENTRY, "nodes", "--nodes", studio.address, "--json").stdout)
        assert listed["nodes"][0]["info"]["paused"] is True
        refused = call(ENTRY, *arguments(inputs, tmp_path / "a", "--nodes", studio.address, "--min-nodes", "2"))
        assert refused.returncode == 3, refused.stderr
        assert "paused" in refused.stderr
        assert not (tmp_path / "a").exists()
        with monkeypatch.context() as theirs:
            theirs.setenv("TANDEM_HOME", str(home))
            assert call(NODE, "resume").stdout == "takes jobs again: studio\n"
        plan = call(
            ENTRY, *arguments(inputs, tmp_path / "a", "--nodes", studio.address, "--force-all"), "--plan", "--json"
        )
        assert plan.returncode == 0, plan.stderr
        assert {member["name"] for member in json.loads(plan.stdout)["members"]} >= {"studio"}
        assert not (tmp_path / "a").exists(), "a plan writes nothing"


def test_this_machine_may_stay_out(inputs: Path, tmp_path: Path) -> None:
    with ServingNode("studio", tmp_path / "theirs") as studio:
        run = Run(*arguments(inputs, tmp_path / "adapters", "--nodes", studio.address, "--no-local"))
        code, errors = run.wait()
        assert code == 0, errors
    (formed,) = (event for event in run.events if event["event"] == "fleet")
    assert [member["name"] for member in formed["members"]] == ["studio"]
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_a_model_that_fits_nobody_is_refused_before_it_is_sent(inputs: Path, tmp_path: Path) -> None:
    with ServingNode("studio", tmp_path / "theirs", arguments=("--max-memory", "64MB")) as studio:
        done = call(ENTRY, *arguments(inputs, tmp_path / "a", "--nodes", studio.address, "--no-local"))
    assert done.returncode == 2, done.stderr
    assert "needs about" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "theirs" / "store" / "models").exists()
