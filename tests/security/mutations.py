"""Bytes that nobody would send: noise, and messages with something wrong in them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def noise(source: random.Random, most: int = 300) -> bytes:
    """Random bytes."""
    return source.randbytes(source.randrange(1, most))


def mutated(source: random.Random, message: bytes) -> bytes:
    """A message with one to four faults: bits turned, bytes gone, twice, in the wrong place, or out of nowhere."""
    made = bytearray(message)
    for _ in range(source.randrange(1, 5)):
        at = source.randrange(len(made) + 1)
        length = source.randrange(1, 9)
        match source.randrange(6):
            case 0 if made:
                made[at % len(made)] ^= 1 << source.randrange(8)
            case 1:
                made[at:at] = source.randbytes(length)
            case 2:
                del made[at : at + length]
            case 3:
                made[at:at] = made[at : at + 4 * length]
            case 4:
                made[at : at + 4] = source.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80" * 10))
            case _:
                del made[at:]
    return bytes(made)


def bad_messages(seed: int, count: int, good: Sequence[bytes]) -> Iterator[bytes]:
    """So many of them: one in four is noise, the others were good messages."""
    source = random.Random(seed)
    for _ in range(count):
        yield noise(source) if source.random() < 0.25 else mutated(source, source.choice(good))
