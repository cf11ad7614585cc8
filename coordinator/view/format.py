"""Numbers, sizes and foreign text as people read them; shared by every view."""

from __future__ import annotations

import math
import unicodedata

GIB = 1 << 30
MISSING = "-"


def number(value: object) -> float | None:
    """A float where ``value`` is a number (infinite and NaN included), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def finite(value: object) -> float | None:
    """A float where ``value`` is a finite number, else None."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def loss_text(value: float | None) -> str:
    """A loss with three decimals, or as many digits as its size asks for."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    if 0 < abs(value) < 0.001 or abs(value) >= 1e5:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def rate_text(value: float | None) -> str:
    """A learning rate."""
    return MISSING if value is None else f"{value:.2e}"


def speed_text(tokens_per_second: float | None) -> str:
    """Tokens per second, without the unit."""
    if tokens_per_second is None:
        return MISSING
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.1f}"


def size_text(size_bytes: float | None) -> str:
    """Memory in the units in which a Mac states its own: 1 GB is 2^30 bytes."""
    if size_bytes is None:
        return MISSING
    gigabytes = size_bytes / GIB
    if gigabytes < 0.1:
        return f"{size_bytes / (1 << 20):.0f} MB"
    return f"{gigabytes:.1f} GB" if gigabytes < 100 else f"{gigabytes:.0f} GB"


def bits_text(bits_per_second: float) -> str:
    """``21 Gbit/s``, ``340 Mbit/s``."""
    if bits_per_second >= 1e9:
        return f"{bits_per_second / 1e9:.{0 if bits_per_second >= 1e10 else 1}f} Gbit/s"
    return f"{bits_per_second / 1e6:.0f} Mbit/s"


def amount_text(amount: int, in_bytes: bool) -> str:
    """How much of a task, which is counted in bytes or in whatever it is made of."""
    return size_text(amount) if in_bytes else f"{amount:,}"


def duration_text(seconds: float | None) -> str:
    """A time span by its two largest units."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"


def one_line(text: str) -> str:
    """Any text as one printable line: what a model generates may hold terminal commands."""
    spaced = "".join(" " if unicodedata.category(c) in {"Cc", "Zl", "Zp"} else c for c in text)
    visible = "".join(c for c in spaced if unicodedata.category(c) not in {"Cf", "Cs"} or c == "\u200d")
    return " ".join(visible.split())


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters, with an ellipsis where something is missing."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…"
