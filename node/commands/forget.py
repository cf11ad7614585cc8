"""``node forget``, and what ``coordinator unpair`` does: trust a machine no more."""

from __future__ import annotations

import click

from node.completion import paired


@click.command("forget", help="Trust a paired machine no more, at once: also a job of its that runs here ends.")
@click.argument("name", shell_complete=paired)
def forget(name: str) -> None:
    """Forget a peer."""
    click.echo(end_pairing(name))


def end_pairing(name: str) -> str:
    """Trust the peer that a person means no more; a line that says so.

    Args:
        name: its name, id, or the beginning of its fingerprint.

    Raises:
        UserError: that is nobody, or several.
    """
    from node.errors import UserError
    from node.home import home
    from node.peers import Peer, Peers, shown

    def listed(some: tuple[Peer, ...]) -> str:
        return ", ".join(f"{peer.name} ({shown(peer.fingerprint)})" for peer in some)

    peers = Peers(home())
    found = peers.find(name)
    if not found:
        known = f"paired: {listed(peers.all())}" if peers.all() else "this machine is paired with nobody"
        raise UserError(f"{name}: no machine of this name is paired; {known}")
    if len(found) > 1:
        raise UserError(f"{name}: {len(found)} are called so: {listed(found)}; give the beginning of a fingerprint")
    (peer,) = found
    peers.remove(peer.home)
    return f"{peer.name} ({shown(peer.fingerprint)}) is trusted no more"
