"""``coordinator simulate``: its table, its JSON, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.cli import coordinator
from coordinator.stream import FleetFormed, FleetLink, FleetMember, StepFinished
from node.clikit import run_cli
from tests.coordinator.running.made import make_run, started, write

TWO = ("--machine", "Studio: 9000", "--machine", "Air: 2500")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_cli(coordinator, ["simulate", *arguments]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *arguments, "--json"))
    return found


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, *TWO, "--batch-size", "16", "--link", "thunderbolt").splitlines()
    assert lines[0].startswith("a step: 16 rows of 51")
    assert lines[0].endswith("20 MB to add up; links 16 Gbit/s cables")
    headings = "machines tokens/s step compute network waiting speed-up the last one adds"
    assert lines[2].split() == headings.split()
    assert lines[3].split()[0] == "Studio"
    assert lines[4].startswith("+ Air")
    assert "the planner takes all 2 machines" in lines
    assert [line for line in lines if line.startswith("one more Studio: +")]


def test_json_says_the_same_with_more_digits(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, *TWO, "--batch-size", "16")
    first, last = found["rows"]
    assert first["machines"] == ["Studio"]
    assert last["machines"] == ["Studio", "Air"]
    assert last["step_seconds"] == pytest.approx(last["compute_seconds"] + last["network_seconds"])
    assert last["speed_up"] == pytest.approx(last["tokens_per_second"] / first["tokens_per_second"])
    assert last["pays"] == (last["gain"] >= 0.05)
    assert found["planned"] == ["Studio", "Air"]
    assert found["job"]["gradient_bytes"] == 20 << 20


def test_a_file_says_what_options_say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "machines:\n  Studio: 9000\n  2 x Air: 2500\nlinks:\n- wifi\n- 'Studio - Air: thunderbolt'\n"
        "batch_size: 16\nrow_length: 300\ngradient_size: 12MB\n"
    )
    options = ("--machine", "Studio: 9000", "--machine", "2 x Air: 2500", "--link", "wifi", "--link")
    same = (
        *options,
        "Studio - Air: thunderbolt",
        "--batch-size",
        "16",
        "--row-length",
        "300",
        "--gradient-size",
        "12MB",
    )
    assert figures(capsys, "--fleet", str(file)) == figures(capsys, *same)
    assert figures(capsys, "--fleet", str(file), "--batch-size", "8")["job"]["rows"] == 8, "options go over the file"


def make_measured(folder: Path, steps: int = 12, **options: Any) -> None:
    """A run of Studio and Air, twice as fast and once, 0.2 s for each sum."""
    make_run("20260101-one", folder, [2.0], batch_size=8, **options)
    members = (FleetMember("Studio", None, None, 5), FleetMember("Air", None, None, 3))
    link = FleetLink("Studio", "Air", 3e8, 0.001, "Studio ↔ Air")
    events: list[Any] = [started("20260101-one", steps), FleetFormed(members, 8, ("2 machines",), (link,))]
    for number in range(1, steps + 1):
        parts = {
            "Studio": {"rows": 5, "positions": 2000, "compute_seconds": 1.0, "wait_seconds": 0.2},
            "Air": {"rows": 3, "positions": 960, "compute_seconds": 0.96, "wait_seconds": 0.24},
        }
        metrics = {"step": number, "iter": number, "loss": 1.0, "seconds": 1.25, "per_node": parts}
        events.append(StepFinished(metrics, report=False))
    (folder / "metrics.jsonl").unlink()
    (folder / "events.jsonl").unlink()
    write(folder, events)
    save_file({"a": np.zeros((1000, 1000), np.float32)}, str(folder / "adapters.safetensors"))


def test_a_run_tells_its_machines_and_links(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_measured(tmp_path)
    text = said(capsys, "--run", "last", "--add", "Ben's Mac: 1500")
    first, second = text.splitlines()[:2]
    assert first.startswith("run 20260101-one: 9 settled steps of Air, Studio; a step took 1.25 s, simulated 1.")
    assert second.startswith("a step: 8 rows of 369 tokens on average; 4 MB to add up; links 300 Mbit/s at a switch")
    found = figures(capsys, "--run", str(tmp_path), "--add", "Ben's Mac: 1500")
    assert [row["machines"][-1] for row in found["rows"]] == ["Studio", "Ben's Mac", "Air"]
    own = figures(capsys, "--run", str(tmp_path))["rows"][-1]
    assert own["machines"] == ["Studio", "Air"]
    assert own["step_seconds"] == pytest.approx(1.25, rel=0.1)
    assert own["network_seconds"] == pytest.approx(0.2, rel=0.1)
    faster = figures(capsys, "--run", str(tmp_path), "--link", "Air - Studio: thunderbolt")["rows"][-1]
    # Of its four runs only the last is waited for: a part of their 112 ms of transfer, beside what adding it up costs.
    assert 0.02 < own["network_seconds"] - faster["network_seconds"] < 0.1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "say which machines"),
        (("--machine", "Studio"), "--machine 'Studio': write it as"),
        (("--machine", "Studio: no"), "is no number of tokens per second"),
        ((*TWO, "--link", "string"), "--link 'string': 'string' is no link"),
        ((*TWO, "--link", "Studio - Bob: wifi"), "name two of the machines"),
        ((*TWO, "--machine", "Air: 10"), "two machines are called Air"),
        (("--machine", "2 x a: 1", "--machine", "a 2: 1"), "two machines are called a 2"),
        (("--machine", "40 x a: 1", "--machine", "40 x b: 1"), "80 machines; up to 64"),
        ((*TWO, "--gradient-size", "much"), "--gradient-size: 'much' is no size"),
        ((*TWO, "--batch-size", "0"), "0 is not in the range"),
        ((*TWO, "--add", "Air: 10"), "--add is for machines beside those of --run"),
        ((*TWO, "--run", "last"), "--run says which machines there are"),
        (("--run", "last", "--batch-size", "4"), "--batch-size is the run's own"),
        (("--run", "last"), "there is no run yet"),
        (("--fleet", "none.yaml"), "--fleet none.yaml: No such file"),
    ],
)
def test_mistakes_get_one_line(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *arguments, code=2)
    assert told in text
    assert len(text.splitlines()) == 1 or "Usage" in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("just words", "no mapping in YAML or JSON"),
        ("machine: {a: 1}", "no such key: machine"),
        ("machines: {a: 1}\nbatch_size: many", "batch_size is a whole number from 1, not 'many'"),
        ("machines: {a: 1}\nrow_length: 1", "row_length is a number from 2, not 1"),
        ("machines: 5", "machines is a list of texts"),
        ("machines: {a: fast}", "is no number of tokens per second"),
    ],
)
def test_what_is_no_fleet(content: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(content)
    assert told in said(capsys, "--fleet", str(tmp_path / "fleet.yaml"), code=2)


def test_of_a_run_with_rounds_of_local_steps_nothing_is_predicted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_measured(tmp_path, local_steps=16)
    assert "with --local-steps 16 its machines trained by themselves" in said(capsys, "--run", "last", code=2)


def test_a_run_of_few_steps_teaches_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_measured(tmp_path, steps=4)
    assert "1 settled steps, too few to learn from" in said(capsys, "--run", "last", code=2)
    make_run("20260102-two", tmp_path / "two", [2.0])
    (tmp_path / "two" / "adapters.safetensors").unlink()
    assert "give --gradient-size" in said(capsys, "--run", "20260102", code=2)
