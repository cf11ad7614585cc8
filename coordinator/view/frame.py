"""One frame of the live view: a run's state laid out for a width and a height, as lines of styled text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells
from rich.text import Text

from coordinator.stream import Advanced
from coordinator.view.blocks import bar, plot
from coordinator.view.fleet import fleet_lines
from coordinator.view.format import (
    MISSING,
    amount_text,
    duration_text,
    loss_text,
    one_line,
    rate_text,
    size_text,
    speed_text,
)
from coordinator.view.pressure import pressure_style
from coordinator.view.state import RunState, Validation

ARROWS = {"falling": ("↓", "green"), "flat": ("→", "dim"), "rising": ("↑", "yellow"), "unknown": ("", "")}
LEVEL_STYLES = {"info": "dim", "warning": "yellow", "error": "bold red"}
CELL_WIDTH = 36
INDENT = "  "
PLOT_RANK = 4  # cut off it would mislead
NOTES_RANK = 5
MOST_PLOT_ROWS = 20
LEAST_NOTE_ROWS = 4


@dataclass
class Block:
    """Some lines of a frame. When there are more lines than rows, the blocks of the highest ``rank`` go first."""

    rank: int
    lines: list[Text]


def frame(state: RunState, width: int, height: int, total_memory_bytes: int, dashboard: str = "") -> list[Text]:
    """The lines of one frame: none is wider than ``width``, and there are at most ``height`` of them.

    Args:
        state: the run so far.
        width: of the terminal, in cells.
        height: of the terminal, in cells.
        total_memory_bytes: of this machine; 0 when it is not known.
        dashboard: the address of the run's page, or "".
    """
    blocks = [
        Block(6, header(state, width)),
        Block(3, address_lines(dashboard, width)),
        Block(0, [step_bar(state, width)] if state.started else []),
        Block(1, [task_bar(task, width) for task in state.tasks.values()]),
        Block(2, statistics(state, width, total_memory_bytes) if state.step or state.validation else []),
        Block(3, fleet_lines(state, width, height)),
        Block(PLOT_RANK, []),
        Block(7, sample_lines(state)),
        Block(NOTES_RANK, note_lines(state, width, max(LEAST_NOTE_ROWS, height // 6))),
    ]
    room = height - sum(len(block.lines) for block in blocks)
    next(block for block in blocks if block.rank == PLOT_RANK).lines = loss_plot(state, width, _plot_rows(height, room))
    rows_left = height
    for block in sorted(blocks, key=lambda b: b.rank):
        missing = max(len(block.lines) - rows_left, 0)
        if missing and block.rank == PLOT_RANK:
            block.lines = []
        elif block.rank == NOTES_RANK:
            block.lines = block.lines[missing:]  # the newest are below
        else:
            block.lines = block.lines[: len(block.lines) - missing]
        rows_left -= len(block.lines)
    lines = [line for block in blocks for line in block.lines]
    for line in lines:
        line.no_wrap = True
        line.truncate(max(width, 1), overflow="ellipsis")
    return lines


def _plot_rows(height: int, room: int) -> int:
    """How high the loss curve is drawn: with the screen, as far as that pushes nothing else out.

    Args:
        height: of the terminal, in cells.
        room: rows that everything else leaves, one for the gap above it included.
    """
    least = 5 if height >= 24 else 3
    return max(least, min(room - 1, least + (height - 30) // 2, MOST_PLOT_ROWS))


def address_lines(address: str, width: int) -> list[Text]:
    """Where the browser shows the run: whole, because it is to be copied."""
    if not address:
        return []
    label = "dashboard  " if len(address) + len("dashboard  ") <= width else ""
    if label:
        return [Text.assemble((label, "dim"), address)]
    return [Text(piece) for piece in chop_cells(address, max(width, 1))]


def header(state: RunState, width: int) -> list[Text]:
    """The run's name and its facts."""
    if state.started is None:
        return []
    facts = state.started.facts
    goes_on = f"  from step {state.started.first_step:,}" if state.started.first_step > 1 else ""
    lines = [Text.assemble((one_line(state.name), "bold"), (f"  {state.started.run}{goes_on}", "dim"))]
    label_width = max((len(label) for label, _ in facts), default=0)
    lines += [Text.assemble((f"{one_line(label):<{label_width}}  ", "dim"), one_line(value)) for label, value in facts]
    return [*lines, Text()] if width >= 40 else lines[:1]


def step_bar(state: RunState, width: int) -> Text:
    """``step 12/100 ━━━━━──── 12 %  3 min left``."""
    before = f"step {state.step:,}/{state.total_steps:,} "
    left = duration_text(state.seconds_left)
    after = f" {state.fraction:4.0%}" + (f"  {left} left" if left != MISSING and state.step < state.total_steps else "")
    filled, empty = bar(state.fraction, max(width - len(before) - len(after), 4))
    return Text.assemble((before, "bold"), (filled, "cyan"), (empty, "bright_black"), after)


