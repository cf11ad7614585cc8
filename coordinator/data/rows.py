"""What a row of a data file means, whatever format it was written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["text", "chat", "tools", "completions"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Features:
    """Which keys of a row hold what, as ``mlx_lm``'s ``prompt_feature`` and its kin name them."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        format: of the row; ``tools`` is chat with tools or tool calls.
        text: of a text row, otherwise "".
        messages: of the other formats; a completion is a user's message and the assistant's answer.
        tools: JSON schemas of the tools that the template is told of, or None.
    """

    format: Format
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None


class BadRow(Exception):
    """A row that cannot be used; says why. Becomes a ``RowError`` where file and line are known."""
