"""Rows become token ids and spans of target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coordinator.data.assistant import AssistantTurns
from coordinator.data.rows import BadRow, Row
from coordinator.data.tokenizer import ChatTemplate, Tokenizer
from node.errors import UserError
from node.spec import Int32

Mask = Literal["all", "prompt", "assistant"]


@dataclass(frozen=True)
class TokeniseOptions:
    """How rows become tokens.

    Attributes:
        max_seq_length: tokens that a row is cut to.
        mask: what is trained on: ``all`` tokens, the last answer only (``prompt`` is masked), or every turn of the
            ``assistant``.
        trust_remote_code: whether the tokenizer's own Python files may run.
    """

    max_seq_length: int = 2048
    mask: Mask = "all"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise UserError(f"--max-seq-length must be at least 2, not {self.max_seq_length}")


@dataclass(frozen=True)
class TokenisedRow:
    """One row as a model sees it.

    Attributes:
        tokens: (n,) token ids.
        spans: (2 * spans,) start and end of each span of target tokens; empty when nothing is left to train on.
        whole_length: tokens before the row was cut.
    """

    tokens: Int32
    spans: Int32
    whole_length: int

    @property
    def cut(self) -> bool:
        """Whether tokens were cut away at the end."""
        return self.whole_length > len(self.tokens)


class RowTokeniser:
    """Tokenises rows of one model's data.

    Args:
        tokenizer: of the model.
        options: lengths and masks.
        name: of the model, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokeniseOptions, name: str) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.name = name
        self._template: ChatTemplate | None = None
        self._turns: AssistantTurns | None = None

    def require(self, *, chat: bool) -> None:
        """Check that data of this kind can be tokenised at all, before any row is.

        Raises:
            UserError: the template is missing, or text is to be masked.
        """
        if chat:
            self._chat_template()
        elif self.options.mask != "all":
            option = "--mask-prompt" if self.options.mask == "prompt" else "--mask assistant"
            raise UserError(f"{option} needs chat or completions data; rows of plain text have no prompt to mask")

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self.name)
        return self._template

    def row(self, row: Row) -> TokenisedRow:
        """Tokenise one row.

        Raises:
            BadRow: it cannot be tokenised as asked.
            UserError: nothing of its kind can.
        """
        self.require(chat=bool(row.messages))
        if not row.messages:
            return self._cut(self._text(row.text), None)
        if self.options.mask == "assistant":
            if self._turns is None:
                self._turns = AssistantTurns(self._chat_template())
            return self._cut(*self._turns.spans(row))
        tokens = self._encode(self._chat_template().render(row.messages, row.tools))
        if self.options.mask == "all":
            return self._cut(tokens, None)
        if row.messages[-1]["role"] != "assistant":
            return self._cut(tokens, [])  # there is no answer to train on
        return self._cut(tokens, [(max(1, self._prompt_length(row)), len(tokens))])

    def _text(self, text: str) -> list[int]:
        """As ``mlx_lm``: with whatever special tokens the tokenizer adds, and an end-of-sequence token in any case."""
        try:
            tokens = list(self.tokenizer.encode(text))
        except Exception as error:
            raise BadRow(f"the tokenizer refuses it: {error}") from error
        end = self.tokenizer.eos_token_id
        if end is not None and (not tokens or tokens[-1] != end):
            tokens.append(end)
        return tokens

    def _encode(self, rendered: str) -> list[int]:
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))

    def _prompt_length(self, row: Row) -> int:
        """Tokens before the last message, as ``mlx_lm`` counts them."""
        before = row.messages[:-1]
        if not before:
            return 0
        return len(self._encode(self._chat_template().render(before, row.tools, answer_next=True)))

    def _cut(self, tokens: list[int], spans: Sequence[tuple[int, int]] | None) -> TokenisedRow:
        length = min(len(tokens), self.options.max_seq_length)
        whole = [(1, len(tokens))] if spans is None else spans
        kept = [(start, min(end, length)) for start, end in whole if start < min(end, length)]
        return TokenisedRow(np.array(tokens[:length], np.int32), np.array(kept, np.int32).reshape(-1), len(tokens))
