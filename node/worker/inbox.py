"""What the worker has been asked and not begun: read by a thread, so that cancelling works during a long step."""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque

from node import wire
from node.channel import BlockingChannel
from node.events import Event
from node.spec import Request

PARENT_GONE = 3
UNREADABLE = 4


class Inbox:
    """Requests in order; a request of a newer generation drops the older ones that have not begun.

    When nothing more can be read the process ends at once, with exit code ``PARENT_GONE``, or ``UNREADABLE`` when what
    came was no request.

    Attributes:
        begun: generation of the request that was begun last.
        newest: newest generation heard of.
    """

    def __init__(self, channel: BlockingChannel) -> None:
        self._channel = channel
        self._requests: deque[tuple[int, Request]] = deque()
        self._changed = threading.Condition()
        self.newest = 0
        self.begun = 0
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next(self) -> Request:
        """The next request; waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests)
            self.begun, request = self._requests.popleft()
            return request

    def superseded(self) -> bool:
        """Whether a newer generation was heard of since the last request was begun."""
        return self.newest > self.begun

    def send(self, event: Event, generation: int | None = None) -> None:
        """Send an event up, stamped with a generation: that of the request which was begun last unless told."""
        try:
            self._channel.send(wire.encode_event(event, self.begun if generation is None else generation))
        except OSError:
            os._exit(PARENT_GONE)

    def _read(self) -> None:
        code = UNREADABLE
        try:
            self._take_in()
            code = PARENT_GONE
        except Exception:  # noqa: BLE001 - nobody above: a thread that just died would leave the process deaf
            traceback.print_exc()
        finally:
            # Nobody is left to work for, and the main thread may be deep in a computation.
            os._exit(code)

    def _take_in(self) -> None:
        while (data := self._channel.receive()) is not None:
            generation, request = wire.decode_request(data)
            with self._changed:
                if generation > self.newest:
                    self.newest = generation
                    self._requests.clear()
                if generation == self.newest:
                    self._requests.append((generation, request))
                    self._changed.notify()
