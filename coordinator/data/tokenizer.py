"""Loading a model's tokenizer without loading MLX, and rendering conversations with its chat template."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from coordinator.data.messages import with_string_arguments
from coordinator.data.rows import BadRow, Message
from node.errors import UserError, one_line
from node.jsons import MOST_CONFIG_BYTES, MOST_TOKENIZER_BYTES, read_json
from node.manifest import tokenizer_needs_own_code

# What a repository's tokenizer is made of, and what decides which tokens it gives.
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "*.jsonl")
_LIMITS = {
    "tokenizer.json": MOST_TOKENIZER_BYTES,
    "tokenizer_config.json": MOST_CONFIG_BYTES,
    "config.json": MOST_CONFIG_BYTES,
}
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The pairs by which mlx_lm tells that a model can think; it passes what it found to the chat template.
THINKING_TOKENS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
)


class Tokenizer(Protocol):
    """The part of ``transformers``' tokenizers that is used here."""

    chat_template: Any
    eos_token_id: int | None
    all_special_ids: list[int]
    is_fast: bool

    def __call__(self, text: Any, **options: Any) -> Any:
        """Encode one text or several."""

    def __len__(self) -> int:
        """Number of tokens, added ones included."""

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Text of token ids."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render, and by default encode, a conversation."""

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model's folder.

    Args:
        path: folder with ``tokenizer.json`` or what else the tokenizer is made of.
        trust_remote_code: whether the model's own Python files may run.

    Raises:
        UserError: files are missing or broken.
    """
    if not path.is_dir():
        raise UserError(f"no tokenizer at {path}: it is not a folder")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _check_json(path)
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        # The library raises whatever its many tokenizer classes raise: this is the boundary to it.
        loaded: Tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(tokenizer_needs_own_code(path)) from error
        raise UserError(f"cannot load the tokenizer in {path}: {one_line(error)}") from error
    if len(loaded) == 0:
        raise UserError(f"the tokenizer in {path} has no tokens: tokenizer.json is missing; fetch the model again")
    return loaded


def _check_json(path: Path) -> None:
    """Name the broken file, which the library's own message does not."""
    for name, most in _LIMITS.items():
        if (path / name).exists():
            read_json(path / name, most)


def find_tokenizer(model: str) -> Path:
    """The folder of a model's tokenizer: a folder here, or the tokenizer's files of a repository, without its weights.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    folder = Path(model).expanduser()
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        return folder
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:
        raise UserError(f"no folder {model}, and its tokenizer cannot be fetched: {one_line(error)}") from error


def vocabulary_size(path: Path) -> int | None:
    """Rows of the model's embedding, from its ``config.json``; None where it does not say.

    Raises:
        UserError: the file is broken.
    """
    file = path / "config.json"
    if not file.exists():
        return None
    config = read_json(file)
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else {}
    size = config.get("vocab_size", text.get("vocab_size"))
    return size if isinstance(size, int) else None


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: to render and encode with.
        name: of the model, for messages.

    Raises:
        UserError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{name} has no chat template, which chat, tools and completions data need; use its instruct version, "
                'put a chat_template.jinja into the model\'s folder, or write the rows as {"text": ...}'
            )
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._thinks = any(start in vocabulary and end in vocabulary for start, end in THINKING_TOKENS)
        template = tokenizer.chat_template
        self.marks_generation = (
            isinstance(template, str) and bool(GENERATION_BLOCK.search(template)) and tokenizer.is_fast
        )

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, *, answer_next: bool = False
    ) -> str:
        """The text of a conversation.

        Args:
            messages: at least one.
            tools: that the template is told of.
            answer_next: end with what introduces the assistant's answer.

        Raises:
            BadRow: the template refuses the conversation.
        """
        return str(self._apply(messages, tools, add_generation_prompt=answer_next, tokenize=False))

    def generation_mask(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None
    ) -> tuple[list[int], list[int]]:
        """Token ids, and for each whether the template marks it as generated by the assistant."""
        encoded = self._apply(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        return list(encoded["input_ids"]), list(encoded["assistant_masks"])

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, **options: Any) -> Any:
        options = {"enable_thinking": self._thinks, "tools": list(tools) if tools else None, **options}
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:
            if any(message.get("tool_calls") for message in messages) and isinstance(error, TypeError):
                return self._apply_with_strings(messages, error, options)
            raise BadRow(f"the chat template refuses it: {one_line(error)}") from error

    def _apply_with_strings(self, messages: Sequence[Message], first: Exception, options: dict[str, Any]) -> Any:
        try:
            return self.tokenizer.apply_chat_template(with_string_arguments(tuple(messages)), **options)
        except Exception as error:
            raise BadRow(f"the chat template refuses it: {one_line(first)}") from error
