from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from coordinator.cli import coordinator
from coordinator.doctor import ask
from coordinator.doctor.bundle import default_name, versions, write_bundle
from coordinator.running import index
from coordinator.running.known import resolve
from node.clikit import run_cli
from node.errors import UserError
from node.redact import HIDDEN
from tests.coordinator.running.made import make_run

FINDINGS = {"verdict": "ok", "machines": [{"name": "Studio", "findings": []}]}


def contents(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as bundle:
        return {name: bundle.read(name).decode() for name in bundle.namelist()}


def test_everything_that_faults_are_found_by_and_nothing_that_is_private(tandem_home: Path, tmp_path: Path) -> None:
    folder = make_run("20261128-065801-6624", tmp_path / "adapters", [5.0, 4.0, 3.0])
    (folder / "config.yaml").write_text("model: m\nsample_prompt: [my diary]\niters: 7\n")
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps({"kind": "sample", "step": 3, "prompt": "my diary", "text": "dear diary"}) + "\n")
        events.write(json.dumps({"kind": "warning", "message": "hf_abcdefgh12345678 was refused"}) + "\n")
        events.write('{"half": "my dia')
    logs = tandem_home / "logs"
    logs.mkdir()
    (logs / "node.jsonl").write_text('{"message": "paired by 1234-5678"}\n')
    (tandem_home / "jobs" / "run-pid1-ab").mkdir(parents=True)
    (tandem_home / "jobs" / "run-pid1-ab" / "worker.log").write_text("MLX gave up\n")
    index.log_path("20261128-065801-6624").write_text("step 3\nsample at step 3: my diary -> dear diary\nsaved\n")
    (tandem_home / "identity").mkdir(exist_ok=True)
    (tandem_home / "identity" / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\n")
    names = write_bundle(tmp_path / "b.zip", FINDINGS, resolve(str(folder)), tandem_home)
    found = contents(tmp_path / "b.zip")
    assert list(found) == names
    assert {"README.txt", "logs/node.jsonl", "run/events.jsonl", "run/metrics.jsonl"} < set(found)
    assert json.loads(found["doctor.json"]) == FINDINGS
    assert "mlx-lm" in json.loads(found["versions.json"])["packages"]
    assert found["logs/jobs/run-pid1-ab-worker.log"] == "MLX gave up\n"
    assert found["run/output.log"] == "step 3\nsample at step 3\nsaved\n"
    assert json.loads(found["run/config.json"]) == {"model": "m", "sample_prompt": HIDDEN, "iters": 7}
    events_found = [json.loads(line) for line in found["run/events.jsonl"].splitlines()]
    assert {"kind": "sample", "step": 3} in events_found
    assert {"kind": "warning", "message": f"{HIDDEN} was refused"} in events_found
    everything = "".join(found.values())
    for private in ("diary", "hf_abcdefgh12345678", "1234-5678", "PRIVATE KEY"):
        assert private not in everything
    assert (tmp_path / "b.zip").stat().st_mode & 0o077 == 0


def test_without_a_run_and_without_logs(tandem_home: Path, tmp_path: Path) -> None:
    assert write_bundle(tmp_path / "b.zip", FINDINGS, None, tandem_home) == [
        "README.txt",
        "versions.json",
        "doctor.json",
    ]


def test_nothing_is_overwritten(tandem_home: Path, tmp_path: Path) -> None:
    there = tmp_path / "b.zip"
    there.write_text("mine")
    with pytest.raises(UserError, match="is there already; name another file"):
        write_bundle(there, FINDINGS, None, tandem_home)
    assert there.read_text() == "mine"


def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_examined(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def examine(*_: object) -> None:
        raise AssertionError("the machines were examined")

    monkeypatch.setattr(ask, "examine_fleet", examine)
    there = tmp_path / "b.zip"
    there.write_text("mine")
    for out, why in (
        (there, "is there already"),
        (tmp_path / "none" / "b.zip", "No such file or directory"),
        (there / "b.zip", "Not a directory"),
    ):
        assert run_cli(coordinator, ["doctor", "--debug", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(out) in line
        assert why in line
        assert "--out FILE" in line
    assert there.read_text() == "mine"
    free = tmp_path / "free.zip"
    with pytest.raises(AssertionError, match="examined"):
        run_cli(coordinator, ["doctor", "--debug", "--out", str(free)])
    assert not free.exists(), "to look leaves nothing"


def test_variables_that_are_secret_have_no_value() -> None:
    given = {"HF_TOKEN": "abc", "HF_HOME": "/x", "TANDEM_FLEET": "home", "EDITOR": "vi", "PATH": "/bin"}
    assert versions(given)["environment"] == {"HF_HOME": "/x", "HF_TOKEN": HIDDEN, "TANDEM_FLEET": "home"}
    assert default_name().suffix == ".zip"
