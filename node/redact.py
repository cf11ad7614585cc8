"""Taking secrets out of text that is written down for others: logs, and what goes with a bug report."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = "[removed]"
OWN_WORDS = ("--prompt", "-p", "--system-prompt", "--sample-prompt", "--code", "--join")
"""Options whose values are the user's own text, or a secret."""
_SECRETS = (
    # Of the Hub, of Weights & Biases and of those who name theirs alike.
    re.compile(r"\b(?:hf|api|sk|ghp|gho)_[A-Za-z0-9]{8,}\b"),
    # Keys and certificates in PEM, also where JSON has made one line of them.
    re.compile(r"-----BEGIN [A-Z ]+-----.*?(?:-----END [A-Z ]+-----|\Z)", re.DOTALL),
    # A code or a token that pairs machines.
    re.compile(r"(?<=--code)[ =]\S+"),
    re.compile(r"(?<=--join)[ =](?!@|-(?:\s|$))\S+"),
    re.compile(r"\b\d{4}-\d{4}\b"),
    re.compile(r"\b(?:[a-z2-7]{4,8}-){5,}[a-z2-7]{1,8}\b"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=bearer )\S+"),
)
_NAME = r"[\w.-]*(?:token(?!s|iz|is)|secret|passw(?:or)?d|api_?key|access_?key|private_?key)"
_NAMED = re.compile(rf"""(?i)(["']?{_NAME}["']?\s*[=:]\s*["']?)([^\s"',;}}]+)""")


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without what its user has written into it: prompts, codes, tokens."""
    found: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and name in OWN_WORDS:
            found.append(f"{name}={HIDDEN}")
        elif found and found[-1] in OWN_WORDS:
            found.append(HIDDEN)
        else:
            found.append(argument)
    return found


def redact(text: str) -> str:
    """The text without what looks like a secret, and without the name of its user's home folder."""
    for secret in _SECRETS:
        text = secret.sub(HIDDEN, text)
    text = _NAMED.sub(lambda found: found[1] + HIDDEN, text)
    home = os.path.normpath(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(Path(home).parts) > 1 else text


def redact_values(value: Any) -> Any:
    """What JSON or YAML may hold, with each text redacted, and nothing under a name that speaks of a secret."""
    match value:
        case str():
            return redact(value)
        case Mapping():
            return {
                redact(str(name)): HIDDEN if re.fullmatch(_NAME, str(name), re.I) and held else redact_values(held)
                for name, held in value.items()
            }
        case list() | tuple():
            return [redact_values(held) for held in value]
        case _:
            return value
