from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.data.split import split_file
from node.errors import RowError, UserError
from tests.coordinator.data.helpers import data_file, write_rows


def rows_in(folder: Path) -> dict[str, list[Any]]:
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.iterdir()}


def test_every_row_goes_to_one_side_and_the_parts_are_exact(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "id": number} for number in range(200)]
    file = data_file(write_rows(tmp_path / "all.jsonl", rows))
    result = split_file(file, tmp_path / "out", valid=0.1, test=0.2, seed=0)
    found = rows_in(tmp_path / "out")
    assert {name: len(rows) for name, rows in found.items()} == {"train": 140, "valid": 20, "test": 40}
    assert result.rows == {"train": 140, "valid": 20, "test": 40}
    assert sorted(row["id"] for rows in found.values() for row in rows) == list(range(200))
    # Each side keeps the order of the file, and none is a block of it.
    ids = [row["id"] for row in found["test"]]
    assert ids == sorted(ids)
    assert max(ids) - min(ids) > 100


def test_the_same_seed_gives_the_same_sides(tmp_path: Path) -> None:
    file = data_file(write_rows(tmp_path / "all.jsonl", [{"text": f"row {number}"} for number in range(50)]))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split_file(file, tmp_path / name, valid=0.2, test=0, seed=seed)
    assert rows_in(tmp_path / "a") == rows_in(tmp_path / "b") != rows_in(tmp_path / "c")
    assert set(rows_in(tmp_path / "a")) == {"train", "valid"}


def test_equal_rows_stand_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": f"row {number % 10}", "id": number} for number in range(100)]
    file = data_file(write_rows(tmp_path / "all.jsonl", rows))
    result = split_file(file, tmp_path / "out", valid=0.3, test=0.3, seed=0)
    texts = [{row["text"] for row in rows} for rows in rows_in(tmp_path / "out").values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 10
    assert result.duplicates == 90
    assert result.rows == {"train": 40, "valid": 30, "test": 30}


def test_a_small_part_of_few_rows_is_one_row(tmp_path: Path) -> None:
    file = data_file(write_rows(tmp_path / "all.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c"}]))
    assert split_file(file, tmp_path / "out", 0.1, 0.0, 0).rows == {"train": 2, "valid": 1}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = data_file(write_rows(tmp_path / "all.jsonl", [{"text": "a"}, {"text": "b"}]))
    write_rows(tmp_path / "test.jsonl", [{"text": "mine"}])
    with pytest.raises(UserError, match=r"test\.jsonl exists already"):
        split_file(file, tmp_path, 0.5, 0.0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"all.jsonl", "test.jsonl"}


def test_a_bad_row_leaves_nothing_behind(tmp_path: Path) -> None:
    file = data_file(write_rows(tmp_path / "all.jsonl", [{"text": "a"}, {"text": "b"}, {"text": 1}]))
    with pytest.raises(RowError, match=r"all\.jsonl:3"):
        split_file(file, tmp_path / "out", 0.5, 0.0, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("valid", "test"), [(0.5, 0.5), (-0.1, 0.0), (1.0, 0.0)])
def test_parts_that_leave_no_training_are_refused(tmp_path: Path, valid: float, test: float) -> None:
    file = data_file(write_rows(tmp_path / "all.jsonl", [{"text": "a"}, {"text": "b"}]))
    with pytest.raises(UserError, match="below 1 together"):
        split_file(file, tmp_path / "out", valid, test, 0)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    file = data_file(write_rows(tmp_path / "all.jsonl", [{"text": "a"}, {"text": "a"}]))
    with pytest.raises(UserError, match="has 1 different rows"):
        split_file(file, tmp_path / "out", 0.5, 0.0, 0)
