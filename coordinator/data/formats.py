"""The four formats of data files, told apart by the keys of the file's first row, and the check of every row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from coordinator.data.messages import kind_of, read_messages
from coordinator.data.rows import BadRow, Features, Message, Row
from coordinator.data.source import DataFile
from node.errors import RowError, UserError

# Chat and tools rows may stand in one file, so what is fixed for a file is coarser than the format of a row.
Kind = Literal["text", "messages", "conversations", "completions"]

UTF8_MARK = b"\xef\xbb\xbf"
LONGEST_LINE_BYTES = 64 << 20
SHAREGPT_KEY = "conversations"


def raw_lines(path: Path, name: str = "", longest: int = LONGEST_LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 and bytes of the lines that are not blank.

    Raises:
        UserError: the file cannot be read.
        RowError: a line is longer than ``longest`` bytes; no more of it than that is read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(longest + 1), b""), 1):
                if len(line) > longest:
                    raise RowError(name or path, number, f"a line of more than {longest >> 20} MB; split the row")
                content = line.removeprefix(UTF8_MARK) if number == 1 else line
                if content.strip():
                    yield number, content
    except OSError as error:
        raise UserError(f"cannot read {name or path}: {error.strerror}") from error


def first_kind(file: DataFile) -> Kind:
    """The kind of a file's rows, by its first row.

    Raises:
        UserError: the file has no rows or cannot be read.
        RowError: its first row is of no known format.
    """
    for number, line in raw_lines(file.path, file.name):
        try:
            return kind_of_row(load_object(line), file.features)
        except BadRow as error:
            raise RowError(file.name, number, str(error)) from error
    raise UserError(f'{file.name} is empty; it needs at least one row, for example {{"text": "..."}}')


def parse_row(line: bytes, kind: Kind, features: Features) -> Row:
    """Check one line and read it.

    Args:
        line: bytes of the line.
        kind: what the file's first row was.
        features: names of the keys.

    Raises:
        BadRow: it is not a row of this kind.
    """
    return row_of(load_object(line), kind, features)


def load_object(line: bytes) -> dict[str, Any]:
    """One line's JSON object, of valid text only."""
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(_explain(text, error)) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not usable JSON: {error}") from error
    if not isinstance(value, dict):
        hint = "; one object per line is needed, `coordinator data convert` makes it" if isinstance(value, list) else ""
        raise BadRow(f"a row must be a JSON object, not {kind_of(value)}{hint}")
    if "\\u" in text:
        _refuse_lone_surrogates(value)
    return value


def _explain(text: str, error: json.JSONDecodeError) -> str:
    if text in ("[", "{"):
        return "not one JSON object per line; `coordinator data convert` makes such a file from ordinary JSON"
    return invalid_json(error)


def invalid_json(error: json.JSONDecodeError) -> str:
    """What is wrong with a line, and where; some of the parser's messages end in the word that belongs before that."""
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def _refuse_lone_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRow("holds half of a surrogate pair (\\ud800 to \\udfff), which is no valid text") from error


def kind_of_row(row: dict[str, Any], features: Features) -> Kind:
    """What a row is, by its keys; ``mlx_lm``'s order of preference where several fit."""
    if features.prompt in row and features.completion in row:
        return "completions"
    if features.chat in row:
        return "messages"
    if SHAREGPT_KEY in row:
        return "conversations"
    if features.text in row:
        return "text"
    for key, other in ((features.prompt, features.completion), (features.completion, features.prompt)):
        if key in row:
            raise BadRow(f'has "{key}" but no "{other}"')
    found = ", ".join(f'"{key}"' for key in list(row)[:6]) or "none"
    wanted = f'"{features.text}", "{features.chat}", or "{features.prompt}" and "{features.completion}"'
    raise BadRow(f"of no known format: it needs the keys {wanted}, and has {found}")


def _keys(kind: Kind, features: Features) -> tuple[str, ...]:
    keys: dict[Kind, tuple[str, ...]] = {
        "text": (features.text,),
        "messages": (features.chat,),
        "conversations": (SHAREGPT_KEY,),
        "completions": (features.prompt, features.completion),
    }
    return keys[kind]


def row_of(row: dict[str, Any], kind: Kind, features: Features) -> Row:
    """Check the row of a file of this kind.

    Raises:
        BadRow: a key is missing or its value is of the wrong type.
    """
    for key in _keys(kind, features):
        if key not in row:
            raise BadRow(_missing(row, kind, key, features))
    if kind == "text":
        return Row("text", text=_text(row, features.text))
    tools = _tools(row)
    if kind == "completions":
        return Row("completions", messages=_completion(row, features), tools=tools)
    key = _keys(kind, features)[0]
    messages = read_messages(row[key], key)
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system" and kind != "messages":
        messages = ({"role": "system", "content": row["system"]}, *messages)
    calls = any("tool_calls" in message for message in messages)
    return Row("tools" if tools or calls else "chat", messages=messages, tools=tools)


def _missing(row: dict[str, Any], kind: Kind, key: str, features: Features) -> str:
    try:
        other = kind_of_row(row, features)
    except BadRow:
        return f'has no "{key}"'
    names = {"text": "text", "messages": "chat", "conversations": "chat (ShareGPT)", "completions": "completions"}
    return f"a row of the format {names[other]} in a file of the format {names[kind]}; split the file by format"


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise BadRow(f'"{key}" must be a string, not {kind_of(row[key])}')
    return str(row[key])


def _completion(row: dict[str, Any], features: Features) -> tuple[Message, ...]:
    return (
        {"role": "user", "content": _text(row, features.prompt)},
        {"role": "assistant", "content": _text(row, features.completion)},
    )


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise BadRow(f'"tools" is not JSON: {error}') from error
    if not tools and not isinstance(tools, dict):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow('"tools" must be a list of objects, each the JSON schema of one tool')
    return tuple(tools)
