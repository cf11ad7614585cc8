"""The machines of a fleet in the live view: the plan until the first step, then a row for each of them."""

from __future__ import annotations

from rich.text import Text

from coordinator.view.format import MISSING, duration_text, one_line, shortened, size_text, speed_text
from coordinator.view.members import MemberState
from coordinator.view.pressure import pressure_style
from coordinator.view.state import RunState

NAME_CELLS = 18
# Of each column: heading, cells, and how wide the terminal must be for it.
COLUMNS = (("share", 7, 0), ("tokens/s", 10, 36), ("compute", 9, 46), ("wait", 9, 56), ("memory", 10, 66))
STATE_FROM_WIDTH = 78
LEAST_ROWS = 3


def fleet_lines(state: RunState, width: int, height: int) -> list[Text]:
    """A table of machines, at most a third of the screen.

    Args:
        state: the run so far.
        width: of the terminal, in cells.
        height: of the terminal, in cells.
    """
    most = max(height // 3, LEAST_ROWS)
    members = state.members
    if len(members) == 0:
        began = state.finished is not None or state.seconds_per_step is not None
        planned = state.fleet.lines if state.fleet is not None and not began else ()
        return [Text(), *(Text(one_line(line)) for line in planned[:most])] if planned else []
    if len(members) + len(members.away) < 2:
        return []
    columns = [(heading, cells) for heading, cells, from_width in COLUMNS if width >= from_width]
    heading = f"{'node':<{NAME_CELLS}}" + "".join(f"{heading:>{cells}}" for heading, cells in columns)
    rows = [_row(state, member, columns, width) for member in members.by_name.values()]
    rows += [_away(name, word, columns, width) for name, word in members.away.items()]
    hidden = len(rows) - (most - 1) if len(rows) > most else 0
    rows = rows[: len(rows) - hidden]
    more = [Text(f"and {hidden} more", style="dim")] if hidden else []
    return [Text(), Text(heading, style="dim"), *rows, *more]


def _row(state: RunState, member: MemberState, columns: list[tuple[str, int]], width: int) -> Text:
    values = {
        "share": f"{100 * state.members.share(member):.0f} %",
        "tokens/s": speed_text(member.tokens_per_second),
        "compute": _seconds(member.compute_seconds),
        "wait": _seconds(member.wait_seconds),
        "memory": size_text(member.peak_memory_bytes),
    }
    line = _name(member.name)
    for heading, cells in columns:
        line.append(f"{values[heading]:>{cells}}", style=_memory_style(state, member) if heading == "memory" else "")
    if width >= STATE_FROM_WIDTH:
        doing = state.members.doing(member)
        line.append(f"  {doing}", style="dim" if doing == "trains" else "yellow")
    return line


def _away(name: str, word: str, columns: list[tuple[str, int]], width: int) -> Text:
    """A machine that takes no part now."""
    line = _name(name)
    line.append("".join(f"{MISSING:>{cells}}" for _, cells in columns), style="dim")
    return line.append(f"  {word}", style="yellow") if width >= STATE_FROM_WIDTH else line


def _name(name: str) -> Text:
    found = Text(shortened(one_line(name), NAME_CELLS - 1))
    found.truncate(NAME_CELLS - 1, overflow="ellipsis", pad=True)  # names may have wide characters
    return Text.assemble(found, " ")


def _memory_style(state: RunState, member: MemberState) -> str:
    machines = state.fleet.members if state.fleet is not None else ()
    total = next((machine.memory_bytes for machine in machines if machine.name == member.name), None)
    return pressure_style(member.peak_memory_bytes, total) if member.peak_memory_bytes and total else ""


def _seconds(seconds: float) -> str:
    """A part of a step: milliseconds where it is short."""
    if seconds <= 0:
        return MISSING
    return f"{1000 * seconds:.0f} ms" if seconds < 0.0995 else duration_text(seconds)
