from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.data.columns import PAIRS, Columns
from coordinator.data.convert import convert_file
from coordinator.data.formats import first_kind
from node.errors import RowError, UserError
from tests.coordinator.data.helpers import chat, data_file

ANSWER = [{"prompt": "a", "completion": "b"}]


def convert(tmp_path: Path, name: str, content: str | bytes, **columns: str) -> tuple[list[Any], str, int]:
    path, out = tmp_path / name, tmp_path / "out" / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    result = convert_file(path, out, Columns(**columns))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == result.rows
    first_kind(data_file(out))
    return rows, result.recognised, result.skipped


@pytest.mark.parametrize(("prompt", "extra", "completion"), PAIRS)
def test_usual_names_of_pairs_are_recognised(tmp_path: Path, prompt: str, extra: str, completion: str) -> None:
    rows, recognised, _ = convert(tmp_path, "a.json", json.dumps([{prompt: "a", completion: "b", "id": 1}]))
    assert rows == ANSWER
    assert recognised == f"{prompt}: prompt, {completion}: completion"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"question": "a", "answer": "b"}]'),
        ("a.json", '\ufeff{"version": 2,\n "data": [{"question": "a", "answer": "b"}]}'),
        ("a.json", '{"rows": [{"question": "a", "answer": "b"}]}'),
        ("a.json", '{"question": "a", "answer": "b"}'),
        ("a.json", '{"question": "a", "answer": "b"}\n\n{"question": "c", "answer": ""}\n'),
        ("a.jsonl", '[{"question": "a", "answer": "b"}]'),
        ("a.jsonl", '[\n{"question": "a", "answer": "b"}\n]'),
        ("a.jsonl", '{"question": "a", "answer": "b"}'),
        ("a.csv", "\ufeffQuestion,Answer\na,b\n"),
        ("a.csv", "question;answer;note\na;b;x,y\n"),
        ("a.tsv", "question\tanswer\na\tb\n"),
    ],
)
def test_files_of_every_shape_are_read(tmp_path: Path, name: str, content: str) -> None:
    assert convert(tmp_path, name, content)[0] == ANSWER


def test_cells_of_csv_may_hold_lines_and_quotes(tmp_path: Path) -> None:
    rows, _, _ = convert(tmp_path, "a.csv", 'prompt,completion\n"two\nlines","say ""hi"", please"\n')
    assert rows == [{"prompt": "two\nlines", "completion": 'say "hi", please'}]


def test_input_is_added_to_the_instruction_where_there_is_any(tmp_path: Path) -> None:
    content = json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Hi"}])
    rows, recognised, _ = convert(tmp_path, "a.json", content)
    assert rows == [{"prompt": "Add\n\n1 2", "completion": "3"}, {"prompt": "Hi", "completion": "Hi"}]
    assert recognised == "instruction + input: prompt, output: completion"


