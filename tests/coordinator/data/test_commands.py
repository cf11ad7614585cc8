from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coordinator.commands.data import data
from node.errors import UserError
from tests.coordinator.data.helpers import chat, write_rows
from tests.fixtures.tokenizers import byte_bpe


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(data, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def place(tmp_path: Path) -> Path:
    byte_bpe(tmp_path / "model")
    rows = [chat(f"question {number % 30}", "answer " * (number % 5 + 1)) for number in range(40)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "valid.jsonl", [rows[2], chat("new", "b"), rows[2]])
    return tmp_path


def test_check_reports_rows_lengths_duplicates_and_leaks(place: Path) -> None:
    report = json.loads(run("check", place / "data", "--model", place / "model", "--mask-prompt", "--json").stdout)
    train, valid = report["files"]
    assert report["ok"]
    assert (train["rows"], train["format"], train["unit"]) == (40, "chat", "tokens")
    assert (train["duplicates"], train["duplicate_lines"][0]) == (10, [31, 1])
    assert sum(item["rows"] for item in train["histogram"]) == 40
    assert train["longest"][0][0] == 15
    assert train["longest"][0][1] > train["median"] > 20
    assert 0 < train["target_tokens"] < train["total"]
    assert valid["duplicate_lines"] == [[3, 1]]
    assert report["leaks"] == [{"split": "valid", "other": "train", "rows": 2, "lines": [[1, 3], [3, 3]]}]


def test_check_shows_a_row_with_the_trained_part_marked(place: Path) -> None:
    arguments = ("check", place / "data", "--model", place / "model", "--mask", "assistant")
    sample = json.loads(run(*arguments, "--json").stdout)["files"][0]["sample"]
    assert sample == [
        {"text": "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n", "trained": False},
        {"text": "answer <|im_end|>\n", "trained": True},
    ]
    shown = run(*arguments).stdout
    assert "<|im_start|>assistant\n⟦answer <|im_end|>\n⟧" in shown
    assert "Leak: 2 rows of valid stand in train too" in shown


def test_check_counts_what_is_cut_and_what_is_left_out(place: Path) -> None:
    arguments = ("check", place / "data", "--model", place / "model", "--mask-prompt", "--max-seq-length", 12, "--json")
    train = json.loads(run(*arguments).stdout)["files"][0]
    assert train["truncated"] == 40
    assert train["dropped"] == 40
    assert train["longest"][0][1] > 12


def test_check_counts_words_without_a_model(place: Path) -> None:
    report = json.loads(run("check", place / "data", "--json").stdout)
    assert report["files"][0]["unit"] == "words"
    assert report["files"][0]["target_tokens"] is None
    # "user:", "question", its number, "assistant:" and five times "answer".
    assert report["files"][0]["longest"][0] == [5, 9]


def test_check_lists_bad_rows_and_ends_with_2(place: Path) -> None:
    path = place / "data" / "train.jsonl"
    path.write_text('{"text": 1}\nbad\n' + path.read_text() + '{"text": "a"}\n' * 30)
    (place / "data" / "valid.jsonl").write_text("")
    result = run("check", place / "data")
    assert result.exit_code == 2
    assert f"{path}:2: not valid JSON" in result.stdout
    assert result.stdout.count(f"{path}:") == 20
    listed = json.loads(run("check", place / "data", "--json").stdout)
    assert not listed["ok"]
    assert any("valid.jsonl is empty" in problem for problem in listed["problems"])


def test_check_finds_the_row_behind_bad_ones(place: Path) -> None:
    path = place / "data" / "train.jsonl"
    path.write_text("bad\n" + path.read_text())
    report = json.loads(run("check", place / "data", "--json").stdout)
    assert report["problems"] == [f"{path}:1: not valid JSON: Expecting value at column 1"]
    assert report["files"][0]["rows"] == 40


def test_check_counts_rows_that_the_template_refuses_as_bad(place: Path) -> None:
    byte_bpe(place / "model", chat_template="{{ raise_exception('no') if messages | length > 2 else 'ab' }}")
    write_rows(place / "data" / "train.jsonl", [chat("a", "b"), chat("a", "b", "c")])
    result = run("check", place / "data", "--model", place / "model")
    assert result.exit_code == 2
    assert "train.jsonl:2: the chat template refuses it: no" in result.stdout


def test_check_reads_other_keys(place: Path) -> None:
    write_rows(place / "own" / "train.jsonl", [{"q": "a", "a": "b"}])
    report = json.loads(
        run("check", place / "own", "--prompt-feature", "q", "--completion-feature", "a", "--json").stdout
    )
    assert report["files"][0]["format"] == "completions"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("check", "PLACE/none"), "no data folder"),
        (("check", "PLACE/data", "--mask-prompt"), "needs --model"),
        (("check", "PLACE/data", "--mask-prompt", "--mask", "all"), "exclude each other"),
        (("check", "PLACE/data", "--model", "PLACE/none"), "no tokenizer at"),
        (("split", "PLACE/none.jsonl", "--out", "PLACE/out"), "cannot read"),
        (("convert", "PLACE/none.json", "--out", "PLACE/out.jsonl"), "no file"),
    ],
)
def test_mistakes_are_one_line(place: Path, arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        run(*(argument.replace("PLACE", str(place)) for argument in arguments))
    assert reason in str(caught.value)
    assert caught.value.exit_code == 2


def test_split_says_what_it_wrote(place: Path) -> None:
    result = run("split", place / "data" / "train.jsonl", "--out", place / "out", "--valid", "0.1", "--json")
    written = json.loads(result.stdout)
    # The parts are of the 30 different rows.
    assert written["rows"]["valid"] in (3, 4, 5, 6)
    assert sum(written["rows"].values()) == 40
    assert written["duplicates"] == 10
    shown = run("split", place / "data" / "train.jsonl", "--out", place / "again")
    assert "train.jsonl" in shown.stdout
    assert "10 rows repeat earlier ones" in shown.stdout


def test_convert_says_what_it_recognised(place: Path) -> None:
    (place / "a.csv").write_text("instruction,input,output\nAdd,1 2,3\nHi,,\n")
    result = run("convert", place / "a.csv", "--out", place / "a.jsonl")
    assert result.stdout.splitlines() == [
        "recognised instruction + input: prompt, output: completion",
        "left out 1 without an answer or a text",
        f"rows written to {place / 'a.jsonl'}: 1",
    ]
    said = json.loads(run("convert", place / "a.csv", "--out", place / "b.jsonl", "--json").stdout)
    assert (said["rows"], said["skipped"]) == (1, 1)


def test_the_commands_load_nothing_heavy() -> None:
    code = (
        "import sys, coordinator.commands.data;"
        "print([name for name in ('numpy', 'rich', 'transformers', 'datasets', 'mlx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_check_with_a_model_does_not_load_mlx(place: Path) -> None:
    code = (
        "import sys; from coordinator.commands.data import data\n"
        "try: data(['check', sys.argv[1], '--model', sys.argv[2], '--json'])\n"
        "except SystemExit: print(sorted({name.split('.')[0] for name in sys.modules} & {'mlx', 'mlx_lm', 'torch'}))"
    )
    arguments = [sys.executable, "-c", code, str(place / "data"), str(place / "model")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""
