from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.data.formats import first_kind
from coordinator.data.hub import find_source, read_hub_datasets
from coordinator.data.prepare import prepare
from coordinator.data.rows import Features
from coordinator.data.source import SPLITS, DataSource
from coordinator.data.tokenise import TokeniseOptions
from node.errors import RowError, UserError
from tests.coordinator.data.helpers import write_rows
from tests.fixtures.tokenizers import byte_bpe


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was imported before: no network, and nothing written to the user's cache."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs: list[Any] = [{"q": f"question {number}", "a": str(number), "id": number} for number in range(20)]
    pairs[3]["tools"] = [{"type": "function", "function": {"name": "add"}}]
    write_rows(tmp_path / "set" / "train.jsonl", pairs)
    write_rows(tmp_path / "set" / "validation.jsonl", pairs[:4])
    return tmp_path / "set"


def find(tmp_path: Path, data: str = "data", hf_dataset: Any = None, **features: str) -> DataSource:
    return find_source(data, hf_dataset, Features(**features), tmp_path / "cache", lambda *_: None, SPLITS)


def rows_of(source: DataSource, split: Any) -> list[Any]:
    return [json.loads(line) for file in source.files(split) for line in file.path.read_text().splitlines()]


def test_mlx_lm_takes_four_fifths_and_the_last_tenth(tmp_path: Path, folder: Path) -> None:
    source = find(tmp_path, hf_dataset={"path": str(folder), "prompt_feature": "q", "completion_feature": "a"})
    assert [row["a"] for row in rows_of(source, "train")] == [str(number) for number in range(16)]
    assert [row["a"] for row in rows_of(source, "valid")] == ["18", "19"]
    assert "test" not in source.splits
    assert first_kind(source.files("train")[0]) == "completions"


def test_only_wanted_columns_are_kept_and_missing_values_are_missing(tmp_path: Path, folder: Path) -> None:
    source = find(tmp_path, hf_dataset={"path": str(folder), "prompt_feature": "q", "completion_feature": "a"})
    rows = rows_of(source, "train")
    assert rows[0] == {"q": "question 0", "a": "0"}
    assert rows[3]["tools"] == [{"type": "function", "function": {"name": "add"}}]


def test_a_list_of_data_sets_follows_each_other(tmp_path: Path, folder: Path) -> None:
    write_rows(tmp_path / "other" / "train.jsonl", [{"body": "x"}] * 10)
    entries = [
        {"path": str(folder), "prompt_feature": "q", "completion_feature": "a", "train_split": "train[:3]"},
        {"path": str(tmp_path / "other"), "text_feature": "body", "train_split": "train", "valid_split": None},
    ]
    source = find(tmp_path, hf_dataset=entries)
    assert len(rows_of(source, "train")) == 13
    assert len(rows_of(source, "valid")) == 2
    byte_bpe(tmp_path / "model")
    found = prepare(source, tmp_path / "model", TokeniseOptions(), tmp_path / "tokens", lambda *_: None)
    assert len(found["train"]) == 13


def test_a_saved_data_set_is_read_and_sliced(tmp_path: Path, folder: Path) -> None:
    import datasets

    datasets.load_dataset(str(folder)).save_to_disk(str(tmp_path / "saved"))
    names = {"prompt_feature": "q", "completion_feature": "a"}
    source = find(tmp_path, hf_dataset={"path": str(tmp_path / "saved"), **names})
    assert len(rows_of(source, "train")) == 16
    assert [row["a"] for row in rows_of(source, "valid")] == ["18", "19"]


def test_an_unchanged_data_set_is_not_written_again(tmp_path: Path, folder: Path) -> None:
    entry = {"path": str(folder), "prompt_feature": "q", "completion_feature": "a"}
    first = find(tmp_path, hf_dataset=entry).files("train")[0].path
    stamp = first.stat().st_mtime_ns
    again = find(tmp_path, hf_dataset=entry).files("train")[0].path
    assert (again, again.stat().st_mtime_ns) == (first, stamp)


def test_a_bad_row_is_named_by_data_set_and_number(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": "a"}, {"text": None}])
    source = find(tmp_path, hf_dataset={"path": str(tmp_path / "set"), "train_split": "train"})
    byte_bpe(tmp_path / "model")
    with pytest.raises(RowError, match=r'set \[train\]:2: has no "text"'):
        prepare(source, tmp_path / "model", TokeniseOptions(), tmp_path / "tokens", lambda *_: None, ("train",))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"path": "FOLDER", "train_split": "nope"}, "Unknown split"),
        ({"path": "FOLDER"}, "has the columns q, a, id, tools, none of which is known"),
        ({"path": "FOLDER", "config": {"name": "nope"}}, "nope"),
        ({"path": "FOLDER", "config": "nope"}, '"config" must hold'),
        ({"path": "FOLDER", "promt_feature": "q"}, 'unknown key "promt_feature"; did you mean "prompt_feature"'),
        ({"train_split": "train"}, 'needs a "path"'),
        (["name"], 'needs a "path"'),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, folder: Path, entry: Any, reason: str) -> None:
    if isinstance(entry, dict) and "path" in entry:
        entry = {**entry, "path": str(folder)}
    with pytest.raises(UserError) as caught:
        find(tmp_path, hf_dataset=entry)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot reach the Hugging Face Hub for the data set nobody/nothing"):
        find(tmp_path, data="nobody/nothing")


def test_a_name_that_can_only_be_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in ("data", "./sets", "/no/such/folder", "~nobody/x/y"):
        with pytest.raises(UserError, match="no data folder"):
            find(tmp_path, data=name)


def test_a_folder_is_read_in_place(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": "a"}])
    source = find(tmp_path, data=str(tmp_path / "set"), text="body")
    assert source.files("train")[0].path == tmp_path / "set" / "train.jsonl"
    assert source.files("train")[0].features.text == "body"


def test_defaults_are_those_of_mlx_lm() -> None:
    assert read_hub_datasets({"path": "a/b"})[0].splits == {"train": "train[:80%]", "valid": "train[-10%:]"}
