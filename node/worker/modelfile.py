"""The ``Modelfile`` that makes a GGUF file an Ollama model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

SYSTEM, USER, ANSWER, NEXT = "SYSTEM~A", "USER~B", "ANSWER~C", "NEXT~D"


@dataclass(frozen=True)
class Turns:
    """A chat template that is nothing but text around each turn.

    Attributes:
        system, user, assistant: text before and after that turn's content.
        default_system: what stands in for a system turn that is missing, or "".
    """

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default_system: str = ""

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation, up to where the model answers."""
        text = ""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        for message in messages:
            around = getattr(self, message["role"])
            text += around[0] + message["content"] + around[1]
        return text + self.assistant[0]


def modelfile(gguf_name: str, tokenizer: Any) -> str:
    """The Modelfile's text.

    ``TEMPLATE`` is written only where Ollama's own template language can say exactly what the chat template does;
    else Ollama looks for a template of its own that resembles the one in the GGUF file.

    Args:
        gguf_name: file name, in the Modelfile's folder.
        tokenizer: ``mlx_lm``'s tokenizer wrapper.
    """
    lines = [f"FROM ./{gguf_name}"]
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    turns = _turns(inner) if inner.chat_template else None
    if turns is not None:
        lines.append(f'TEMPLATE """{_go_template(turns)}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    ends = sorted(getattr(tokenizer, "eos_token_ids", None) or {inner.eos_token_id})
    texts = inner.convert_ids_to_tokens([number for number in ends if number is not None])
    if turns is not None and (end := turns.assistant[1].strip()) in inner.get_vocab():
        texts.append(end)
    lines += [f'PARAMETER stop "{text}"' for text in dict.fromkeys(texts) if text and '"' not in text]
    return "\n".join(lines) + "\n"


def _turns(tokenizer: Any) -> Turns | None:
    """Take a chat template apart by rendering marked conversations; None unless the parts explain every one."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    system, following = {"role": "system", "content": SYSTEM}, {"role": "user", "content": NEXT}
    plain = _render(tokenizer, [user])
    long = _render(tokenizer, [user, answer, following])
    if plain is None or long is None:
        return None
    try:
        start, rest = long.split(USER)
        to_answer, rest = rest.split(ANSWER)
        to_next, ending = rest.split(NEXT)
    except ValueError:
        return None
    with_system = _render(tokenizer, [system, user])
    for turns in _candidates(start, to_answer, to_next, ending, with_system):
        cases = [[user], [user, answer, following]]
        if turns.system is not None:
            cases += [[system, user], [system, user, answer, following]]
        if _is_sayable(turns) and all(turns.render(case) == _render(tokenizer, case) for case in cases):
            return turns
    return None


def _candidates(start: str, to_answer: str, to_next: str, ending: str, with_system: str | None) -> list[Turns]:
    """Ways to cut the text between turns: what ends one and what begins the next."""
    found = []
    for cut in range(len(to_answer) + 1):
        user_end, answer_start = to_answer[:cut], to_answer[cut:]
        if user_end + answer_start != ending:
            continue
        for cut_next in range(len(to_next) + 1):
            answer_end, user_start = to_next[:cut_next], to_next[cut_next:]
            if not start.endswith(user_start):
                continue
            around_user, around_answer = (user_start, user_end), (answer_start, answer_end)
            found += _with_system(start, around_user, around_answer, with_system)
    # All of these render alike; turns that end alike and begin alike read best.
    return sorted(found, key=lambda turns: (turns.user[1] != turns.assistant[1], -len(_shared_start(turns))))


def _shared_start(turns: Turns) -> str:
    starts = zip(turns.user[0], turns.assistant[0], (turns.system or turns.user)[0], strict=False)
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, starts))


def _with_system(start: str, user: tuple[str, str], assistant: tuple[str, str], with_system: str | None) -> list[Turns]:
    if with_system is None or with_system.count(SYSTEM) != 1 or USER not in with_system:
        return [Turns(None, user, assistant)] if start == user[0] else []
    before, after = with_system.split(USER)[0].split(SYSTEM)
    if not after.endswith(user[0]):
        return []
    system = (before, after.removesuffix(user[0]))
    head = start.removesuffix(user[0])
    if not head:
        return [Turns(system, user, assistant)]
    if head.startswith(system[0]) and head.endswith(system[1]):
        return [Turns(system, user, assistant, head[len(system[0]) : len(head) - len(system[1])])]
    return []


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str | None:
    """A conversation's text without the leading bos token, which Ollama adds by itself; None if it is refused."""
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    return text.removeprefix(tokenizer.bos_token or "")


def _is_sayable(turns: Turns) -> bool:
    texts = [*turns.user, *turns.assistant, *(turns.system or ()), turns.default_system]
    return not any(mark in text for text in texts for mark in ("{{", "}}", '"""'))


def _go_template(turns: Turns) -> str:
    system = ""
    if turns.system is not None:
        system = f"{{{{ if .System }}}}{turns.system[0]}{{{{ .System }}}}{turns.system[1]}{{{{ end }}}}"
    user = f"{{{{ if .Prompt }}}}{turns.user[0]}{{{{ .Prompt }}}}{turns.user[1]}{{{{ end }}}}"
    return f"{system}{user}{turns.assistant[0]}{{{{ .Response }}}}{turns.assistant[1]}"
