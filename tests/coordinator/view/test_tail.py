"""Following a file that another process writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from coordinator.runfolder import RunFolder
from coordinator.view.tail import Tail
from node.files import write_text_atomically


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_only_what_is_new_and_whole(path: Path) -> None:
    tail = Tail(path)
    assert tail.read() == []
    append(path, '{"step": 1}\n{"step": 2}\n{"st')
    assert tail.read() == [{"step": 1}, {"step": 2}]
    assert tail.read() == []
    append(path, 'ep": 3}')
    assert tail.read() == []
    append(path, "\n")
    assert tail.read() == [{"step": 3}]
    assert tail.read() == []
    assert tail.broken_lines == 0


def test_a_line_that_was_taken_back_is_read_when_it_is_whole(path: Path) -> None:
    append(path, '{"step": 1}\n{"step"')
    tail = Tail(path)
    assert tail.read() == [{"step": 1}]
    os.truncate(path, len('{"step": 1}\n'))
    assert tail.read() == []
    append(path, '{"step": 2}\n')
    assert tail.read() == [{"step": 2}]


def test_lines_that_hold_no_object_are_counted(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n[1]\n\xff\xfe\n\n{"step": 2, "loss": NaN}\n' + b"[" * 100_000 + b"\n")
    tail = Tail(path)
    assert [entry["step"] for entry in tail.read()] == [1, 2]
    assert tail.broken_lines == 3


def test_lines_longer_than_a_piece(path: Path) -> None:
    long = {"text": "é" * 1_500_000}
    append(path, json.dumps(long, ensure_ascii=False) + '\n{"step": 1}\n')
    assert Tail(path).read() == [long, {"step": 1}]


def test_a_run_that_goes_on_writes_its_file_anew(path: Path) -> None:
    tail = Tail(path)
    append(path, "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    assert len(tail.read()) == 3
    append(path, '{"step": 4}\n')
    write_text_atomically(path, '{"step": 1}\n{"step": 2}\n')
    append(path, '{"step": 3, "again": true}\n')
    found = tail.read()
    assert found == [{"step": 4}, {"step": 1}, {"step": 2}, {"step": 3, "again": True}], "nothing is passed over"
    os.truncate(path, 0)
    append(path, '{"step": 9}\n')
    assert tail.read() == [{"step": 9}]


def test_a_run_that_is_moved_to_previous_is_followed_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin("r1", "")
    append(folder.metrics, '{"step": 1}\n')
    tail = Tail(folder.metrics)
    assert tail.read() == [{"step": 1}]
    moved = folder.archive()
    assert moved is not None
    append(moved / "metrics.jsonl", '{"step": 2}\n')
    append(folder.metrics, '{"step": 1, "run": "another"}\n')
    assert tail.read() == [{"step": 2}]
    assert tail.read() == []


def test_a_folder_that_is_deleted_or_moved_away(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    append(folder / "events.jsonl", '{"kind": "started"}\n')
    tail = Tail(folder / "events.jsonl")
    assert len(tail.read()) == 1
    folder.rename(tmp_path / "elsewhere")
    append(tmp_path / "elsewhere" / "events.jsonl", '{"kind": "finished"}\n')
    assert tail.read() == [{"kind": "finished"}]
    (tmp_path / "elsewhere" / "events.jsonl").unlink()
    assert tail.read() == []


def test_nothing_is_left_open(path: Path) -> None:
    append(path, '{"step": 1}\n')
    before = len(os.listdir("/dev/fd"))
    tail, other = Tail(path), Tail(path)
    assert tail.read() == other.read()
    tail.close()
    tail.close()
    assert tail.read() == [{"step": 1}]
    tail.close()
    del other
    assert len(os.listdir("/dev/fd")) == before
