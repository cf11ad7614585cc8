"""Findings as lines and as data."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import click

from node.doctor.finding import Finding, Verdict, worst

COLOURS: dict[Verdict, str] = {"ok": "green", "unknown": "blue", "warning": "yellow", "wrong": "red"}
_VERDICT_COLUMNS, _CHECK_COLUMNS = 9, 15
_INDENT = " " * (2 + _VERDICT_COLUMNS + _CHECK_COLUMNS)
_LEAST_WIDTH = 60


def as_lines(title: str, findings: Sequence[Finding], width: int | None = None) -> list[str]:
    """A heading, and each finding with what mends it.

    Args:
        title: whose findings they are.
        findings: in their order.
        width: columns; None takes the terminal's, or none where there is no terminal.
    """
    wide = _width() if width is None else width
    lines = [click.style(title, bold=True)]
    for finding in findings:
        head = f"{finding.verdict:<{_VERDICT_COLUMNS}}"
        styled = click.style(head, fg=COLOURS[finding.verdict])
        first, *rest = _wrapped(finding.seen, wide) or [""]
        lines.append(f"  {styled}{finding.check:<{_CHECK_COLUMNS}}{first}")
        if finding.mend and finding.verdict != "ok":
            rest += _wrapped(f"to mend it: {finding.mend}", wide)
        lines += [f"{_INDENT}{part}" for part in rest]
    return lines


def closing(findings: Iterable[Finding]) -> str:
    """How many of each kind: ``2 wrong, 1 warning, 3 unknown``."""
    found = list(findings)
    counts = Counter(finding.verdict for finding in found)
    parts = [
        f"{counts['wrong']} wrong" if counts["wrong"] else "nothing is wrong",
        *([f"{counts['warning']} warning{'s' if counts['warning'] > 1 else ''}"] if counts["warning"] else []),
        *([f"{counts['unknown']} unknown"] if counts["unknown"] else []),
    ]
    text = ", ".join(parts)
    return click.style(text, fg=COLOURS[worst(found)], bold=True)


def as_data(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """For programs; ``mend`` is null where nothing is to be mended."""
    return [dataclasses.asdict(finding) | {"mend": finding.mend or None} for finding in findings]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit beside the verdict and the check; as it is where there is no width."""
    room = max(width, _LEAST_WIDTH) - len(_INDENT)
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) if width else [text]


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
