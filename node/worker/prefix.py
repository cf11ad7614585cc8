"""The frozen blocks below the lowest trained one: what they make of a row is the same in every epoch.

They run outside of the gradient, where Metal's fused attention can be used; and where rows are met again, what they
gave is kept on disk in the model's own precision, so that from a row's second time on they are skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from node.spec import Rows
from node.worker.cut import Cut, trains_only_blocks

# Of what is free on the disk when the first row is kept, and in all.
DISK_SHARE = 0.25
MOST_BYTES = 32 << 30
# Positions computed and read before it is judged whether reading is faster.
JUDGED_POSITIONS = 4096

# NumPy has no bfloat16: what is kept are the bits.
_BITS = {2: (mx.uint16, np.uint16), 4: (mx.uint32, np.uint32)}


class Prefix:
    """A model's frozen blocks.

    Args:
        cut: of the model, where the last of them ends.
        blocks: how many they are.
        kept: where their outputs are kept, or None.
    """

    def __init__(self, cut: Cut, blocks: int, kept: Kept | None) -> None:
        self.cut = cut
        self.blocks = blocks
        self.kept = kept

    @classmethod
    def find(cls, model: nn.Module, folder: Path | None) -> Prefix | None:
        """The frozen blocks of a model that is trained, where there are any and it can be cut above them.

        Args:
            model: what is trainable in it does not change any more.
            folder: where outputs are kept; None keeps none.
        """
        trained = [index for index, block in enumerate(model.layers) if tree_flatten(block.trainable_parameters())]
        if not trained or trained[0] == 0 or not trains_only_blocks(model):
            return None
        try:
            cut = Cut.at_block(model, trained[0] - 1)
        except KeyError:
            return None
        # Blocks that share keys, values or embeddings with those below need more than the last one's output.
        if not cut.holds(mx.arange(1, 9, dtype=mx.int32)[None]):
            return None
        return cls(cut, trained[0], None if folder is None else Kept(folder))

    def outputs(self, rows: Rows, inputs: mx.array, *, keep: bool = True) -> mx.array:
        """(rows, length, features) what the blocks give; positions of padding hold anything finite.

        Args:
            rows: as they came.
            inputs: the same, (rows, length) int32.
            keep: False neither reads nor keeps anything.
        """
        if self.kept is None or not keep or not self.kept.pays:
            return self.cut.before(inputs)
        return self.kept.outputs(self.cut, rows, inputs)


@dataclass
class _Timed:
    """Seconds for a number of positions."""

    seconds: float = 0.0
    positions: int = 0

    @property
    def each(self) -> float:
        return self.seconds / max(self.positions, 1)


class Kept:
    """Outputs of rows that were met, in a file that is gone when its process is.

    What has come first stays: every row is met once in each epoch, so that none is worth more than another.

    Args:
        folder: of the file.

    Attributes:
        pays: whether it is of use: the disk takes it, and reading is faster than computing.
        hits, misses: rows that were found, and that were not.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self._room = 0
        self._end = 0
        self._places: dict[bytes, tuple[int, int]] = {}  # in bytes, and positions
        self._dtype, self._features = mx.float32, 0
        self._computing, self._reading = _Timed(), _Timed()
        self.pays = True
        self.hits = self.misses = 0

    def outputs(self, cut: Cut, rows: Rows, inputs: mx.array) -> mx.array:
        """As ``Prefix.outputs``: what is kept is read, the rest computed and kept."""
        keys, lengths = _keys(rows), (rows.lengths - 1).tolist()
        missing = [row for row, key in enumerate(keys) if key not in self._places]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        if len(missing) == len(keys):
            computed = self._computed(cut, inputs)
            self._keep_all(keys, lengths, computed)
            return computed
        began = time.perf_counter()
        number, bits = _BITS[self._dtype.size]
        whole = np.empty((*inputs.shape, self._features), bits)
        for row, key in enumerate(keys):
            if key in self._places:
                self._read(key, whole[row])
        self._reading.seconds += time.perf_counter() - began
        self._reading.positions += (len(keys) - len(missing)) * inputs.shape[1]
        if missing:
            computed = self._computed(cut, inputs[mx.array(missing)])
            whole[missing] = np.array(computed.view(number))
            self._keep_all([keys[row] for row in missing], [lengths[row] for row in missing], computed)
        self._judge()
        return mx.array(whole).view(self._dtype)

    def _computed(self, cut: Cut, inputs: mx.array) -> mx.array:
        began = time.perf_counter()
        computed = cut.before(inputs)
        mx.eval(computed)
        self._computing.seconds += time.perf_counter() - began
        self._computing.positions += inputs.size
        self._dtype, self._features = computed.dtype, computed.shape[-1]
        return computed

    def close(self) -> None:
        """Give the disk back."""
        self.pays = False
        self._places.clear()
        if self._file is not None:
            descriptor, self._file = self._file, None
            os.close(descriptor)

    def _keep_all(self, keys: list[bytes], lengths: list[int], computed: mx.array) -> None:
        bits = np.array(computed.view(_BITS[computed.dtype.size][0]))
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if self.pays and length > 0 and key not in self._places:
                self._keep(key, bits[row, :length])

    def _keep(self, key: bytes, bits: np.ndarray[Any, Any]) -> None:
        try:
            if self._file is None:
                self._file, path = tempfile.mkstemp(dir=self._folder, prefix="prefix-")
                os.unlink(path)
                self._room = min(int(DISK_SHARE * shutil.disk_usage(self._folder).free), MOST_BYTES)
            if self._end + bits.nbytes > self._room:
                return
            _write(self._file, bits, self._end)
        except OSError:
            # The disk is full, or ails: training goes on without, and gives back the room.
            self.close()
            return
        self._places[key] = (self._end, len(bits))
        self._end += bits.nbytes

    def _read(self, key: bytes, into: np.ndarray[Any, Any]) -> None:
        """Fill (length, features) bits; padding gets what the last position has, which is surely finite."""
        offset, length = self._places[key]
        assert self._file is not None
        _read(self._file, into[:length], offset)
        into[length:] = into[length - 1]

    def _judge(self) -> None:
        enough = min(self._computing.positions, self._reading.positions) >= JUDGED_POSITIONS
        if enough and self._reading.each >= self._computing.each:
            self.close()


def _keys(rows: Rows) -> list[bytes]:
    keys, start = [], 0
    for length in rows.lengths.tolist():
        keys.append(hashlib.blake2b(rows.tokens[start : start + length].tobytes(), digest_size=16).digest())
        start += length
    return keys


def _write(descriptor: int, bits: np.ndarray[Any, Any], offset: int) -> None:
    view = bits.data.cast("B")
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _read(descriptor: int, into: np.ndarray[Any, Any], offset: int) -> None:
    view = into.data.cast("B")
    while view:
        done = os.preadv(descriptor, [view], offset)
        if done == 0:
            raise OSError("the file of kept outputs has been cut off")
        view, offset = view[done:], offset + done
