"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from node.errors import UserError
from node.hardware import GIB

MOST_BYTES = 1 << 60
_UNITS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(value: str | float, option: str = "size") -> int:
    """Bytes of ``12GB``, ``500 MB``, ``1.5g`` or a plain number; units are powers of 1024, as memory is sold.

    Raises:
        UserError: it is no size, or more than any machine has.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)I?(B?)\s*", str(value).upper())
    if match is None:
        raise UserError(f"{option}: {value!r} is no size; write it as 12GB or 500MB")
    size = float(match[1]) * (1 << _UNITS[match[2]])
    if size > MOST_BYTES:
        raise UserError(f"{option}: {value} is more than any machine has; write it as 12GB or 500MB")
    return int(size)


def show_size(size: float) -> str:
    """Bytes for people: ``11.4 GB``."""
    gigabytes = size / GIB
    if gigabytes < 0.1:
        return f"{size / (1 << 20):.0f} MB"
    return f"{gigabytes:.0f} GB" if gigabytes >= 100 else f"{gigabytes:.1f} GB"
