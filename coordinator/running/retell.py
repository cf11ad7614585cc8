"""A run's files, told once more as the events that they were written from. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.program import Program
from coordinator.stream import (
    FleetFormed,
    FleetLink,
    FleetMember,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    Sampled,
    Tested,
)
from coordinator.view.format import finite, number

BEGINNINGS = ("started", "resumed")
_OF_A_NOTE = ("time", "kind", "message", "level")


def started(
    run: str,
    folder: Path,
    entry: Mapping[str, Any],
    options: Mapping[str, Any],
    history: Sequence[dict[str, Any]],
) -> RunStarted:
    """The beginning of a run.

    Args:
        run: its id.
        folder: where its files are.
        entry: of ``events.jsonl``; one of an older version says little.
        options: of its ``config.yaml``.
        history: metrics so far.
    """
    iters = _whole(entry.get("total_iters")) or _whole(options.get("iters")) or 0
    accumulation = max(_whole(options.get("grad_accumulation_steps")) or 1, 1)
    return RunStarted(
        run=run,
        name=str(entry.get("name") or folder),
        config=dict(options),
        total_iters=iters,
        total_steps=_whole(entry.get("total_steps")) or -(-iters // accumulation),
        first_step=_whole(entry.get("first_step")) or 1,
        facts=_pairs(entry.get("facts")),
        history=tuple(history),
    )


def retold(entry: Mapping[str, Any]) -> RunEvent:
    """What an entry of ``events.jsonl`` was written for; see ``started`` for beginnings."""
    kind, message = str(entry.get("kind", "")), str(entry.get("message", ""))
    match kind:
        case "sample":
            return Sampled(_whole(entry.get("step")) or 0, str(entry.get("prompt", "")), str(entry.get("text", "")))
        case "test":
            loss = number(entry.get("loss"))
            return Tested(float("nan") if loss is None else loss, _whole(entry.get("tokens")) or 0)
        case "finished":
            status = str(entry.get("status", message))
            summary, commands = _pairs(entry.get("summary")), _pairs(entry.get("next_commands"))
            return RunFinished(status, summary, commands, _whole(entry.get("exit_code")))
        case "fleet":
            lines = entry.get("lines")
            words = tuple(str(line) for line in lines) if isinstance(lines, list) else (message,)
            members, rows = _members(entry.get("members")), _whole(entry.get("step_rows")) or 0
            return FleetFormed(members, rows, words, links_of(entry.get("links")))
        case _:
            details = {name: value for name, value in entry.items() if name not in _OF_A_NOTE}
            return Noted(kind, message, str(entry.get("level", "info")), details)


def program_of(beginning: RunStarted) -> Program:
    """Which steps are worth a line."""

    def interval(name: str) -> int:
        return max(_whole(beginning.config.get(name)) or 1, 1)

    return Program(
        total_iters=max(beginning.total_iters, 1),
        accumulation=interval("grad_accumulation_steps"),
        save_every=interval("save_every"),
        steps_per_eval=interval("steps_per_eval"),
        steps_per_report=interval("steps_per_report"),
        validates=False,
    )


def _members(found: object) -> tuple[FleetMember, ...]:
    given = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return tuple(
        FleetMember(
            str(one.get("name", "")),
            None if one.get("chip") is None else str(one["chip"]),
            _whole(one.get("memory_bytes")),
            _whole(one.get("rows")) or 0,
        )
        for one in given
    )


def links_of(found: object) -> tuple[FleetLink, ...]:
    given = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return tuple(
        FleetLink(
            str(one.get("one", "")),
            str(one.get("other", "")),
            finite(one.get("bits_per_second")) or 0.0,
            finite(one.get("latency_seconds")) or 0.0,
            str(one.get("text", "")),
        )
        for one in given
    )


def _pairs(found: object) -> tuple[tuple[str, str], ...]:
    given = [pair for pair in found if isinstance(pair, list) and len(pair) == 2] if isinstance(found, list) else []
    return tuple((str(label), str(value)) for label, value in given)


def _whole(value: object) -> int | None:
    found = finite(value)
    return None if found is None else int(found)
