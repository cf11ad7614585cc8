"""A data set's check, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from coordinator.data.report import FileReport, Report

SAMPLE_CHARACTERS = 1500
BAR_WIDTH = 40


@contextmanager
def showing_progress(*, enabled: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A line on stderr that says what is being read, where there is a terminal."""
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield lambda *_: None
        return
    with console.status("reading") as status:
        yield lambda task, done, _: status.update(f"{escape(task)}: {done:,} rows")


def show_report(report: Report, most_problems: int) -> None:
    """Write a report to stdout, and its problems last, where they are seen."""
    console = Console(highlight=False, soft_wrap=True)
    for file in report.files:
        _show_file(console, file)
    for leak in report.leaks:
        examples = ", ".join(f"line {ours} = {leak.other} line {theirs}" for ours, theirs in leak.lines)
        console.print(f"[yellow]Leak:[/] {leak.rows} rows of {leak.split} stand in {leak.other} too ({examples})")
    for problem in report.problems[:most_problems]:
        console.print(f"[red]{escape(problem)}[/]")
    if len(report.problems) > most_problems:
        console.print(f"[red]and {len(report.problems) - most_problems} more[/]")
    if not report.problems:
        console.print("[green]Every row can be trained on.[/]" if not _dropped(report) else "No row is broken.")


def _dropped(report: Report) -> int:
    return sum(file.dropped for file in report.files)


def _show_file(console: Console, file: FileReport) -> None:
    console.print(f"[bold]{escape(file.file)}[/] ({file.split}): {file.rows:,} rows, {file.format}")
    trained = "" if file.target_tokens is None else f", {file.target_tokens:,} of them trained on"
    console.print(f"  {file.total:,} {file.unit}, median {file.median:,} in a row{trained}")
    if file.truncated:
        console.print(f"  [yellow]{file.truncated:,} rows are longer than --max-seq-length and will be cut[/]")
    if file.dropped:
        console.print(f"  [yellow]{file.dropped:,} rows leave nothing to train on and will be left out[/]")
    if file.duplicates:
        examples = ", ".join(f"line {line} = line {first}" for line, first in file.duplicate_lines)
        console.print(f"  [yellow]{file.duplicates:,} rows repeat earlier ones[/] ({examples})")
    console.print(_histogram(file))
    longest = ", ".join(f"line {line} ({length:,})" for line, length in file.longest)
    console.print(f"  longest: {longest}")
    _show_sample(console, file)


def _histogram(file: FileReport) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    most = max(item.rows for item in file.histogram)
    for item in file.histogram:
        bar = "█" * max(1 if item.rows else 0, round(BAR_WIDTH * item.rows / most))
        table.add_row(f"  {item.first:,} to {item.last:,} {file.unit}", f"{item.rows:,}", bar)
    return table


def _show_sample(console: Console, file: FileReport) -> None:
    """The first row; what is trained on is green and underlined on a terminal, and stands in marks elsewhere."""
    marked = any(piece.trained for piece in file.sample)
    sample = Text()
    for piece in file.sample:
        text = piece.text if console.is_terminal or not piece.trained else f"⟦{piece.text}⟧"
        sample.append(text, "green underline" if piece.trained else "dim")
    if len(sample) > SAMPLE_CHARACTERS:
        sample.truncate(SAMPLE_CHARACTERS)
        sample.append(" …")
    how = "underlined" if console.is_terminal else "in ⟦ ⟧"
    console.print(f"  a row, what is trained on {how}:" if marked else "  a row (--model shows what is trained on):")
    console.print(sample)
    console.print()
