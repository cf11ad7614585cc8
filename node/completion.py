"""What the shell completes a command with, beside its options: names that are known here. Nobody is asked for them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

import click
from click.shell_completion import CompletionItem


def paired(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Machines that this one is paired with."""
    del context, parameter
    from node.home import home
    from node.peers import Peers

    return fitting({peer.name: "paired" for peer in Peers(home()).all()}, incomplete)


def fitting(names: Mapping[str, str], incomplete: str, before: str = "") -> list[CompletionItem]:
    """Those of these names, and what they are, that begin like this.

    Args:
        names: with a word on each.
        incomplete: what was typed of one.
        before: what was typed before that, in the same word.
    """
    return [CompletionItem(before + name, help=told) for name, told in names.items() if is_fit(name, incomplete)]


def is_fit(name: str, incomplete: str) -> bool:
    """Whether a name begins like this, and can be typed as it is: shells take what we give without quoting it."""
    return name.startswith(incomplete) and shlex.quote(name) == name


def distinct(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each name with the first word on it."""
    found: dict[str, str] = {}
    for name, told in names:
        found.setdefault(name, told)
    return found
