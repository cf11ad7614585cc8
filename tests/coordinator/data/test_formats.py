from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.data.formats import first_kind, parse_row
from coordinator.data.rows import BadRow, Features, Row
from coordinator.data.source import local_source
from node.errors import RowError, UserError
from tests.coordinator.data.helpers import chat, data_file, write_rows


def read(row: Any, kind: Any = "messages", **features: str) -> Row:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(line, kind, Features(**features))


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "text"),
        (chat("a", "b"), "messages"),
        ({"prompt": "a", "completion": "b"}, "completions"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations"),
        ({"text": "a", "messages": [], "prompt": "p", "completion": "c"}, "completions"),
        ({"text": "a", "messages": []}, "messages"),
        ({"text": "a", "prompt": "p"}, "text"),
    ],
)
def test_the_format_is_told_by_the_keys_of_the_first_row(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    assert first_kind(data_file(write_rows(tmp_path / "a.jsonl", [row]))) == kind


def test_feature_names_choose_the_keys(tmp_path: Path) -> None:
    row = {"q": "2+2", "a": "4", "text": "ignored"}
    names = {"prompt": "q", "completion": "a"}
    assert first_kind(data_file(write_rows(tmp_path / "a.jsonl", [row]), **names)) == "completions"
    assert [message["content"] for message in read(row, "completions", **names).messages] == ["2+2", "4"]
    assert read({"body": "x"}, "text", text="body").text == "x"


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n  \n{"text": "a"}\r\n')
    assert first_kind(data_file(path)) == "text"


def test_unknown_keys_are_ignored() -> None:
    assert read({"text": "a", "id": 7, "meta": {"b": []}}, "text").text == "a"


def test_sharegpt_rows_become_messages() -> None:
    row = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "Four."},
        ],
        "tools": json.dumps([TOOL]),
    }
    read_row = read(row, "conversations")
    assert [message["role"] for message in read_row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert read_row.messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert read_row.tools == (TOOL,)
    assert read_row.format == "tools"


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_tool_call_arguments_may_be_text_or_an_object(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    row = read({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [TOOL]})
    assert row.messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert row.messages[0]["tool_calls"][0]["id"] == "1"
    assert row.format == "tools"


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "ab"


def test_an_unusual_role_is_left_to_the_template() -> None:
    assert read({"messages": [{"role": "critic", "content": "a"}]}).messages[0]["role"] == "critic"


def message(**keys: Any) -> dict[str, Any]:
    return {"messages": [keys]}


BAD_ROWS: list[tuple[Any, str, str]] = [
    (b'{"text": "a"', "text", "not valid JSON"),
    (b'{"text": "a', "text", "not valid JSON: Unterminated string starting at column 10"),
    (b"[", "text", "data convert"),
    (b'[{"text": "a"}]', "text", "must be a JSON object, not a list"),
    (b'"a"', "text", "must be a JSON object, not a string"),
    (b"null", "text", "must be a JSON object, not null"),
    (b'{"text": "\xff"}', "text", "not UTF-8"),
    (b'{"text": "\\ud800"}', "text", "surrogate"),
    (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "text", "JSON"),
    (b'{"text": "", "n": ' + b"9" * 5000 + b"}", "text", "not usable JSON"),
    ({"txt": "a"}, "text", 'has no "text"'),
    ({"text": None}, "text", '"text" must be a string, not null'),
    ({"text": 3}, "text", "not a number"),
    ({"text": True}, "text", "not a boolean"),
    (chat("a"), "text", "of the format chat in a file of the format text"),
    ({"text": "a"}, "messages", "of the format text in a file of the format chat"),
    ({"prompt": "a"}, "completions", 'has no "completion"'),
    ({"prompt": ["a"], "completion": "b"}, "completions", '"prompt" must be a string, not a list'),
    ({"prompt": "a", "completion": {}}, "completions", '"completion" must be a string, not an object'),
    ({"messages": []}, "messages", '"messages" is empty'),
    ({"messages": "a"}, "messages", "must be a list of messages, not a string"),
    ({"messages": ["a"]}, "messages", "message 1 must be an object"),
    (message(content="a"), "messages", 'message 1 has no "role"'),
    (message(role="user"), "messages", 'message 1 (user) has no "content"'),
    (message(role="user", content=None), "messages", 'message 1 (user) has no "content"'),
    (message(role=3, content="a"), "messages", "must be a name"),
    (message(role="", content="a"), "messages", "must be a name"),
    (message(role="asistant", content="a"), "messages", 'did you mean "assistant"?'),
    (message(role="User", content="a"), "messages", 'did you mean "user"?'),
    (message(role="gpt", content="a"), "messages", 'did you mean "assistant"?'),
    (message(role="user", content=3), "messages", '"content" of message 1 must be text'),
    (message(role="user", content=[{"type": "image_url"}]), "messages", "not text (image_url)"),
    (message(role="assistant", tool_calls="add"), "messages", '"tool_calls" of message 1 must be a list'),
    (message(role="assistant", tool_calls=[{"id": 1}]), "messages", "a tool call of message 1"),
    (
        message(role="assistant", tool_calls=[{"function": {"name": "a", "arguments": "{"}}]),
        "messages",
        "is not JSON",
    ),
    (
        message(role="assistant", tool_calls=[{"function": {"name": "a", "arguments": "[1]"}}]),
        "messages",
        "must be an object, not a list",
    ),
    ({**chat("a", "b"), "tools": {"name": "a"}}, "messages", '"tools" must be a list'),
    ({**chat("a", "b"), "tools": ["add"]}, "messages", '"tools" must be a list of objects'),
    ({**chat("a", "b"), "tools": "["}, "messages", '"tools" is not JSON'),
    ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations", 'from "alien"'),
    ({"conversations": [{"from": "human"}]}, "conversations", 'has no "value"'),
    ({"conversations": [{"from": "human", "value": 1}]}, "conversations", '"value" of message 1 must be text'),
    ({"conversations": [{"from": "function_call", "value": "add"}]}, "conversations", "not JSON"),
]


@pytest.mark.parametrize(("row", "kind", "reason"), BAD_ROWS)
def test_a_bad_row_is_refused_with_a_reason_on_one_line(row: Any, kind: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(row, kind)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_first_row_of_no_format_names_its_keys(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"body": "a"}])
    with pytest.raises(RowError, match=r'a\.jsonl:1: of no known format: .* and has "body"'):
        first_kind(data_file(path))


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"completion": "a"}])
    with pytest.raises(RowError, match='has "completion" but no "prompt"'):
        first_kind(data_file(path))


def test_empty_and_missing_files_are_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        first_kind(data_file(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="cannot read"):
        first_kind(data_file(tmp_path / "none.jsonl"))


def test_a_folder_without_the_files_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        local_source(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no train\.jsonl"):
        local_source(tmp_path)
    file = write_rows(tmp_path / "valid.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="is a file"):
        local_source(file)
    with pytest.raises(UserError, match="has no train set"):
        local_source(tmp_path).files("train")
