"""Bring a model to the machines that lack it: each link carries it once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from node.errors import NodeError
from node.info import Manifest, NodeInfo, StoredFile
from node.sizes import show_size

MOST_ADDRESSES = 3
"""Of one source that a machine tries."""
_LINK_LOCAL = "169.254."


class Receiver(Protocol):
    """What is asked of a node; see ``node.client.NodeClient``."""

    @property
    def address(self) -> str:
        """``host:port`` at which the coordinator reaches it."""

    async def missing(self, files: Sequence[StoredFile]) -> tuple[StoredFile, ...]:
        """Which of these files it lacks."""

    async def pull(
        self,
        manifest: Manifest,
        sources: Sequence[str],
        progress: Callable[[int, int], None],
        certificates: Mapping[str, bytes],
    ) -> str:
        """Have it get a model; the manifest's digest."""


def chain(
    holders: Sequence[str], lacking: Sequence[str], speeds: Mapping[tuple[str, str], float] | None = None
) -> dict[str, tuple[str, ...]]:
    """Who gets a model from whom.

    Every machine passes on what it receives while it still receives it, to one other machine: so no uplink carries the
    model twice. The fastest links come first, as nothing behind a slow one is faster.

    Args:
        holders: machines that have it.
        lacking: machines that get it.
        speeds: bits per second from one machine to another, where they are known.

    Returns:
        For each machine that lacks it, in the order of the chain: its source, then those that stand in for that one:
        its own source, and so on, then the other holders.
    """
    known = speeds or {}
    chains = [[holder] for holder in dict.fromkeys(holders)]
    waiting = [name for name in dict.fromkeys(lacking) if name not in holders]
    sources: dict[str, tuple[str, ...]] = {}
    while waiting and chains:
        ends = [(link, name) for link in chains for name in waiting]
        # Of equal links the shortest chain grows; of equals min() takes the first, so the order is the given one.
        link, name = min(ends, key=lambda end: (-known.get((end[0][-1], end[1]), 0.0), len(end[0])))
        others = [holder for holder in holders if holder != link[0]]
        sources[name] = (*reversed(link), *others)
        link.append(name)
        waiting.remove(name)
    return sources


def addresses_of(source: tuple[str, NodeInfo], receiver: tuple[str, NodeInfo]) -> tuple[str, ...]:
    """Where one machine may reach another's service, the likeliest first.

    Args:
        source: ``host:port`` at which the coordinator reaches it, and what it says about itself.
        receiver: likewise.
    """
    host, _, port = source[0].rpartition(":")
    own = [item.address for item in source[1].interfaces if item.kind != "loopback"]
    theirs = [item.address for item in receiver[1].interfaces if item.kind != "loopback"]
    same_machine = [f"127.0.0.1:{port}"] if set(own) == set(theirs) else []
    networks = {_network(address) for address in theirs}
    # Fastest kind first, as a node lists them.
    near = [address for address in own if _network(address) in networks]
    seen_here = [] if host.startswith("127.") or host == "localhost" else [host]
    # A direct cable's address means something to the machine at its other end only, and that one is near.
    far = [address for address in own if not address.startswith(_LINK_LOCAL)]
    others = (f"{address}:{port}" for address in dict.fromkeys([*near, *seen_here, *far]))
    return (*same_machine, *others)[:MOST_ADDRESSES]


def _network(address: str) -> str:
    # Nodes do not say how wide their networks are; a guess decides the order only.
    return _LINK_LOCAL if address.startswith(_LINK_LOCAL) else address.rpartition(".")[0]


async def distribute(
    manifest: Manifest,
    nodes: Mapping[str, tuple[Receiver, NodeInfo]],
    source: tuple[str, NodeInfo],
    certificate_of: Callable[[str], bytes | None],
    *,
    progress: Callable[[int, int], None],
    note: Callable[[str], None],
    speeds: Mapping[tuple[str, str], float] | None = None,
) -> dict[str, str]:
    """Have all nodes get a model, at once.

    Args:
        manifest: the files.
        nodes: who shall have it, by id. Those that have it already give it, too.
        source: ``host:port`` and description of a node service that has it; it may be one of ``nodes``.
        certificate_of: by which the ``TANDEM_HOME`` of an id is known, in PEM.
        progress: told bytes that are there and bytes that shall be, of all nodes together.
        note: told in one line who gets it.
        speeds: bits per second from one id to another, where they are known.

    Returns:
        Reasons of those that did not get it, by id.
    """
    troubles: dict[str, str] = {}
    answers = await asyncio.gather(
        *(client.missing(manifest.files) for client, _ in nodes.values()), return_exceptions=True
    )
    lacks: dict[str, int] = {}
    for (key, (_, info)), answer in zip(nodes.items(), answers, strict=True):
        if isinstance(answer, NodeError):
            troubles[key] = str(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            # The source has it, whatever it says: its own files may have changed since, and nobody else could tell.
            lacks[key] = 0 if info.id == source[1].id else sum(file.size for file in answer)
    places = {source[1].id: source} | {
        key: (nodes[key][0].address, nodes[key][1]) for key, size in lacks.items() if key != source[1].id
    }
    holders = [source[1].id, *(key for key, size in lacks.items() if not size and key != source[1].id)]
    lacking = [key for key, size in lacks.items() if size]
    order = chain(holders, lacking, speeds)
    if lacking:
        names = ", ".join(nodes[key][1].name for key in order)
        note(f"sending {manifest.name} ({show_size(max(lacks.values()))}) to {names}")
    here = {key: manifest.size - size for key, size in lacks.items()}
    before = sum(here.values())
    wanted = sum(lacks.values())

    async def one(key: str) -> None:
        client, _ = nodes[key]

        def moved(done: int, _: int) -> None:
            here[key] = max(here[key], done)
            if wanted:
                progress(min(sum(here.values()) - before, wanted), wanted)

        certificates: dict[str, bytes] = {}
        for giver in order.get(key, ()) or (source[1].id,):
            certificate = certificate_of(places[giver][1].home)
            if certificate is not None:
                certificates |= dict.fromkeys(addresses_of(places[giver], places[key]), certificate)
        try:
            await client.pull(manifest, list(certificates), moved, certificates)
        except NodeError as error:
            troubles[key] = str(error)

    # Also those that lack nothing: they learn which files make up the model.
    await asyncio.gather(*(one(key) for key in lacks))
    return troubles
