"""Frames: what is said is what is understood, and nothing else is."""

from __future__ import annotations

import asyncio
import random

import pytest

from node.pairing import messages
from node.pairing.exchange import Coordinator, Party, read_hello, read_offer
from node.pairing.messages import FIELDS, Garbled, Kind, Refused, pack, refusal, unpack


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.REFUSED])
def test_what_is_packed_is_unpacked(kind: Kind) -> None:
    fields = tuple(bytes([number]) * number * 100 for number in range(FIELDS[kind]))
    assert unpack(pack(kind, *fields), kind) == fields


def test_a_refusal_takes_any_turn() -> None:
    with pytest.raises(Refused) as caught:
        unpack(refusal("wait", 2.2), Kind.CHALLENGE)
    assert (caught.value.reason, caught.value.seconds) == ("wait", 3)
    with pytest.raises(Refused) as caught:
        unpack(pack(Kind.REFUSED, b"\xff" * 40, b"9" * 40), Kind.CHALLENGE)
    assert (caught.value.reason, caught.value.seconds) == ("", 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes([Kind.PROOF]),
        bytes([Kind.PROOF, 0]),
        bytes([Kind.PROOF, 0, 5, 1, 2]),
        pack(Kind.PROOF, b"a", b"b") + b"\0",
        pack(Kind.PROOF, b"a", b"b") + b"\0\0",
        pack(Kind.ANSWER, b"a", b"b"),
        b"\xff" * 100,
    ],
)
def test_garbage_is_garbled(content: bytes) -> None:
    with pytest.raises(Garbled):
        unpack(content, Kind.PROOF)


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\0", b"\xff\xff" + bytes(9000), b"\0\x05abc", b"GET / HTTP/1.1\r\n"])
def test_no_stream_of_garbage_is_read(said: bytes) -> None:
    async def read() -> None:
        stream = asyncio.StreamReader(limit=messages.MOST_BYTES)
        stream.feed_data(said)
        stream.feed_eof()
        with pytest.raises(Garbled):
            await messages.read(stream)

    asyncio.run(read())


def test_twenty_thousand_messages_of_garbage_raise_nothing_else(certificate: bytes) -> None:
    right = Coordinator(Party("Studio", certificate), "code", b"secret").hello()
    chance = random.Random(7)
    refused = 0
    for number in range(20_000):
        content = bytearray(right if number % 2 else chance.randbytes(chance.randrange(0, 300)))
        for _ in range(chance.randrange(0, 4)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content) + 1)]
        for understand in (read_hello, read_offer, lambda said: unpack(said, Kind.PROOF)):
            try:
                understand(bytes(content))
            except (Garbled, Refused):
                refused += 1
    assert refused > 50_000
