"""A new group's parts: who is which rank, by what means they add up, and how they reach each other."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.links import Paths, by_cable, jaccl_lack, jaccl_matrix, ring_connections
from node.errors import NodeError, UserError
from node.info import GradientDtype, NodeInfo, RingPart

FORM_SECONDS = 30.0
"""For forming a group: the ring's own connects take up to 15 s when a rank is late."""
WAIT_SECONDS = 120.0
LARGEST_TOKEN = 1 << 20


@dataclass(frozen=True)
class Means:
    """By what means a group adds up, as the options and the plan say; see ``TrainConfig``."""

    reduce: str
    ring_encryption: str
    gradient_dtype: GradientDtype = "fp32"


def group_parts(
    means: Means,
    ids: Sequence[str],
    infos: Mapping[str, NodeInfo],
    paths: Paths,
    certificates: Mapping[str, bytes],
    state_seconds: float = 0.0,
) -> list[RingPart]:
    """Each rank's part of a new group; routes and proofs are made anew each time.

    Args:
        means: what was asked for.
        ids: of the machines, in the order of their ranks.
        infos: of these, by id.
        paths: between them.
        certificates: of these, by id, in PEM.
        state_seconds: the longest that it should take to bring a rank's whole state to the others.

    Raises:
        UserError: ``reduce`` is ``jaccl``, and a machine lacks what that takes.
        NodeError: two neighbours of a ring do not reach each other.
    """
    size = len(ids)
    token = secrets.randbelow(LARGEST_TOKEN - size)
    wait = WAIT_SECONDS + state_seconds
    if means.reduce == "grpc":
        return [
            RingPart(rank, size, "grpc", b"", b"", (), token, FORM_SECONDS, wait, gradient_dtype=means.gradient_dtype)
            for rank in range(size)
        ]
    rdma = rdma_of(means, ids, infos, paths)
    connections = ring_connections(ids, paths)
    in_clear = _in_clear(means, ids, infos, paths, connections)
    routes = [secrets.token_bytes(16) for _ in ids]
    return [
        RingPart(
            rank=rank,
            size=size,
            backend="ring" if rdma is None else "jaccl",
            route=routes[rank],
            next_route=routes[(rank + 1) % size],
            next=connections[rank],
            token=token,
            form_seconds=FORM_SECONDS,
            wait_seconds=wait,
            devices=() if rdma is None else rdma[0],
            leader="" if rdma is None else rdma[1],
            next_certificate=certificates[ids[(rank + 1) % size]],
            previous_certificate=certificates[ids[rank - 1]],
            next_in_clear=in_clear[rank],
            previous_in_clear=in_clear[rank - 1],
            gradient_dtype=means.gradient_dtype,
        )
        for rank in range(size)
    ]


def rdma_of(
    means: Means, ids: Sequence[str], infos: Mapping[str, NodeInfo], paths: Paths
) -> tuple[tuple[str, ...], str] | None:
    """RDMA devices and rank 0's address (see ``jaccl_matrix``) where the group adds up by JACCL; else None.

    Raises:
        UserError: it was told to, and cannot.
    """
    # Nothing can encrypt what RDMA devices send, and who rounds has to add up hop by hop.
    if means.reduce not in ("auto", "jaccl") or means.ring_encryption == "on" or means.gradient_dtype == "bf16":
        return None
    # With more ranks its sums depend on who is heard first, and the ranks' states would drift apart.
    found = jaccl_matrix(ids, infos, paths) if len(ids) == 2 else None
    if found is None and means.reduce == "jaccl":
        lack = jaccl_lack(ids, infos, paths) if len(ids) == 2 else f"it adds up over two machines, not {len(ids)}"
        raise UserError(f"--reduce jaccl: {lack}; without the option whatever works is used")
    return found


def unencrypted(means: Means, ids: Sequence[str], infos: Mapping[str, NodeInfo], paths: Paths) -> list[str]:
    """Lines for people: between whom the group's numbers are sent in clear, and why.

    Raises:
        UserError: as ``group_parts``.
    """
    if means.reduce == "grpc" or len(ids) < 2:
        return []
    names = [infos[key].name for key in ids]
    if rdma_of(means, ids, infos, paths) is not None:
        return [f"{names[0]} ↔ {names[1]}: not encrypted, by RDMA over their Thunderbolt cable"]
    try:
        connections = ring_connections(ids, paths)
    except NodeError:
        return []  # there is no ring; when it is to be formed, that is seen to
    in_clear = _in_clear(means, ids, infos, paths, connections)
    why = "as --ring-encryption says" if means.ring_encryption == "off" else "over their own Thunderbolt cable"
    return [
        f"{names[rank]} → {names[(rank + 1) % len(ids)]}: not encrypted, {why}"
        for rank, plain in enumerate(in_clear)
        if plain
    ]


def _in_clear(
    means: Means,
    ids: Sequence[str],
    infos: Mapping[str, NodeInfo],
    paths: Paths,
    connections: Sequence[Sequence[str]],
) -> list[bool]:
    """Whether each rank's connections to the next go without encryption; who is there is shown all the same."""
    if means.ring_encryption != "auto":
        return [means.ring_encryption == "off"] * len(ids)
    return [by_cable(one, ids[(rank + 1) % len(ids)], connections[rank], infos, paths) for rank, one in enumerate(ids)]
