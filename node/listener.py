"""What a node hears of a worker: handed on to the coordinator as it comes, and the little that the node itself needs.

While the coordinator is there nothing of it is decoded but a few kinds. When it is gone, the worker is asked for its
state once more.
"""

from __future__ import annotations

import asyncio
from collections import deque

from node import wire
from node.errors import TandemError
from node.events import Copied, CopyFailed, Ready, StepDone
from node.spec import CopyState
from node.supervisor import LocalWorker

EVENTS_WAITING = 256
SAVE_SECONDS = 10.0
"""For a worker whose coordinator is gone to come to its senses and write its state, however small that is."""
SLOWEST_COPY_BYTES_PER_SECOND = 50e6
STATE_BYTES_PER_PARAMETER = 16

_NOTICED = frozenset({"ready", "step_done", "copied", "copy_failed"})


class Listener:
    """Hears a worker from its first word to its last.

    Args:
        worker: nobody else may receive from it until ``close``.
    """

    def __init__(self, worker: LocalWorker) -> None:
        self._worker = worker
        self._waiting: deque[bytes] = deque()
        self._arrived, self._taken = asyncio.Event(), asyncio.Event()
        self._alone = self._woken = False
        self._step = 0
        self._longest_step_seconds = 0.0
        self._parameters = 0
        self._wanted: int | None = None
        self._saved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen())

    @property
    def trained(self) -> bool:
        """Whether the worker has applied a step since it began."""
        return self._step > 0

    def say(self, event: bytes) -> None:
        """Put in what the node itself has to say."""
        self._waiting.append(event)
        self._arrived.set()

    def wake(self) -> None:
        """End the present wait for a batch, or the next one."""
        self._woken = True
        self._arrived.set()

    async def batch(self, most_bytes: int) -> list[bytes]:
        """What has been said since the last batch; waits for something, or for ``wake``.

        Args:
            most_bytes: of all together; a larger event goes alone.

        Raises:
            TandemError: there is nothing more, and why.
        """
        while not self._waiting:
            if self._woken:
                self._woken = False
                return []
            if self._listening.done():
                await self._listening  # raises: it ends for no other reason
            self._arrived.clear()
            await self._arrived.wait()
        batch = [self._waiting.popleft()]
        size = len(batch[0])
        while self._waiting and size + len(self._waiting[0]) <= most_bytes:
            size += len(self._waiting[0])
            batch.append(self._waiting.popleft())
        self._taken.set()
        return batch

    async def save_state(self) -> bool:
        """Have the worker write its state as it is now, whatever it is busy with; whether it did, in time.

        From here on nothing that it says is handed on. A worker that has trained nothing is not asked.
        """
        self._alone = True
        self._waiting.clear()
        self._taken.set()
        if not self.trained or self._listening.done():
            return False
        # A newer generation ends a wait for ranks that are no more, and drops the steps that were sent ahead.
        self._worker.cancel()
        self._wanted = self._worker.generation
        state_bytes = STATE_BYTES_PER_PARAMETER * self._parameters
        patience = SAVE_SECONDS + self._longest_step_seconds + state_bytes / SLOWEST_COPY_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(patience):
                await self._worker.send(CopyState(self._step))
                return await self._saved
        except (TandemError, TimeoutError):
            return False

    async def close(self) -> None:
        """Listen no more. May be called twice."""
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            while True:
                data = await self._worker.receive_bytes()
                self._notice(data)
                if not self._alone:
                    self._waiting.append(data)
                    self._arrived.set()
                while len(self._waiting) >= EVENTS_WAITING:
                    self._taken.clear()
                    await self._taken.wait()
        finally:
            self._arrived.set()
            self._answer(saved=False)

    def _notice(self, data: bytes) -> None:
        if wire.event_kind(data) not in _NOTICED:
            return
        generation, event = wire.decode_event(data)
        match event:
            case Ready():
                self._parameters = event.trainable_parameters
            case StepDone():
                self._step = event.step
                self._longest_step_seconds = max(self._longest_step_seconds, event.seconds)
            case Copied(requested=True) | CopyFailed(requested=True):
                # The coordinator may have asked for one, too, just before it went.
                if self._wanted is not None and generation >= self._wanted:
                    self._answer(saved=isinstance(event, Copied))

    def _answer(self, *, saved: bool) -> None:
        if not self._saved.done():
            self._saved.set_result(saved)
