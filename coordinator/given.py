"""What Python programs hand to us, against what is expected: a mistake is named before anything begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from node.errors import UserError

_LONGEST = 60


def check_given(name: str, value: object, kind: type | tuple[type, ...], example: str) -> None:
    """See that an argument is of this kind.

    Args:
        name: of the argument.
        value: that was given.
        kind: that it must be of.
        example: what to give instead.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name}: give {example}, not {shown(value)}")


def check_view(view: object) -> None:
    """See that a view can be told of a run.

    Raises:
        UserError: it cannot.
    """
    methods: list[Callable[..., Any] | None] = [getattr(view, name, None) for name in ("handle", "close")]
    if view is not None and not (all(map(callable, methods)) and not isinstance(view, type)):
        raise UserError(f"view: give None, or an object with the methods handle(event) and close(), not {shown(view)}")


def shown(value: object) -> str:
    """A value as it is shown in a message: what it is, and how it begins."""
    text = " ".join(repr(value).split())
    return f"{text[:_LONGEST]}…" if len(text) > _LONGEST else text