def task_bar(task: Advanced, width: int) -> Text:
    """A long task with its own bar, or a count where nobody knows how much there is."""
    name = f"{one_line(task.task)} "
    if task.total <= 0:
        return Text.assemble((name, "bold"), amount_text(task.done, task.in_bytes) if task.done else "…")
    after = f" {amount_text(task.done, task.in_bytes)}/{amount_text(task.total, task.in_bytes)}"
    filled, empty = bar(task.done / task.total, max(min(width - len(name) - len(after), 40), 4))
    return Text.assemble((name, "bold"), (filled, "magenta"), (empty, "bright_black"), (after, "dim"))


def statistics(state: RunState, width: int, total_memory_bytes: int) -> list[Text]:
    """Loss, validation, speed, memory and rate, in as many columns as fit."""
    left = [_cell("loss", _loss(state)), _cell("validation", Text(_at(state.validation)))]
    left.append(_cell("best", Text(_at(state.best))))
    right = [_cell("speed", Text(f"{speed_text(state.tokens_per_second)} tokens/s"))]
    # Of several machines the peak may be another one's, with other memory.
    total = total_memory_bytes if len(state.members) < 2 else 0
    right.append(_cell("memory", _memory(state.peak_memory_bytes, total)))
    right.append(_cell("rate", Text(rate_text(state.learning_rate))))
    columns = min(max(width // CELL_WIDTH, 1), 3)
    cells = [cell for pair in zip(left, right, strict=True) for cell in pair] if columns == 2 else left + right
    lines = []
    for start in range(0, len(cells), columns):
        line = Text()
        for cell in cells[start : start + columns]:
            padded = cell.copy()
            padded.truncate(max(width // columns, 1), overflow="ellipsis", pad=True)
            line.append_text(padded)
        line.rstrip()
        lines.append(line)
    return lines


def loss_plot(state: RunState, width: int, height: int) -> list[Text]:
    """The smoothed loss from the first step to now, with its largest and smallest value at the side."""
    means = state.smoothed.means(max(min(width - 9, 100), 1))
    if len(means) < 4 or width < 24:
        return []
    rows = plot(means, max(min(width - 9, 100), 1), height)
    labels = [""] * height
    labels[0], labels[-1] = loss_text(max(means)), loss_text(min(means))
    drawn = [Text.assemble((f"{label:>7} ", "dim"), (row, "cyan")) for label, row in zip(labels, rows, strict=True)]
    return [Text(), *drawn]


def note_lines(state: RunState, width: int, most: int) -> list[Text]:
    """The last things that happened, each to its end; of the newest the beginning, where it alone is too long.

    Args:
        state: the run so far.
        width: of the terminal, in cells.
        most: rows for them.
    """
    shown: list[Text] = []
    for note in reversed(state.notes):
        style = LEVEL_STYLES.get(note.level, "")
        rows = [Text(row, style=style) for row in wrapped(one_line(note.message), width)]
        if len(shown) + len(rows) > most:
            if not shown:
                shown = rows[:most]
                shown[-1].append(" …")
            break
        shown = rows + shown
    return [Text(), *shown] if shown else []


def wrapped(text: str, width: int) -> list[str]:
    """One line as several that are no wider than ``width`` cells, those after the first indented."""
    rows = [""]
    for word in text.split(" "):
        for piece in chop_cells(word, max(width - len(INDENT), 1)):
            joined = f"{rows[-1]} {piece}" if rows[-1].strip() else rows[-1] + piece
            if cell_len(joined) <= width or not rows[-1].strip():
                rows[-1] = joined
            else:
                rows.append(INDENT + piece)
    return rows


def sample_lines(state: RunState) -> list[Text]:
    """The last generated texts."""
    lines = []
    for sample in list(state.samples)[-2:]:
        start = (f"step {sample.step:,} · {one_line(sample.prompt)} → ", "dim")
        lines.append(Text.assemble(start, (one_line(sample.text), "italic")))
    return [Text(), *lines] if lines else []


def _cell(label: str, value: Text) -> Text:
    return Text.assemble((f"{label:<10} ", "dim"), value)


def _loss(state: RunState) -> Text:
    if state.loss is not None and not math.isfinite(state.loss):
        return Text(f"{loss_text(state.loss)} (not a finite number)", style="bold red")
    arrow, style = ARROWS[state.trend]
    return Text.assemble((loss_text(state.training_loss), "bold"), (f" {arrow}", style))


def _at(validation: Validation | None) -> str:
    return f"{loss_text(validation.loss)} at step {validation.step:,}" if validation else MISSING


def _memory(used_bytes: float | None, total_bytes: int) -> Text:
    if not used_bytes:
        return Text(MISSING)
    if total_bytes <= 0:
        return Text(f"{size_text(used_bytes)} peak")
    part = used_bytes / total_bytes
    style = pressure_style(used_bytes, total_bytes)
    return Text.assemble((f"{part:.0%} · {size_text(used_bytes)} peak", style))
