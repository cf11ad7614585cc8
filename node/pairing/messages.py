"""What is sent while two machines are paired.

A frame is its length in two bytes and its content: one byte for its kind, and fields of two bytes of length each. All
comes from strangers: nothing is parsed that is not of exactly this shape.
"""

from __future__ import annotations

import asyncio
from enum import IntEnum

MOST_BYTES = 4096
"""Of a frame."""
LABEL = b"mlx-tandem pairing 1"
"""Says which protocol is spoken; whoever says anything else gets no answer."""


class Kind(IntEnum):
    """Of a frame, with its fields."""

    HELLO = 1
    """Coordinator: label, its certificate in DER, what it is going to prove (``secrets``), or "" to get an offer."""
    OFFER = 2
    """Node, and ends the conversation: its certificate, "code" or "", the id of its token or ""."""
    CHALLENGE = 3
    """Node: its certificate, its SPAKE2 message."""
    PROOF = 4
    """Coordinator: its SPAKE2 message, its proof that it knows the secret."""
    ANSWER = 5
    """Node: its own proof, its name, sealed."""
    KEPT = 6
    """Coordinator: its name, sealed. It trusts the node now."""
    DONE = 7
    """Node: nothing, sealed. It trusts the coordinator now."""
    REFUSED = 8
    """Either: why, one of ``Refused.REASONS``; for how many seconds. Nobody has proven anything: only a hint."""


FIELDS = {
    Kind.HELLO: 3,
    Kind.OFFER: 3,
    Kind.CHALLENGE: 2,
    Kind.PROOF: 2,
    Kind.ANSWER: 2,
    Kind.KEPT: 1,
    Kind.DONE: 1,
    Kind.REFUSED: 2,
}


class Garbled(Exception):
    """What was received is no message of ours, or not the one whose turn it is."""


class Refused(Exception):
    """The other side ends it.

    Args:
        reason: why, for programs; what this version does not know is "".
        seconds: after which it may be tried again, or 0.
    """

    REASONS = ("wait", "closed", "other", "wrong", "expired", "used", "unknown")

    def __init__(self, reason: str, seconds: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.seconds = seconds


def pack(kind: Kind, *fields: bytes) -> bytes:
    """The content of a frame."""
    assert len(fields) == FIELDS[kind], kind
    content = bytes([kind]) + b"".join(len(field).to_bytes(2, "big") + field for field in fields)
    assert len(content) <= MOST_BYTES, len(content)
    return content


def refusal(reason: str, seconds: float = 0) -> bytes:
    """The content of a frame that ends it."""
    return pack(Kind.REFUSED, reason.encode(), str(min(999, max(0, round(seconds + 0.5)))).encode())


def unpack(content: bytes, kind: Kind) -> tuple[bytes, ...]:
    """The fields of a frame of this kind.

    Raises:
        Refused: it is one that ends it.
        Garbled: it is none.
    """
    if not content:
        raise Garbled("an empty frame")
    if content[0] == Kind.REFUSED and kind != Kind.REFUSED:
        reason, seconds = (field.decode("ascii", "replace") for field in unpack(content, Kind.REFUSED))
        known = reason if reason in Refused.REASONS else ""
        raise Refused(known, int(seconds) if seconds.isascii() and seconds.isdigit() and len(seconds) <= 3 else 0)
    if content[0] != kind:
        raise Garbled(f"a frame of kind {content[0]} in the place of {kind}")
    fields, at = [], 1
    while at < len(content):
        end = at + 2 + int.from_bytes(content[at : at + 2], "big")
        if at + 2 > len(content) or end > len(content):
            raise Garbled("a field that is cut off")
        fields.append(content[at + 2 : end])
        at = end
    if len(fields) != FIELDS[kind]:
        raise Garbled(f"{len(fields)} fields for {FIELDS[kind]}")
    return tuple(fields)


async def read(stream: asyncio.StreamReader) -> bytes:
    """The content of the next frame.

    Raises:
        Garbled: it is none, or too long, or the connection has ended.
        OSError: the connection broke.
    """
    try:
        size = int.from_bytes(await stream.readexactly(2), "big")
        if not 0 < size <= MOST_BYTES:
            raise Garbled(f"a frame of {size} bytes")
        return await stream.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise Garbled("the connection has ended") from error


async def write(stream: asyncio.StreamWriter, content: bytes) -> None:
    """Send a frame.

    Raises:
        OSError: the connection broke.
    """
    stream.write(len(content).to_bytes(2, "big") + content)
    await stream.drain()
