"""The coordinator's end of a pairing: ask a node what can be proven, prove it, and keep one another."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.discovery import Found, SeenNode
from coordinator.invites import Invites
from coordinator.view.format import one_line
from node.errors import NodeError, NodeLost, TandemError, UserError
from node.hardware import facts
from node.identity import credentials
from node.names import usable_name
from node.pairing import exchange, messages
from node.pairing.exchange import Coordinator, Offer, Party, Unproven
from node.pairing.messages import Garbled, Refused
from node.pairing.secrets import CODE, TOKEN, code_secret
from node.peers import Peer, Peers, fingerprint

CONNECT_SECONDS = 3.0
JOINING_SECONDS = 4.0
"""For a node that advertises a token of ours to answer at all."""
MOST_JOINING = 8
"""Of those that answered, in one look."""
EXCHANGE_SECONDS = 10.0
"""To prove it to one another, and as long again to say that it is kept."""
ENDING_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 20.0
"""For a node that pauses after wrong codes of others."""
TRIES = 5
"""To be heard, where others make it close connections that have said nothing yet."""
BETWEEN_SECONDS = 0.2


@dataclass(frozen=True)
class Place:
    """Where a node that can be paired listens.

    Attributes:
        name: what it is called, or its address.
        addresses: ``host, port`` each; any may answer.
        join: id of the token that it waits with, or "".
    """

    name: str
    addresses: tuple[tuple[str, int], ...]
    join: str = ""

    @classmethod
    def of(cls, seen: SeenNode) -> Place:
        """Of a node that was found."""
        return cls(
            one_line(seen.label or seen.name), tuple((host, seen.pairing_port) for host in seen.hosts), seen.join
        )


@dataclass(frozen=True)
class _Use:
    """Told how far a pairing has come, with the fingerprint of the node; a code needs neither.

    Attributes:
        begin: both have proven it; from here on the node is trusted here.
        end: each trusts the other.
    """

    begin: Callable[[str], None] = lambda _: None
    end: Callable[[str], None] = lambda _: None


class WrongCode(UserError):
    """The code is wrong, or somebody else answers in the node's place; nobody has kept anything."""


