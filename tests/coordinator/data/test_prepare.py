from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.data import chunks
from coordinator.data.prepare import prepare
from coordinator.data.rows import Features
from coordinator.data.source import DataFile, DataSource, Split, local_source
from coordinator.data.tokenise import RowTokeniser, TokeniseOptions
from coordinator.data.tokenizer import load_tokenizer
from coordinator.data.tokenset import DamagedTokenSet, TokenSet
from node.errors import RowError, UserError
from tests.coordinator.data.helpers import chat, write_rows
from tests.fixtures.tokenizers import byte_bpe

Calls = list[tuple[str, int, int]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    byte_bpe(tmp_path / "model")
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": f"row {number} " * number} for number in range(1, 21)])
    write_rows(tmp_path / "data" / "valid.jsonl", [{"text": "another"}])
    return tmp_path


def run(
    place: Path, splits: tuple[Split, ...] = ("train", "valid"), calls: Calls | None = None, **options: Any
) -> dict[Split, TokenSet]:
    told: Calls = [] if calls is None else calls
    return prepare(
        local_source(place / "data"),
        place / "model",
        TokeniseOptions(**options),
        place / "cache",
        lambda *call: told.append(call),
        splits,
    )


def content(tokens: TokenSet) -> list[tuple[list[int], list[int]]]:
    return [(row.tolist(), spans.tolist()) for row, spans in map(tokens.row, range(len(tokens)))]


def test_rows_come_back_in_order_with_their_totals(place: Path) -> None:
    calls: Calls = []
    found = run(place, calls=calls)
    train = found["train"]
    assert len(train) == 20
    assert len(found["valid"]) == 1
    assert train.lengths.tolist() == [len(train.row(index)[0]) for index in range(20)]
    assert train.lines.tolist() == list(range(1, 21))
    assert train.longest == train.lengths.max()
    assert train.target_tokens == int((train.lengths - 1).sum())
    assert (train.truncated, train.dropped) == (0, 0)
    assert train.row(3)[1].tolist() == [1, train.lengths[3]]
    assert calls[0] == ("tokenising train", 0, 20)
    assert ("tokenising train", 20, 20) in calls
    assert calls[-1] == ("tokenising valid", 1, 1)


def test_the_second_time_comes_from_the_cache(place: Path) -> None:
    first = run(place)
    calls: Calls = []
    again = run(place, calls=calls)
    assert calls == []
    assert again["train"].folder == first["train"].folder
    assert again["train"].digest == first["train"].digest


def test_the_cache_goes_by_content_not_by_name(place: Path) -> None:
    first = run(place)["train"]
    (place / "data").rename(place / "moved")
    (place / "data").symlink_to(place / "moved")
    (place / "model").rename(place / "other")
    (place / "model").symlink_to(place / "other")
    assert run(place)["train"].folder == first.folder


def test_other_data_options_or_tokenizers_are_other_sets(place: Path) -> None:
    first = run(place, ("train",))["train"]
    shorter = run(place, ("train",), max_seq_length=9)["train"]
    assert shorter.digest != first.digest
    assert shorter.truncated > 0
    assert shorter.longest == 9
    config = place / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<|endoftext|>"}))
    assert run(place, ("train",))["train"].row(0)[0][-1] != first.row(0)[0][-1]
    write_rows(place / "data" / "train.jsonl", [{"text": "row"}])
    assert len(run(place, ("train",))["train"]) == 1


def test_the_digest_is_of_the_tokens_alone(place: Path) -> None:
    first = run(place, ("train",))["train"]
    path = place / "data" / "train.jsonl"
    path.write_bytes(b"\n" + path.read_bytes().replace(b'"text": ', b'"id": 1, "text":'))
    again = run(place, ("train",))["train"]
    assert again.folder != first.folder
    assert again.digest == first.digest
    assert again.lines[0] == 2


@pytest.mark.parametrize("damage", ["cut", "missing", "header", "version"])
def test_a_damaged_set_is_built_again(place: Path, damage: str) -> None:
    first = run(place, ("train",))["train"]
    expected = content(first)
    folder = first.folder
    header = folder / "header.json"
    if damage == "cut":
        os.truncate(folder / "tokens.bin", 40)
    elif damage == "missing":
        (folder / "spans.bin").unlink()
    elif damage == "header":
        header.write_text("{")
    else:
        header.write_text(json.dumps({**json.loads(header.read_text()), "version": 0}))
    with pytest.raises(DamagedTokenSet):
        TokenSet(folder)
    assert content(run(place, ("train",))["train"]) == expected


def test_a_bad_row_is_refused_with_its_place_and_leaves_nothing(place: Path) -> None:
    path = place / "data" / "train.jsonl"
    path.write_text(path.read_text() + '\n{"text": 3}\n')
    with pytest.raises(RowError) as caught:
        run(place, ("train",))
    assert str(caught.value) == f'{path}:22: "text" must be a string, not a number'
    assert list((place / "cache").iterdir()) == []


def test_rows_with_nothing_to_train_on_are_dropped_and_counted(place: Path) -> None:
    write_rows(place / "data" / "train.jsonl", [{"text": ""}, {"text": "a"}, {"text": ""}])
    train = run(place, ("train",))["train"]
    assert (len(train), train.dropped) == (1, 2)
    assert train.lines.tolist() == [2]


def test_a_set_with_nothing_to_train_on_is_the_users_mistake(place: Path) -> None:
    write_rows(place / "data" / "train.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match="leaves anything to train on"):
        run(place, ("train",))


def test_a_missing_valid_set_is_left_out_and_others_are_not(place: Path) -> None:
    (place / "data" / "valid.jsonl").unlink()
    assert list(run(place)) == ["train"]
    with pytest.raises(UserError, match="has no test set"):
        run(place, ("train", "test"))


def test_a_tokenizer_of_another_model_is_the_users_mistake(place: Path) -> None:
    (place / "model" / "config.json").write_text('{"vocab_size": 300}')
    with pytest.raises(UserError, match=r"does not fit its model: it gives token \d+, the model knows 300 tokens"):
        run(place)


def test_several_files_follow_each_other_with_their_own_keys(place: Path) -> None:
    first = DataFile(write_rows(place / "a.jsonl", [{"body": "a"}]), Features(text="body"))
    second = DataFile(write_rows(place / "b.jsonl", [chat("a", "b")]))
    source = DataSource("two", {"train": (first, second)})
    found = prepare(source, place / "model", TokeniseOptions(), place / "cache", lambda *_: None, ("train",))
    assert len(found["train"]) == 2
    assert found["train"].lines.tolist() == [1, 1]


def test_many_processes_give_what_one_gives_up_to_the_first_bad_row(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"row {number} " * (number % 7 + 1)} for number in range(1300)]
    path = write_rows(place / "data" / "train.jsonl", rows)
    alone = run(place, ("train",))["train"]
    path.write_text(path.read_text() + '{"text": 1}\n' * 700)
    monkeypatch.setattr(chunks, "PARALLEL_BYTES", 1)
    tokeniser = RowTokeniser(load_tokenizer(place / "model"), TokeniseOptions(), "the model")
    found = chunks.tokenised_chunks(DataFile(path), "text", tokeniser, place / "model", workers=2)
    together = [next(found), next(found)]
    with pytest.raises(RowError) as caught:
        next(found)
    assert caught.value.line == 1301
    expected = np.concatenate([alone.row(index)[0] for index in range(1000)])
    assert np.array_equal(np.concatenate([chunk.tokens for chunk in together]), expected)
    assert np.concatenate([chunk.lines for chunk in together]).tolist() == list(range(1, 1001))


def test_a_full_disk_is_one_clear_line(place: Path) -> None:
    write_rows(place / "data" / "train.jsonl", [{"text": "row " * 50}] * 200)
    code = (
        "import resource, signal, sys; from pathlib import Path; from tests.coordinator.data.test_prepare import run;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from node.errors import UserError\n"
        "try: run(Path(sys.argv[1]), ('train',))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write tokenised data to {place / 'cache'}: File too large")
    assert done.stdout.count("\n") == 1
    assert list((place / "cache").iterdir()) == []


def test_what_killed_processes_left_is_cleaned_up(place: Path) -> None:
    for name, age in ((".building-old", 48 * 3600), (".building-new", 60)):
        folder = place / "cache" / name
        folder.mkdir(parents=True)
        stamp = folder.stat().st_mtime - age
        os.utime(folder, (stamp, stamp))
    run(place)
    assert not (place / "cache" / ".building-old").exists()
    assert (place / "cache" / ".building-new").exists()


def test_tokens_are_mapped_not_read(place: Path) -> None:
    train = run(place)["train"]
    row, spans = train.row(2)
    for array in (row, spans, train.lengths):
        base: Any = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
        assert array.dtype == np.int32
