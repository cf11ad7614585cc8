"""How full a machine's memory is, as a colour."""

from __future__ import annotations

YELLOW_ABOVE, RED_ABOVE = 0.75, 0.90


def pressure_style(used_bytes: float, total_bytes: float) -> str:
    """Green is good, yellow slows down, red means reduce the batch."""
    part = used_bytes / total_bytes
    if part >= RED_ABOVE:
        return "bold red"
    return "yellow" if part >= YELLOW_ABOVE else "green"
