"""Pairs and conversations of any usual file made into JSONL that trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from coordinator.data.columns import Columns, recognise
from coordinator.data.formats import row_of
from coordinator.data.messages import kind_of
from coordinator.data.rows import BadRow, Features
from coordinator.data.tables import read_table
from node.errors import RowError, UserError
from node.files import replacing

HEADING_ROWS = 100


@dataclass(frozen=True)
class Conversion:
    """What was made of a file.

    Attributes:
        recognised: which columns hold what.
        rows: written.
        skipped: without an answer or a text, and so left out.
    """

    recognised: str
    rows: int
    skipped: int


def convert_file(path: Path, out: Path, chosen: Columns) -> Conversion:
    """Write a JSON, JSONL or CSV file's pairs, conversations or texts as JSONL.

    Args:
        path: file to read.
        out: file to write, which must not exist.
        chosen: columns that a person named; the others are recognised by their names.

    Raises:
        UserError: the file cannot be read or its columns are unknown.
        RowError: a bad row; nothing is written then.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out, or remove it")
    table = read_table(path)
    # Keys may be missing in single rows of JSON: some rows together show the columns.
    heading = list(islice(table, HEADING_ROWS))
    if not heading:
        raise UserError(f"{path} has no rows")
    names = list(dict.fromkeys(name for _, row in heading for name in row))
    columns = recognise(names, chosen, str(path))
    written = skipped = 0
    with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
        for number, row in chain(heading, table):
            try:
                converted = _converted(row, columns)
            except BadRow as error:
                raise RowError(path, number, str(error)) from error
            if converted is None:
                skipped += 1
                continue
            file.write(json.dumps(converted, ensure_ascii=False) + "\n")
            written += 1
        if not written:
            raise UserError(f"{path}: none of its {skipped} rows has an answer or a text")
    return Conversion(columns.described(), written, skipped)


def _converted(row: dict[str, Any], columns: Columns) -> dict[str, Any] | None:
    if columns.chat:
        return _conversation(row, columns.chat)
    if columns.text:
        text = _cell(row, columns.text)
        return {"text": text} if text.strip() else None
    completion = _cell(row, columns.completion)
    if not completion.strip():
        return None
    prompt = "\n\n".join(part for part in (_cell(row, columns.prompt), _cell(row, columns.extra)) if part.strip())
    if not columns.system:
        return {"prompt": prompt, "completion": completion}
    # One format in a file: where some rows may have a system prompt, all are conversations.
    turns = (("system", _cell(row, columns.system)), ("user", prompt), ("assistant", completion))
    return {"messages": [{"role": role, "content": text} for role, text in turns if text.strip() or role != "system"]}


def _conversation(row: dict[str, Any], column: str) -> dict[str, Any] | None:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f'"{column}" is not a conversation in JSON') from error
    if not value:
        return None
    read = row_of(
        {**{key: row[key] for key in ("tools", "system") if key in row}, "conversations": value},
        "conversations",
        Features(),
    )
    converted: dict[str, Any] = {"messages": list(read.messages)}
    return {**converted, "tools": list(read.tools)} if read.tools else converted


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column) if column else None
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return str(value[0])
    raise BadRow(f'"{column}" must be text, not {kind_of(value)}')
