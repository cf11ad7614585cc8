"""Rows of JSON, JSONL and CSV files, whatever their shape."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.data.formats import UTF8_MARK, invalid_json, raw_lines
from coordinator.data.messages import kind_of
from coordinator.data.rows import BadRow
from node.errors import RowError, UserError

Table = Iterator[tuple[int, dict[str, Any]]]

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
LONGEST_CELL = 1 << 27
MOST_DOCUMENT_BYTES = 4 << 30
"""Of a file that is one JSON value, which is read as a whole."""


def read_table(path: Path) -> Table:
    """The rows of a file with their numbers: lines of CSV and JSONL, places in the list of JSON, from 1.

    Raises:
        UserError: the file cannot be read, or nothing in it is a list of rows.
        RowError: a row is broken.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        if path.suffix.lower() in DELIMITERS:
            yield from _read_csv(path)
        elif _is_one_document(path):
            yield from _read_json(path)
        else:
            yield from _read_jsonl(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from error


def _is_one_document(path: Path) -> bool:
    """Whether a file is one JSON value rather than one on each line."""
    for _, line in raw_lines(path, longest=MOST_DOCUMENT_BYTES):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return path.suffix.lower() == ".json" or line.strip() in (b"[", b"{") or line.lstrip().startswith(b"[")
        # A list on the first line is the whole document, or a conversation on each line.
        rest = sum(1 for _ in zip(raw_lines(path, longest=MOST_DOCUMENT_BYTES), range(2), strict=False))
        return rest == 1 and (isinstance(value, list) or path.suffix.lower() == ".json")
    raise UserError(f"{path} is empty")


def _read_json(path: Path) -> Table:
    if path.stat().st_size > MOST_DOCUMENT_BYTES:
        limit = MOST_DOCUMENT_BYTES >> 30
        raise UserError(f"{path} is one JSON value of more than {limit} GB; write it with one row on each line (JSONL)")
    try:
        document = json.loads(path.read_bytes().removeprefix(UTF8_MARK).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise UserError(f"{path} is not usable JSON: {error}") from error
    for number, row in enumerate(_list_in(document, path), 1):
        yield number, _as_row(row, path, number)


def _list_in(document: Any, path: Path) -> list[Any]:
    """The list of rows: the document, or the only list of objects under one of its keys; or its only row."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        if isinstance(document.get("data"), list):
            return list(document["data"])
        lists = {key: value for key, value in document.items() if _is_list_of_rows(value)}
        if len(lists) == 1 and not {"messages", "conversations"} & set(lists):
            return next(iter(lists.values()))
        return [document]
    raise UserError(f'{path} holds {kind_of(document)}; a list of rows or {{"data": [...]}} is needed')


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _read_jsonl(path: Path) -> Table:
    for number, line in raw_lines(path):
        try:
            row = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise RowError(path, number, invalid_json(error)) from error
        except (RecursionError, ValueError) as error:
            raise RowError(path, number, f"not usable JSON: {error}") from error
        yield number, _as_row(row, path, number)


def _as_row(row: Any, path: Path, number: int) -> dict[str, Any]:
    if isinstance(row, list) and _is_list_of_rows(row):
        return {"messages": row}
    if not isinstance(row, dict):
        raise RowError(path, number, f"a row must be an object, not {kind_of(row)}")
    return row


def _read_csv(path: Path) -> Table:
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        if not header.strip():
            raise UserError(f"{path} is empty, or its first line is; it needs a header with the names of the columns")
        candidates = DELIMITERS[path.suffix.lower()]
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(candidates, key=header.count), strict=True)
        try:
            for row in reader:
                yield reader.line_num, _checked(row)
        except BadRow as error:
            raise RowError(path, reader.line_num, str(error)) from error
        except csv.Error as error:
            raise RowError(path, reader.line_num, f"not valid CSV: {error}") from error


def _checked(row: dict[Any, Any]) -> dict[str, Any]:
    if None in row:
        raise BadRow("has more cells than the header has columns; put text with delimiters in quotes")
    if None in row.values():
        raise BadRow("has fewer cells than the header has columns")
    return row
