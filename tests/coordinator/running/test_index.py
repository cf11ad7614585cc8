"""The index of runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.home import registry
from coordinator.runfolder import RunFolder
from coordinator.running import index
from coordinator.running.figures import Figures, last_figures
from coordinator.running.presence import present
from coordinator.stream import RunStarted, StepFinished
from coordinator.view.figures import tiles_of
from coordinator.view.format import loss_text
from coordinator.view.records import read_run
from coordinator.view.state import RunState
from node.errors import UserError


def test_facts_are_added_to_an_entry() -> None:
    first, second = index.new_id(), index.new_id()
    assert first != second
    assert index.read(first) is None
    index.record(first, folder="f", status="running")
    index.record(first, status="done", final_loss=1.5)
    found = index.read(first)
    assert found is not None
    assert found.pop("began") > 0
    assert found == {"run": first, "folder": "f", "status": "done", "final_loss": 1.5}
    assert index.read(second) is None


def test_what_is_forgotten_is_listed_no_more() -> None:
    for run in ("b", "a", "c"):
        index.record(run, folder="f")
    assert [entry["run"] for entry in index.read_all().entries] == ["a", "b", "c"]
    index.forget("b")
    index.forget("b")
    assert [entry["run"] for entry in index.read_all().entries] == ["a", "c"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"run": "other", "folder": "f"}',
        '{"run": "broken"}',
        '{"run": "broken", "folder": 3}',
        "[" * 9999,
    ],
)
def test_a_damaged_entry_takes_no_other_with_it(content: str) -> None:
    index.record("good", folder="f")
    index.entry_path("broken").write_text(content)
    found = index.read_all()
    assert [entry["run"] for entry in found.entries] == ["good"]
    assert found.broken == (registry() / "broken.json",)


@pytest.mark.parametrize("run", ["", "../../etc/passwd", "a/b", ".hidden", "x" * 65])
def test_no_id_leads_out_of_the_index(run: str) -> None:
    with pytest.raises(UserError, match="is no id of a run"):
        index.record(run, folder="f")


def test_an_entry_is_whole_whenever_its_writer_is_killed() -> None:
    index.record("r1", folder="f", number=-1)
    code = (
        "from coordinator.running import index\n"
        "for number in range(1_000_000):\n"
        "    index.record('r1', number=number, text='x' * 50_000)\n"
        "    print(number, flush=True)\n"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(5):
                process.stdout.readline()
            process.kill()
        found = index.read("r1")
        assert found is not None
        assert found["folder"] == "f"
    assert index.read_all().broken == ()
    with present("r1", Path("f"), "tiny", signals=True):
        left = {path.name for path in registry().iterdir()}
    assert left == {"r1.json"}, "what was half written is swept"


def test_the_last_figures_are_read_from_the_end(tmp_path: Path) -> None:
    metrics, folder = tmp_path / "metrics.jsonl", RunFolder(tmp_path)
    assert last_figures(folder) == Figures()
    metrics.write_text('{"step": 0, "val_loss": 3.5}\n')
    assert last_figures(folder) == Figures(None, None, 3.5)
    filling = "".join(f'{{"step": {step}, "loss": 2.5, "text": "{"x" * 200}"}}\n' for step in range(1, 2001))
    metrics.write_text('{"step": 0, "val_loss": 3.5}\n' + filling + 'no object\n{"step": 2001, "loss": 1.')
    assert last_figures(folder) == Figures(2000, 2.5, 3.5)


def test_the_last_loss_is_that_of_the_last_report_interval(tmp_path: Path) -> None:
    steps = [{"step": n, "iter": 2 * n, "loss": float(n), "tokens": n} for n in range(1, 101)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in steps))
    for interval, count in ((1, 1), (4, 2), (300, 100)):
        (tmp_path / "config.yaml").write_text(f"iters: 200\nsteps_per_report: {interval}\n")
        part = steps[-count:]
        expected = sum(s["loss"] * s["tokens"] for s in part) / sum(s["tokens"] for s in part)
        found = last_figures(RunFolder(tmp_path)).final_loss
        assert found == pytest.approx(expected)
        record, state = read_run(tmp_path), RunState()
        assert record.training_loss == found
        assert tiles_of(record)[0][:2] == ("Training loss", loss_text(found))
        state.apply(RunStarted("r1", "adapters", {"steps_per_report": interval}, 200, 100, 1, ()))
        for entry in steps:
            state.apply(StepFinished(entry, report=False))
        assert state.training_loss == found, "what the command shows while it trains"
    (tmp_path / "config.yaml").write_text("steps_per_report: many\n")
    assert last_figures(RunFolder(tmp_path)).final_loss == pytest.approx(read_run(tmp_path).training_loss)
