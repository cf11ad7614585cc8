"""``coordinator pair``, ``unpair`` and ``invite``: which machines trust each other."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import click

from node.completion import paired
from node.errors import UserError

if TYPE_CHECKING:
    from coordinator.discovery import Found, SeenNode, Wanted
    from coordinator.pairing import Pairing, Place
    from node.pairing.exchange import Offer
    from node.peers import Peer

ASKED = 3
"""How often a person is asked for a code."""

HELP = """Pair a node with this machine, by the code that `node serve` or `node pair` shows there.

NAME is the node's, or HOST:PORT of its pairing port; without it, the one that is found. Both machines trust each other
then, until `coordinator unpair` here or `node forget` there.

\b
Examples:
  coordinator pair
  coordinator pair Air --code 1234-5678
  coordinator pair 192.168.1.5:21618
"""


@click.command("pair", help=HELP)
@click.argument("name", required=False)
@click.option("--code", help="The code, instead of being asked for it.")
def pair(name: str | None, code: str | None) -> None:
    """Pair a node."""
    from coordinator.home import home
    from coordinator.pairing import Pairing
    from node.pairing.secrets import parse_code
    from node.peers import shown

    digits = parse_code(code) if code is not None else None
    peer = asyncio.run(_pair(Pairing(home()), name, digits))
    click.echo(f"paired with {peer.name} ({shown(peer.fingerprint)})")


async def _pair(pairing: Pairing, name: str | None, digits: str | None) -> Peer:
    place, offer = await _find(pairing, await _place(pairing, name))
    if offer.token and (digits is None or not offer.code) and not pairing.token_problem(place):
        return await pairing.by_token(place)
    if not offer.code:
        await _refuse(pairing, place, pairing.token_problem(place))
    if digits is not None:
        return await pairing.by_code(place, digits)
    if not sys.stdin.isatty():
        raise UserError(f"{place.name}: its code is needed: coordinator pair {_quoted(name, place)} --code CODE")
    peer = await _by_asking(pairing, place, f"The code that {place.name} shows: ")
    if peer is None:
        raise UserError(f"{place.name}: no code was given; nothing was kept")
    return peer


async def _find(pairing: Pairing, place: Place) -> tuple[Place, Offer]:
    """The node, at its address; who gives the port of its service means the usual one for pairing."""
    from node.errors import NodeError
    from node.info import PAIRING_PORT

    try:
        return await pairing.ask(place)
    except NodeError as error:
        hosts = {host for host, port in place.addresses if port != PAIRING_PORT}
        usual = replace(place, addresses=tuple((host, PAIRING_PORT) for host in hosts))
        try:
            return await pairing.ask(usual)
        except NodeError:
            raise error from None


async def _refuse(pairing: Pairing, place: Place, problem: str) -> NoReturn:
    from coordinator.pairing import token_words

    if problem:
        await pairing.ask(place, problem)  # its people are told, too
    raise UserError(f"{place.name}: {token_words(problem)}")


async def _by_asking(pairing: Pairing, place: Place, question: str) -> Peer | None:
    """Ask for the code, again when it is wrong; None when the person gives none."""
    from coordinator.pairing import WrongCode
    from node.pairing.secrets import NoCode, parse_code

    for left in reversed(range(ASKED)):
        text = await _prompt(question)
        if not text.strip():
            return None
        try:
            digits = parse_code(text)
            return await pairing.by_code(place, digits)
        except UserError as error:
            slip = isinstance(error, WrongCode | NoCode)
            if not slip or not left:
                raise
            click.echo(str(error), err=True)
    return None


async def _prompt(question: str) -> str:
    """One line of a person at a terminal, asked on stderr: stdout may go to a file."""
    click.echo(question, nl=False, err=True)
    # Not in a thread: nothing ends its waiting, and Ctrl-C would wait for it.
    loop, typed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), typed.set)
    try:
        await typed.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())
    line = sys.stdin.readline()
    if not line:
        click.echo("", err=True)
    return line


def _quoted(name: str | None, place: Place) -> str:
    host, port = place.addresses[0]
    return shlex.quote(name) if name else f"{host}:{port}"


async def _place(pairing: Pairing, name: str | None) -> Place:
    """Where the node listens that a person means.

    Raises:
        UserError: there is none, or several.
    """
    from coordinator.addresses import split_address
    from coordinator.pairing import Place, can_be_paired
    from node.info import PAIRING_PORT
    from node.names import is_ip_address

    if name is not None and is_ip_address(name):
        return Place(name, ((name.strip("[]"), PAIRING_PORT),))
    if name is not None and (address := split_address(name)) is not None:
        return Place(name, (address,))
    found = await _look()
    if name is not None and not _called(name, found):
        found = await _look(thoroughly=True)
    if name is None:
        seen = can_be_paired(pairing, found.nodes)
        if len(seen) == 1:
            click.echo(f"found {_listed(seen)}", err=True)
            return Place.of(seen[0])
        if seen:
            raise UserError(f"{len(seen)} nodes can be paired: {_listed(seen)}; say which: coordinator pair NAME")
        raise UserError(f"no node that can be paired was found{_trouble(found)}; {_what_to_do()}")
    named = _called(name, found)
    exact = [seen for seen in named if name in (seen.label, seen.id)] or named
    if len(exact) > 1:
        raise UserError(f"{name}: {len(exact)} nodes have this name: {_listed(exact)}; give an address")
    if not exact:
        there = f"found: {_listed(found.nodes)}" if found.nodes else f"none was found{_trouble(found)}"
        raise UserError(f"{name}: no such node ({there}); {_what_to_do()}")
    if exact[0].own:
        raise UserError(f"{name} is of this TANDEM_HOME: its programs trust each other unpaired")
    if not exact[0].pairing_port and exact[0].certificate is not None and not exact[0].problem:
        raise UserError(f"{name} is paired with this machine already; `coordinator unpair` ends that")
    if not exact[0].pairing_port:
        raise UserError(f"{name} cannot be paired just now; run `node pair` there, which shows a code")
    return Place.of(exact[0])


def _called(name: str, found: Found) -> list[SeenNode]:
    """Those of this name or id."""
    return [seen for seen in found.nodes if name.casefold() in (seen.label.casefold(), seen.id) or name == seen.name]


async def _look(*, thoroughly: bool = False) -> Found:
    """Who is there; thoroughly, also who kept quiet at the first question or is slow to answer."""
    from coordinator.discovery import PATIENCE_SECONDS, SELECT_LEAST_SECONDS, SELECT_SECONDS, look, parse_wanted

    wanted = parse_wanted("auto")
    if not thoroughly:
        return await look(wanted)
    return await look(wanted, seconds=SELECT_SECONDS, patience=PATIENCE_SECONDS, least=SELECT_LEAST_SECONDS)


def _listed(nodes: Sequence[SeenNode]) -> str:
    from coordinator.view.format import one_line

    return ", ".join(one_line(f"{seen.label} at {seen.address}") for seen in nodes)


def _trouble(found: Found) -> str:
    return f" ({found.trouble})" if found.trouble else f" (looked {found.seconds:.1f} s)"


def _what_to_do() -> str:
    return "run `node pair` on the other machine, or give the address that it shows: coordinator pair HOST:PORT"


# --- before a training ----------------------------------------------------------------------------------------------


def pair_before_training(wanted: str, *, may_ask: bool) -> None:
    """Pair the nodes that a training means: those with a token of ours, and others if a person can be asked.

    Looks only where something may come of it, as it takes a second.

    Args:
        wanted: value of ``--nodes``.
        may_ask: whether a person sits at the terminal.
    """
    from coordinator.discovery import parse_wanted
    from coordinator.home import home
    from coordinator.invites import Invites

    parsed = parse_wanted(wanted)
    person = may_ask and sys.stdin.isatty() and sys.stderr.isatty()
    if parsed.searches and (person or Invites(home()).any_open()):
        asyncio.run(_pair_before_training(parsed, person=person))


async def _pair_before_training(wanted: Wanted, *, person: bool) -> None:
    from coordinator.home import home
    from coordinator.pairing import Pairing, Place, can_be_paired, join_all
    from node.errors import TandemError

    found = await _look()
    pairing = await asyncio.to_thread(Pairing, home())
    await join_all(pairing, found, lambda line: click.echo(line, err=True))
    if not person:
        return
    for seen in can_be_paired(pairing, found.nodes):
        if not wanted.auto and not set(wanted.names) & {seen.name, seen.label, seen.id}:
            continue
        try:
            place, offer = await pairing.ask(Place.of(seen))
            if not offer.code:
                continue
            question = f"{place.name} is not paired yet. Its code, as it shows it (Enter: go on without): "
            peer = await _by_asking(pairing, place, question)
        except TandemError as error:
            click.echo(str(error), err=True)
        else:
            click.echo(f"paired with {peer.name}" if peer else f"going on without {place.name}", err=True)


# --- ending and inviting --------------------------------------------------------------------------------------------


@click.command("unpair", help="Trust a paired machine no more, at once: a job with it that runs goes on without it.")
@click.argument("name", shell_complete=paired)
def unpair(name: str) -> None:
    """Unpair a machine."""
    from node.commands.forget import end_pairing

    click.echo(end_pairing(name))


INVITE_HELP = """Print a token with which a node joins by itself: node serve --join TOKEN.

For machines without a screen, or many. A token works once. The node is paired when a command here next sees it:
`coordinator nodes`, `train`, or `pair HOST:PORT`.
"""


@click.command("invite", help=INVITE_HELP)
@click.option(
    "--hours",
    type=click.FloatRange(0, 24 * 365, min_open=True),
    default=24.0,
    show_default=True,
    help="How long it works.",
)
def invite(hours: float) -> None:
    """Print a token."""
    if math.isnan(hours):  # within any range
        raise UserError("--hours nan is no time")
    from coordinator.home import home
    from coordinator.invites import Invites
    from node.identity import credentials
    from node.peers import fingerprint

    token = Invites(home()).new(fingerprint(credentials(home()).certificate), hours * 3600)
    click.echo(str(token))
    click.echo(
        f"on the other machine: node serve --join TOKEN; it works once, within {hours:g} h. Whoever has it can"
        " pair a machine with this one: it is not shown again",
        err=True,
    )
