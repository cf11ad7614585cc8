"""Prompts to token ids and back: the coordinator holds the tokenizer, the worker sees numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config import TrainConfig
from coordinator.data.tokenizer import load_tokenizer
from node.errors import UserError, one_line
from node.jsons import read_json
from node.spec import Int32


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt to continue at each validation."""

    text: str
    tokens: Int32
    stop: tuple[int, ...]
    max_tokens: int


class Prompter:
    """The prompts of one model.

    Args:
        path: the model's folder.
        trust_remote_code: whether the tokenizer's own Python files may run.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self._tokenizer: Any = load_tokenizer(path, trust_remote_code)
        self.stop = _stop_tokens(path, self._tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._tokenizer.chat_template is not None

    def text(self, prompt: str) -> Int32:
        """Token ids of plain text, with the special tokens that begin one.

        Raises:
            UserError: the text is empty.
        """
        return _array(self._tokenizer.encode(prompt), "the prompt is empty; give some text")

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> Int32:
        """Token ids of a conversation that the model is to answer.

        Raises:
            UserError: the chat template refuses it.
        """
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False, **options
            )
        except Exception as error:  # templates are the model's own code and raise what they like
            raise UserError(f"the chat template refuses this conversation: {one_line(error)}") from error
        return _array(self._tokenizer.encode(rendered, add_special_tokens=False), "the conversation is empty")

    def prompt(self, text: str) -> Int32:
        """Token ids of a question: in the chat template where there is one, as plain text otherwise."""
        return self.chat([{"role": "user", "content": text}]) if self.has_chat_template else self.text(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        # Cleaning up would take out spaces that the model wrote.
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_id(self, text: str) -> int:
        """The id of one token.

        Raises:
            UserError: the text is no single token.
        """
        found = self._tokenizer.get_vocab().get(text)
        tokens = [found] if found is not None else self._tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise UserError(f"{text!r} is not one token of this model")
        return int(tokens[0])


def sample_prompts(config: TrainConfig, prompter: Prompter) -> tuple[SamplePrompt, ...]:
    """What ``--sample-prompt`` asks to be continued at each validation."""
    return tuple(
        SamplePrompt(text, prompter.prompt(text), prompter.stop, config.sample_tokens) for text in config.sample_prompt
    )


def _array(tokens: list[int], when_empty: str) -> Int32:
    if not tokens:
        raise UserError(when_empty)
    return np.array(tokens, np.int32)


def _stop_tokens(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a text: the tokenizer's, and those the model's configuration files name."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("config.json", "generation_config.json"):
        try:
            given = read_json(path / name).get("eos_token_id")
        except UserError:
            continue
        found.update(token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int))
    return tuple(sorted(found))
