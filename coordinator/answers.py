"""What ``coordinator generate`` is asked for, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from node.errors import UserError


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate, and how.

    Attributes:
        model: a Hugging Face repo or a folder; "" is the one that the adapter was trained on.
        adapter_path: folder of an adapter, or "" for the model as it is.
        prompts: each is answered on its own.
        system_prompt: begins every conversation, or "".
        raw: continue the prompts as plain text, without the chat template.
        max_tokens: at most so many new tokens; -1 until the model ends by itself.
        temperature: 0 always takes the likeliest token.
        top_p, top_k, min_p: leave out unlikely tokens; 1, 0 and 0 are off.
        repetition_penalty, repetition_context: make tokens of the last so many less likely; 0 or 1 is off.
        seed: of the sampling; None is another one each time.
        extra_stop: further tokens that end an answer.
        template_options: further arguments of the chat template.
        trust_remote_code: whether the model's own Python files may run.
    """

    model: str = ""
    adapter_path: str = ""
    prompts: tuple[str, ...] = ()
    system_prompt: str = ""
    raw: bool = False
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    repetition_context: int = 20
    seed: int | None = None
    extra_stop: tuple[str, ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < -1 or self.max_tokens == 0:
            raise UserError(f"--max-tokens must be at least 1, or -1 for no limit, not {self.max_tokens}")
        for name in ("temperature", "top_k", "repetition_penalty"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise UserError(f"--{name.replace('_', '-')} must be at least 0, not {value}")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}")
        if self.repetition_context < 1:
            raise UserError(f"--repetition-context must be at least 1, not {self.repetition_context}")
        if self.raw and self.system_prompt:
            raise UserError("--system-prompt and --raw exclude each other: plain text has no system prompt")


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        prompt: what was asked.
        text: what came.
        tokens: number of tokens of the answer.
        finish_reason: ``stop`` (the model ended it), ``length`` or ``interrupted``.
        prompt_tokens: number of tokens of the prompt, in its template.
        tokens_per_second: of writing; prompt_tokens_per_second: of reading the prompt.
    """

    prompt: str
    text: str
    tokens: int
    finish_reason: str
    prompt_tokens: int
    tokens_per_second: float
    prompt_tokens_per_second: float


@dataclass(frozen=True)
class Piece:
    """Some more text of an answer.

    Attributes:
        text: to append; may be "" in the last piece.
        answer: the whole answer, in its last piece only.
    """

    text: str
    answer: Answer | None = None
