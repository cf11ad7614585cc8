"""The live view: one picture of the run that is redrawn in place, and a summary that stays."""

from __future__ import annotations

import threading

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.text import Text

from coordinator.stream import RunEvent, RunFinished
from coordinator.view.format import duration_text, one_line
from coordinator.view.frame import LEVEL_STYLES, frame
from coordinator.view.plain import STATUS_TEXT, summary_lines, test_line
from coordinator.view.state import RunState

REDRAWS_PER_SECOND = 4.0
STATUS_STYLES = {"done": "bold green", "stopped_early": "bold green", "interrupted": "bold yellow"}


class TerminalView:
    """The run in a terminal.

    Redrawing happens in a thread of its own; a lock keeps it from reading a state that is being changed.

    Args:
        console: where to draw; the standard output by default.
        total_memory_bytes: of this machine, for the colour of the memory in use; 0 when it is not known.
        live: whether to redraw; tests render single frames instead.
        dashboard: the address of the run's page, or "".
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        total_memory_bytes: int = 0,
        live: bool = True,
        dashboard: str = "",
    ) -> None:
        self.console = console or Console(highlight=False)
        self.state = RunState()
        self._total_memory_bytes = total_memory_bytes
        self._dashboard = dashboard
        self._lock = threading.Lock()
        self._drawn_width = 0
        self._live = Live(
            console=self.console,
            get_renderable=self.renderable,
            refresh_per_second=REDRAWS_PER_SECOND,
            vertical_overflow="crop",
            auto_refresh=live,
        )

    def handle(self, event: RunEvent) -> None:
        with self._lock:
            self.state.apply(event)
        if isinstance(event, RunFinished):
            self.close()
            self._summary(event)
        elif not self._live.is_started and self.state.finished is None:
            self._live.start()

    def close(self) -> None:
        """Leave the last picture standing and give the terminal back."""
        if self._live.is_started:
            self._live.stop()

    def renderable(self) -> Group:
        """The present picture, for the console's present size."""
        width, height = self.console.size
        with self._lock:
            lines = frame(self.state, width, max(height - 1, 1), self._total_memory_bytes, self._dashboard)
            # A terminal folds the old picture when it is made narrower, and nobody knows where its top then is.
            folded = 0 < self._drawn_width != width
            self._drawn_width = width
        return Group(Control.clear(), Control.home(), *lines) if folded else Group(*lines)

    def _summary(self, event: RunFinished) -> None:
        """Printed, not drawn: it may be longer than the screen, and commands must copy as one line."""
        state = self.state
        lines = [Text()]
        if state.warnings:
            hidden = state.warning_count - len(state.warnings)
            lines += [Text(f"{hidden} earlier warnings are in events.jsonl", style="dim")] if hidden else []
            lines += [Text(one_line(note.message), style=LEVEL_STYLES.get(note.level, "")) for note in state.warnings]
            lines.append(Text())
        spent = f" in {duration_text(state.train_seconds)}" if state.train_seconds else ""
        status = STATUS_TEXT.get(event.status, event.status)
        lines.append(
            Text.assemble(
                (status[:1].upper() + status[1:], STATUS_STYLES.get(event.status, "bold red")),
                f": {state.step:,} steps{spent}",
            )
        )
        if state.test is not None:
            lines.append(Text(test_line(state.test)))
        summary = summary_lines(event)
        label_width = max((len(label) for label, _ in summary), default=0)
        for label, value in summary:
            lines.append(Text.assemble((f"  {one_line(label):<{label_width}}  ", "dim"), one_line(value)))
        for purpose, command in event.next_commands:
            lines += [Text(), Text(one_line(purpose), style="dim"), Text(f"  {one_line(command)}", style="bold")]
        for line in lines:
            self.console.print(line, soft_wrap=True, highlight=False)
