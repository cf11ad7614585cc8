"""What each machine of a fleet did in the last steps. No clock, no output, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.stream import Noted
from coordinator.view.format import finite

WINDOW_STEPS = 20
# Below this part of the longest compute time a difference between machines is chance.
NOTABLE_PART = 0.05
ON_THEIR_WAY = {"preparing": "is prepared", "not_ready": "not ready", "stays_out": "stays out"}
"""Notes that say what a machine does which takes no part yet."""


@dataclass(frozen=True)
class Turn:
    """One machine's part of a step; ``positions`` are input tokens, padding included."""

    rows: float
    positions: float
    compute_seconds: float
    wait_seconds: float


@dataclass
class MemberState:
    """One machine of a fleet.

    Attributes:
        name: what people call it.
        turns: its part of the last steps, oldest first.
        peak_memory_bytes: as it last told, or None.
    """

    name: str
    turns: deque[Turn] = field(default_factory=lambda: deque(maxlen=WINDOW_STEPS))
    peak_memory_bytes: float | None = None

    def take(self, figures: Mapping[str, Any]) -> None:
        """Enter a step's figures; who was lost before it could report has none but its rows, and goes."""
        values = [finite(figures.get(key)) or 0.0 for key in ("rows", "positions", "compute_seconds", "wait_seconds")]
        self.turns.append(Turn(*values))
        self.peak_memory_bytes = finite(figures.get("peak_memory_bytes")) or self.peak_memory_bytes

    @property
    def rows(self) -> float:
        """Rows of the last steps together."""
        return sum(turn.rows for turn in self.turns)

    @property
    def tokens_per_second(self) -> float | None:
        """Input tokens, padding included, over the seconds it computed; None when it had none to compute."""
        positions = sum(turn.positions for turn in self.turns)
        seconds = sum(turn.compute_seconds for turn in self.turns if turn.positions > 0)
        return positions / seconds if seconds > 0 and positions > 0 else None

    @property
    def compute_seconds(self) -> float:
        """Mean of the last steps."""
        return sum(turn.compute_seconds for turn in self.turns) / max(len(self.turns), 1)

    @property
    def wait_seconds(self) -> float:
        """Mean of the last steps."""
        return sum(turn.wait_seconds for turn in self.turns) / max(len(self.turns), 1)


@dataclass
class Members:
    """The machines of the last step that told of them, in the order of their ranks; empty where there is but one.

    Attributes:
        by_name: those that took part.
        away: those that did before, or are on their way, and what is known of them, in a few words.
    """

    by_name: dict[str, MemberState] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    _conditions: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.by_name)

    def take(self, per_node: object) -> None:
        """Enter ``per_node`` of a step's metrics; machines that it no longer names are gone."""
        if not isinstance(per_node, Mapping):
            self.by_name, self.away = {}, {}
            return
        gone = [name for name in self.by_name if name not in per_node]
        self.away |= dict.fromkeys(gone, "away")
        for name in gone:
            self._conditions.pop(name, None)  # it comes back as it is then, and says so if that is not well
        self.away = {name: word for name, word in self.away.items() if name not in per_node}
        self.by_name = {name: self.by_name.get(name, MemberState(name)) for name in map(str, per_node)}
        for name, figures in per_node.items():
            if isinstance(figures, Mapping):
                self.by_name[str(name)].take(figures)

    def told(self, note: Noted) -> None:
        """Take in what was said of one machine."""
        name = note.details.get("node")
        if not isinstance(name, str):
            return
        if note.kind == "condition":
            self._conditions[name] = str(note.details.get("now") or "")
        elif note.kind in ON_THEIR_WAY and name not in self.by_name:
            self.away[name] = ON_THEIR_WAY[note.kind]

    def share(self, member: MemberState) -> float:
        """Part of the rows of the last steps that this machine had, 0 to 1."""
        return member.rows / (sum(other.rows for other in self.by_name.values()) or 1.0)

    @property
    def slowest(self) -> MemberState | None:
        """Whom the others wait for; None where all take about as long."""
        times = sorted(self.by_name.values(), key=lambda member: member.compute_seconds)
        if len(times) < 2 or times[-1].compute_seconds * (1 - NOTABLE_PART) <= times[-2].compute_seconds:
            return None
        return times[-1]

    def doing(self, member: MemberState) -> str:
        """A word or two about what a machine is doing."""
        if self._conditions.get(member.name):
            return self._conditions[member.name]
        if member.turns and member.rows == 0:
            return "has no rows"
        return "slowest" if self.slowest is member else "trains"
