"""The index of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.home import registry
from coordinator.running import index
from coordinator.running.figures import Figures, last_figures
from coordinator.running.presence import present
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
    metrics = tmp_path / "metrics.jsonl"
    assert last_figures(metrics) == Figures()
    metrics.write_text('{"step": 0, "val_loss": 3.5}\n')
    assert last_figures(metrics) == Figures(None, None, 3.5)
    filling = "".join(f'{{"step": {step}, "loss": 2.5, "text": "{"x" * 200}"}}\n' for step in range(1, 2001))
    metrics.write_text('{"step": 0, "val_loss": 3.5}\n' + filling + 'no object\n{"step": 2001, "loss": 1.')
    assert last_figures(metrics) == Figures(2000, 2.5, 3.5)
