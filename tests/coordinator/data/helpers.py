"""What the tests of data share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coordinator.data.rows import Features
from coordinator.data.source import DataFile
from coordinator.data.tokenise import Mask, RowTokeniser, TokeniseOptions
from coordinator.data.tokenizer import load_tokenizer
from tests.fixtures.tokenizers import byte_bpe


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_file(path: Path, **features: str) -> DataFile:
    return DataFile(path, Features(**features))


def tokeniser(
    folder: Path, mask: Mask = "all", max_seq_length: int = 2048, template: bool | str = True, **options: Any
) -> RowTokeniser:
    byte_bpe(folder, chat_template=template, **options)
    return RowTokeniser(load_tokenizer(folder), TokeniseOptions(max_seq_length, mask), "the model")


def chat(*turns: str) -> dict[str, Any]:
    """A conversation that begins with the user."""
    return {
        "messages": [
            {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns)
        ]
    }
