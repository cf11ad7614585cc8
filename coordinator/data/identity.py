"""Which rows are the same, as far as training is concerned."""

from __future__ import annotations

import hashlib
import json
from array import array

import numpy as np
import numpy.typing as npt

from coordinator.data.rows import Row

Hashes = npt.NDArray[np.uint64]


def row_hash(row: Row, seed: int = 0) -> int:
    """64 bits that equal rows share, whatever unknown keys, spacing or key order their lines have.

    Among a million rows, two different ones share them with a probability of about 3e-8.
    """
    content = json.dumps([row.text, row.messages, row.tools], sort_keys=True, ensure_ascii=False)
    key = (seed % 2**63).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8, key=key).digest(), "little")


def as_hashes(collected: array[int]) -> Hashes:
    """The hashes of an ``array("Q")`` without copying them."""
    return np.frombuffer(collected, np.uint64) if len(collected) else np.zeros(0, np.uint64)


def repeated(hashes: Hashes) -> list[tuple[int, int]]:
    """Every index whose hash stood earlier, with the first index that had it, in order."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = first[inverse]
    later = np.flatnonzero(firsts != np.arange(len(hashes)))
    return [(int(index), int(firsts[index])) for index in later]
