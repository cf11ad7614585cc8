"""Which columns of a table hold what: the names that data sets in the wild use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from node.errors import UserError

CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
TEXT_COLUMNS = ("text", "content", "document")
SYSTEM_COLUMNS = ("system", "system_prompt")
# Prompt, what is added to it where there is any, and completion; the first that fits is taken.
PAIRS = (
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("instruction", "input", "response"),
    ("instruction", "input", "completion"),
    ("question", "context", "answer"),
    ("question", "", "response"),
    ("question", "", "output"),
    ("query", "", "response"),
    ("query", "", "answer"),
    ("prompt", "", "answer"),
    ("prompt", "", "output"),
    ("prompt", "", "chosen"),
    ("input", "", "output"),
    ("input", "", "response"),
    ("source", "", "target"),
    ("user", "", "assistant"),
)


@dataclass(frozen=True)
class Columns:
    """Names of columns; "" where a row has none. Either ``chat``, ``text``, or ``prompt`` and ``completion`` is set."""

    chat: str = ""
    text: str = ""
    prompt: str = ""
    extra: str = ""
    completion: str = ""
    system: str = ""

    def described(self) -> str:
        """What was recognised, for a person."""
        if self.chat:
            return f"{self.chat}: conversations"
        if self.text:
            return f"{self.text}: text"
        prompt = f"{self.prompt} + {self.extra}" if self.extra else self.prompt
        system = f", {self.system}: system" if self.system else ""
        return f"{prompt}: prompt, {self.completion}: completion{system}"


def recognise(names: Sequence[str], chosen: Columns, file: str) -> Columns:
    """Find the columns.

    Args:
        names: of the table's columns.
        chosen: what a person said; "" where nothing.
        file: for messages.

    Raises:
        UserError: a chosen column does not exist, or none is known.
    """
    listed = ", ".join(names) or "none"
    for name in (chosen.chat, chosen.text, chosen.prompt, chosen.extra, chosen.completion, chosen.system):
        if name and name not in names:
            raise UserError(f'{file} has no column "{name}"; it has {listed}')
    if bool(chosen.prompt) != bool(chosen.completion):
        raise UserError("--prompt-column and --completion-column go together; give both")
    if sum(map(bool, (chosen.chat, chosen.text, chosen.prompt))) > 1:
        raise UserError("give one of --chat-column, --text-column, or --prompt-column with --completion-column")
    if chosen.chat or chosen.text or chosen.prompt:
        return chosen
    return _guess({name.strip().lower(): name for name in names}, chosen) or _unknown(file, listed)


def _guess(known: dict[str, str], chosen: Columns) -> Columns | None:
    for name in CHAT_COLUMNS:
        if name in known:
            return Columns(chat=known[name])
    system = chosen.system or next((known[name] for name in SYSTEM_COLUMNS if name in known), "")
    for prompt, extra, completion in PAIRS:
        if prompt in known and completion in known:
            return Columns(
                prompt=known[prompt], extra=known.get(extra, ""), completion=known[completion], system=system
            )
    for name in TEXT_COLUMNS:
        if name in known:
            return Columns(text=known[name])
    return None


def _unknown(file: str, listed: str) -> Columns:
    raise UserError(
        f"{file}: cannot tell what its columns hold ({listed}); say it with --prompt-column and --completion-column, "
        "--chat-column, or --text-column"
    )
