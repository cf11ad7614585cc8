"""Reading JSON lines as they are written."""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.view.tail import Tail


def test_each_line_comes_once_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    with path.open("w") as file:
        file.write('{"step": 1}\n{"step"')
        file.flush()
        assert tail.read() == [{"step": 1}]
        assert tail.read() == []
        file.write(": 2}\n")
        file.flush()
        assert tail.read() == [{"step": 2}]
    assert tail.read() == []


def test_letters_are_never_cut_in_two(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = '{"text": "Grüße 🙂"}\n'.encode()
    tail = Tail(path)
    found = []
    with path.open("wb", buffering=0) as file:
        for byte in whole:
            file.write(bytes([byte]))
            found += tail.read()
    assert found == [{"text": "Grüße 🙂"}]


def test_what_is_no_object_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n[1]\n{"a": 1\n\xff\xfe\n{"b": 2}\n\n')
    tail = Tail(path)
    assert tail.read() == [{"b": 2}]
    assert tail.broken == 3


def test_a_file_that_is_written_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    tail = Tail(path)
    assert len(tail.read()) == 2
    other = tmp_path / "new"
    other.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    os.replace(other, path)
    assert [row["step"] for row in tail.read()] == [1, 2, 3]
    path.write_text('{"step": 1}\n')  # cut in place
    assert [row["step"] for row in tail.read()] == [1]


def test_a_folder_that_is_moved_away_gives_nothing_until_a_new_one_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    tail = Tail(folder / "metrics.jsonl")
    assert tail.read()
    folder.rename(tmp_path / "previous")
    assert tail.read() == []
    folder.mkdir()
    assert tail.read() == []
    (folder / "metrics.jsonl").write_text('{"step": 7}\n')
    assert tail.read() == [{"step": 7}]