def test_a_system_prompt_makes_conversations_of_all_rows(tmp_path: Path) -> None:
    content = json.dumps([{"system": "Be brief.", "prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}])
    rows, _, _ = convert(tmp_path, "a.json", content)
    assert rows[0] == {"messages": [{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"]]}
    assert rows[1] == chat("a", "b")


def test_chosen_columns_win_over_known_ones(tmp_path: Path) -> None:
    content = json.dumps([{"prompt": "x", "completion": "x", "frage": "a", "antwort": "b", "kontext": "k"}])
    rows, _, _ = convert(tmp_path, "a.json", content, prompt="frage", completion="antwort", extra="kontext")
    assert rows == [{"prompt": "a\n\nk", "completion": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": chat("a", "b")["messages"], "id": 4},
        {"dialog": json.dumps(chat("a", "b")["messages"])},
        chat("a", "b")["messages"],
    ],
)
def test_conversations_become_messages(tmp_path: Path, row: Any) -> None:
    assert convert(tmp_path, "a.jsonl", json.dumps(row) + "\n" + json.dumps(row))[0] == [chat("a", "b")] * 2


def test_tools_stay_with_their_conversation(tmp_path: Path) -> None:
    row = {**chat("a", "b"), "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert convert(tmp_path, "a.json", json.dumps([row]))[0] == [row]


def test_plain_text_stays_text(tmp_path: Path) -> None:
    assert convert(tmp_path, "a.csv", "text,id\nhello,1\n")[0] == [{"text": "hello"}]


def test_numbers_become_text_and_rows_without_an_answer_are_left_out(tmp_path: Path) -> None:
    content = json.dumps([{"question": "2+2", "answer": 4}, {"question": "?", "answer": None}, {"question": "?"}])
    rows, _, skipped = convert(tmp_path, "a.json", content)
    assert rows == [{"prompt": "2+2", "completion": "4"}]
    assert skipped == 2


def test_no_row_is_lost_in_a_long_file(tmp_path: Path) -> None:
    rows, _, _ = convert(tmp_path, "a.csv", "prompt,answer\n" + "".join(f"q{i},a{i}\n" for i in range(350)))
    assert [row["completion"] for row in rows] == [f"a{i}" for i in range(350)]


@pytest.mark.parametrize(
    ("name", "content", "columns", "reason"),
    [
        ("a.json", '[{"x": 1, "y": 2}]', {}, "cannot tell what its columns hold (x, y)"),
        ("a.json", '[{"x": 1, "y": 2}]', {"prompt": "x"}, "go together"),
        ("a.json", '[{"x": 1, "y": 2}]', {"prompt": "x", "completion": "z"}, 'no column "z"; it has x, y'),
        ("a.json", '[{"x": 1, "y": 2}]', {"text": "x", "chat": "y"}, "give one of"),
        ("a.json", "[]", {}, "has no rows"),
        ("a.json", "", {}, "is empty"),
        ("a.json", "3", {}, "holds a number"),
        ("a.json", '[{"prompt": 1},\n{"prompt" 2}]', {}, "a.json:2: not valid JSON"),
        ("a.json", "[" * 100_000, {}, "JSON"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt"', {}, "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"prompt": "a", "answer": "b"}\n3\n', {}, "a.jsonl:2: a row must be an object"),
        ("a.json", '[{"prompt": "a", "answer": {"b": 1}}]', {}, 'a.json:1: "answer" must be text, not an object'),
        ("a.json", '[{"prompt": "a", "answer": ""}]', {}, "none of its 1 rows"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', {}, 'a.json:1: message 1 (user) has no "content"'),
        ("a.json", '[{"chat": "hello"}]', {}, '"chat" is not a conversation'),
        ("a.csv", "", {}, "is empty"),
        ("a.csv", "prompt,answer\n", {}, "has no rows"),
        ("a.csv", "prompt,answer\na,b,c\n", {}, "a.csv:2: has more cells"),
        ("a.csv", "prompt,answer\na\n", {}, "a.csv:2: has fewer cells"),
        ("a.csv", 'prompt,answer\n"a"b,c\n', {}, "not valid CSV"),
        ("a.csv", b"prompt,answer\n\xff,b\n", {}, "not UTF-8"),
        ("a.json", b'[{"prompt": "\xff"}]', {}, "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff"}\n', {}, "a.jsonl:2"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_line(
    tmp_path: Path, name: str, content: str | bytes, columns: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        convert(tmp_path, name, content, **columns)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_nothing_is_overwritten_and_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert_file(tmp_path / "rows.jsonl", tmp_path / "rows.jsonl", Columns())
    with pytest.raises(UserError, match="no file"):
        convert_file(tmp_path / "none.csv", tmp_path / "out.jsonl", Columns())


def test_a_bad_row_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RowError):
        convert(tmp_path, "a.json", '[{"prompt": "a", "answer": "b"}, {"prompt": [], "answer": "b"}]')
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.json"]