class Pairing:
    """Pairs this home with nodes.

    Args:
        home: the ``TANDEM_HOME``.
        name: what this machine is called; None asks it.
    """

    def __init__(self, home: Path, name: str | None = None) -> None:
        self._certificate = credentials(home).certificate
        self._us = Party(name or usable_name(facts().name), self._certificate)
        self._peers = Peers(home)
        self._invites = Invites(home)

    async def ask(self, place: Place, hint: str = "") -> tuple[Place, Offer]:
        """What can be proven to a node, and which of its addresses answers.

        Args:
            place: where it may be.
            hint: why its token is of no use, a word of ``Refused.REASONS`` for its people; "" says nothing.

        Raises:
            UserError: it is of this home.
            NodeError: nobody pairs there.
        """
        asking = [asyncio.ensure_future(self._ask(host, port, hint)) for host, port in place.addresses]
        error: NodeError = NodeLost(f"{place.name} has no address")
        try:
            for answer in asyncio.as_completed(asking):
                try:
                    address, offer = await answer
                except NodeError as failed:
                    error = failed
                    continue
                if offer.certificate == self._certificate:
                    raise UserError(f"{place.name} is of this TANDEM_HOME: its programs trust each other unpaired")
                return Place(place.name, (address,), offer.token), offer
            raise error
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _ask(self, host: str, port: int, hint: str) -> tuple[tuple[str, int], Offer]:
        for left in reversed(range(TRIES)):
            try:
                async with _connected(host, port) as (reader, writer), asyncio.timeout(EXCHANGE_SECONDS):
                    await messages.write(writer, Coordinator(self._us, "", b"").hello())
                    offer = exchange.read_offer(await messages.read(reader))
                    if hint:
                        await messages.write(writer, messages.refusal(hint))
                    return (host, port), offer
            except (Garbled, Refused, ConnectionError) as error:
                if isinstance(error, ConnectionRefusedError) or not left:
                    raise NodeError(_nobody(host, port)) from error
                await asyncio.sleep(BETWEEN_SECONDS)
            except (OSError, TimeoutError) as error:
                raise NodeLost(_nobody(host, port)) from error
        raise AssertionError("the last try returns or raises")

    async def by_code(self, place: Place, digits: str) -> Peer:
        """Pair with a node by the code that it shows.

        Raises:
            WrongCode: it does not know the code.
            NodeError: it could not be done.
        """
        return await self._pair(place, CODE, code_secret(digits), _Use())

    async def by_token(self, place: Place) -> Peer:
        """Pair with a node that waits with a token of ours.

        Raises:
            UserError: the token does not work.
            WrongCode: it does not have the token.
            NodeError: it could not be done.
        """
        with self._invites.held(place.join) as invite:
            if invite is None:
                raise UserError(f"{place.name}: {token_words(self._invites.problem(place.join))}")
            held = invite

            def begin(mark: str) -> None:
                if not self._invites.begin(held, mark):
                    raise UserError(f"{place.name}: {token_words('used')}")

            use = _Use(begin, lambda mark: self._invites.use(held, mark))
            return await self._pair(place, TOKEN + held.id, held.password, use)

    def token_problem(self, place: Place) -> str:
        """Why the token of a node does not work here: ``unknown``, ``used``, ``expired``; "" when it does."""
        return self._invites.problem(place.join)

    def is_peer(self, home: str) -> bool:
        """Whether this home is paired already."""
        return self._peers.get(home) is not None

    async def _pair(self, place: Place, wants: str, secret: bytes, use: _Use) -> Peer:
        waited = 0.0
        for left in reversed(range(TRIES)):
            try:
                return await self._once(place, wants, secret, use)
            except Refused as refused:
                waited += refused.seconds
                if refused.reason != "wait" or waited > LONGEST_WAIT_SECONDS or not left:
                    raise _refused(place.name, refused.reason) from refused
                await asyncio.sleep(refused.seconds)
            except (Garbled, ConnectionError) as error:
                if isinstance(error, ConnectionRefusedError) or not left:
                    raise NodeError(_nobody(*place.addresses[0])) from error
                await asyncio.sleep(BETWEEN_SECONDS)
            except (OSError, TimeoutError) as error:
                raise NodeLost(f"{place.name} did not finish the pairing in time; nothing was kept") from error
        raise AssertionError("the last try returns or raises")

    async def _once(self, place: Place, wants: str, secret: bytes, use: _Use) -> Peer:
        host, port = place.addresses[0]
        ours = Coordinator(self._us, wants, secret)
        async with _connected(host, port) as (reader, writer):
            async with asyncio.timeout(EXCHANGE_SECONDS):
                them = await self._prove(place, ours, reader, writer)
            mark = fingerprint(them.certificate)
            use.begin(mark)
            peer = self._peers.add(them.name, them.certificate)
            try:
                # With a limit of its own: one around all of it would end this from outside, as if nothing were kept.
                async with asyncio.timeout(EXCHANGE_SECONDS):
                    await messages.write(writer, ours.kept())
                    ours.end(await messages.read(reader))
            except (Refused, Garbled, Unproven, OSError, TimeoutError) as error:
                raise NodeError(
                    f"{peer.name} is trusted here now, but did not say that it trusts this machine: pair it again if"
                    " `coordinator nodes` shows it as not paired"
                ) from error
            use.end(mark)
            return peer

    async def _prove(
        self, place: Place, ours: Coordinator, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Party:
        """Who is there, when each has proven to the other that it knows the secret."""
        await messages.write(writer, ours.hello())
        challenge = await messages.read(reader)
        proof = await asyncio.to_thread(ours.prove, challenge)
        if ours.certificate == self._certificate:
            raise UserError(f"{place.name} is of this TANDEM_HOME: its programs trust each other unpaired")
        try:
            await messages.write(writer, proof)
            return ours.check(await messages.read(reader))
        except Unproven as error:
            raise WrongCode(_wrong(place.name)) from error
        except Refused as refused:
            raise _refused(place.name, refused.reason) from refused
        except (Garbled, OSError, TimeoutError) as error:
            # It has had its guess: it is not given another without a person.
            raise NodeError(f"{place.name} broke off when it was to prove the code; nothing was kept") from error


async def join_all(pairing: Pairing, found: Found, say: Callable[[str], None]) -> tuple[Peer, ...]:
    """Pair with those that wait with a token of ours; what cannot be done is said, here and there.

    Anybody can advertise that he waits with it: all are asked at once, and who says nothing delays nobody for long.
    """
    places = [Place.of(seen) for seen in found.nodes if seen.pairing_port and seen.join and not seen.own]
    ours = [place for place in places if pairing.token_problem(place) != "unknown"]  # the rest is somebody else's

    async def answer_of(place: Place) -> Place | None:
        problem = pairing.token_problem(place)
        try:
            async with asyncio.timeout(JOINING_SECONDS):
                answering, _ = await pairing.ask(place, problem)
            if problem:
                raise UserError(f"{place.name}: {token_words(problem)}")
        except TimeoutError:
            say(f"{place.name} waits with a token, and does not answer")
        except TandemError as error:
            say(str(error))
        else:
            return answering
        return None

    answering = [place for place in await asyncio.gather(*map(answer_of, ours)) if place is not None]
    joined = []
    # One after the other: a token is for one of them. Chance decides whose turn it is: nobody can always be the first.
    for place in random.sample(answering, min(len(answering), MOST_JOINING)):
        try:
            joined.append(await pairing.by_token(place))
        except TandemError as error:
            say(str(error))
        else:
            say(f"paired with {joined[-1].name}, which joined by its token")
    return tuple(joined)


def can_be_paired(pairing: Pairing, nodes: Iterable[SeenNode]) -> Sequence[SeenNode]:
    """Nodes of homes that are not paired, and can be."""
    return [seen for seen in nodes if seen.pairing_port and not seen.own and not pairing.is_peer(seen.home)]


def token_words(problem: str) -> str:
    """Why a token does not work, and what does."""
    words = {
        "unknown": "it waits for another coordinator, the one that printed its token",
        "used": "its token was used already; `coordinator invite` prints a new one",
        "expired": "its token has expired; `coordinator invite` prints a new one",
    }
    return words.get(problem, "its token is being used just now; try again")


def _wrong(name: str) -> str:
    return f"{name}: the code is wrong, or somebody else answers in its place; nothing was kept"


def _refused(name: str, reason: str) -> TandemError:
    match reason:
        case "wrong":
            return WrongCode(_wrong(name))
        case "wait":
            return NodeError(
                f"{name} has been given wrong codes and waits before it takes another; try again in a while"
            )
        case "other":
            return UserError(f"{name} {token_words('unknown').removeprefix('it ')}")
        case _:
            return UserError(
                f"{name} cannot be paired just now: its code is used, void or has expired; `node pair` there shows"
                " a new one"
            )


def _nobody(host: str, port: int) -> str:
    return (
        f"{host}:{port}: no node waits there to be paired; `node pair` on the other machine shows a code and its port"
    )


@contextlib.asynccontextmanager
async def _connected(host: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection for one exchange, which limits its own time.

    Raises:
        OSError: nobody listens.
        TimeoutError: connecting takes too long.
    """
    async with asyncio.timeout(CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(host, port, limit=messages.MOST_BYTES)
    try:
        yield reader, writer
        with contextlib.suppress(OSError):  # all is said: how the connection ends changes nothing
            async with asyncio.timeout(ENDING_SECONDS):
                writer.close()
                await writer.wait_closed()
    finally:
        writer.transport.abort()
