"""Copies of the trainable state on disk, written beside the training.

A copy is two safetensors files: the weights, in the form of ``mlx_lm``'s adapter files, and the optimizer's state. With
the step number that is all that exact resume needs, since data order, schedule and row randomness are functions of it.
A record beside them (``node/copies.py``) says so to whoever finds them when nobody is left to ask.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from node.copies import RECORD_SUFFIX, StateCopy, write_record
from node.errors import UserError, one_line
from node.events import Copied, CopyFailed, Event
from node.files import replacing, sha256_of
from node.info import StoredFile
from node.spec import FileRef, Restore
from node.tensors import check_numbers
from node.worker.trainer import Arrays, Published

KEPT_COPIES = 2


def save_arrays(path: Path, arrays: Arrays) -> FileRef:
    """Write evaluated arrays to a safetensors file, whole or not at all.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    with replacing(path) as partial:
        try:
            # Streams belong to threads: the copier's must never be one of the GPU, which the training uses meanwhile.
            with mx.stream(mx.cpu):
                mx.save_safetensors(str(partial), arrays, metadata={"format": "mlx"})
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {error} Is the disk full?") from error
        size, digest = partial.stat().st_size, sha256_of(partial)
    return FileRef(path.name, digest, size)


def load_copy(folder: Path, request: Restore) -> Published:
    """Read a copy back.

    Raises:
        UserError: a file is missing, its content is not what its checksum says, or it holds what is no number.
    """
    loaded: list[Arrays] = []
    for ref in (request.weights, request.optimizer):
        path = folder / ref.name
        if not path.exists() or path.stat().st_size != ref.size or sha256_of(path) != ref.sha256:
            raise UserError(f"the copy of step {request.step} is damaged: {path.name} does not match its checksum")
        check_numbers(path)
        try:
            arrays = mx.load(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: {one_line(error)}") from error
        assert isinstance(arrays, dict)
        loaded.append(arrays)
    return Published(request.step, loaded[0], loaded[1])


class Copier:
    """Writes copies in a thread of its own, so that training does not wait for the disk.

    Args:
        folder: where copies go.
        emit: takes ``Copied`` and ``CopyFailed``, each with the generation that ``copy`` was given.
    """

    def __init__(self, folder: Path, emit: Callable[[Event, int], None]) -> None:
        self._folder = folder
        self._emit = emit
        self._waiting: queue.Queue[tuple[Published, bool, int, tuple[bytes, ...]] | None] = queue.Queue(maxsize=2)
        self._written: dict[bool, list[tuple[Path, ...]]] = {True: [], False: []}  # by whether they were asked for
        self._thread = threading.Thread(target=self._run, name="copier", daemon=True)
        self._thread.start()

    def copy(self, state: Published, *, requested: bool, generation: int = 0, steps: tuple[bytes, ...] = ()) -> None:
        """Have this state written; waits while two older ones still are, and unless it was asked for, while any is.

        So, however fast the steps are and however slow the disk is, there is a whole copy that is no older than two
        intervals of those that nobody asks for.

        Args:
            state: to be written.
            requested: whether it was asked for.
            generation: of the event that tells of it.
            steps: encoded ``StepDone`` events of the steps before, for the record.
        """
        if not requested:
            self.wait()
        self._waiting.put((state, requested, generation, steps))

    def wait(self) -> None:
        """Wait until everything is written that was handed over so far."""
        self._waiting.join()

    def close(self) -> None:
        """Wait until everything is written, and end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            state, requested, generation, steps = item
            event: Event
            try:
                event = self._write(state, requested, steps)
            except Exception as error:  # noqa: BLE001 - the thread's boundary: without it the training waits for ever
                event = CopyFailed(state.step, requested, _reason(error))
            try:
                self._emit(event, generation)
            finally:
                self._waiting.task_done()

    def _write(self, state: Published, requested: bool, steps: tuple[bytes, ...]) -> Copied:
        name = f"{state.step:07d}{'-checkpoint' if requested else ''}"
        weights = self._folder / f"{name}.weights.safetensors"
        moments = self._folder / f"{name}.optimizer.safetensors"
        record = self._folder / f"{name}{RECORD_SUFFIX}"
        try:
            copied = Copied(
                state.step, requested, save_arrays(weights, state.parameters), save_arrays(moments, state.moments)
            )
            stored = [StoredFile(ref.name, ref.sha256, ref.size) for ref in (copied.weights, copied.optimizer)]
            write_record(record, StateCopy(state.step, stored[0], stored[1], time.time(), steps))
        except Exception:
            for path in (weights, moments, record):
                path.unlink(missing_ok=True)  # half a copy is of no use, and takes room on a disk that has none
            raise
        kept = self._written[requested]
        kept.append((weights, moments, record))
        for old in kept[:-KEPT_COPIES]:
            for path in old:
                path.unlink(missing_ok=True)
        del kept[:-KEPT_COPIES]
        return copied


def _reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if message and isinstance(error, OSError) else f"{type(error).__name__}: {message}"
