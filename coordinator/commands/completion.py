"""What the shell completes ``RUN`` and ``--nodes`` with."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from node.completion import distinct, fitting


def runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids of runs, the newest first, and ``last``; where none begins so, folders."""
    del context, parameter
    from coordinator.running.known import LAST, STATES, known_runs

    found = known_runs()[0]
    names = {run.run: f"{STATES[run.state]} {run.folder}" for run in reversed(found)}
    if found:
        names[LAST] = f"the newest: {found[-1].run}"
    return fitting(names, incomplete) or [CompletionItem(incomplete, type="dir")]


def runs_at_work(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """As ``runs``, of those that can be stopped."""
    del context, parameter
    from coordinator.running import presence
    from coordinator.running.known import LAST

    holders = sorted(presence.find_all(), key=lambda holder: -holder.since)
    names = {holder.run: holder.folder for holder in holders}
    if holders:
        names[LAST] = "the newest"
    return fitting(names, incomplete) or [CompletionItem(incomplete, type="dir")]


def nodes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names for ``--nodes``, after those that stand there: of nodes of this machine, of paired ones, and of those that
    have answered once.
    """
    del context, parameter
    from coordinator import addresses
    from coordinator.home import home
    from node.advert import fleet
    from node.names import AUTO, LOCAL
    from node.peers import Peers
    from node.running import running_nodes

    typed, comma, rest = incomplete.rpartition(",")
    given = set(typed.split(","))
    known = distinct(
        [
            (AUTO, "all that are found"),
            (LOCAL, "this machine alone"),
            *((node.name, "here") for node in running_nodes(home())),
            *((peer.name, "paired") for peer in Peers(home()).all()),
            *((node.name, node.address) for node in addresses.load(home(), fleet())),
        ]
    )
    left = {name: told for name, told in known.items() if name not in given}
    return fitting(left, rest, typed + comma)
