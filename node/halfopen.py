"""Connections of which is not known yet who they are: a few at once, and a crowd gets in its own way only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter


class HalfOpen:
    """Keeps so many at most. When there are more, the oldest from the address with the most is ended for the new one.

    So whoever comes is heard, however many a stranger has open that say nothing.

    Args:
        most: at once; as many again may be about to leave.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._hosts: dict[socket.socket, str] = {}  # the oldest first
        self._displaced: set[socket.socket] = set()
        self._changed = threading.Condition()

    def enter(self, connection: socket.socket, host: str) -> None:
        """Count this one; returns at once, or when enough of those that were ended have left.

        Args:
            connection: ended when another one takes its place; ``leave`` must be called for it whatever becomes of it.
            host: where it comes from.
        """
        with self._changed:
            if len(self._hosts) - len(self._displaced) >= self._most:
                self._displace()
            while len(self._displaced) >= self._most:
                self._changed.wait()
            self._hosts[connection] = host

    def leave(self, connection: socket.socket) -> None:
        """Count it no more."""
        with self._changed:
            self._hosts.pop(connection, None)
            self._displaced.discard(connection)
            self._changed.notify_all()

    def _displace(self) -> None:
        staying = {connection: host for connection, host in self._hosts.items() if connection not in self._displaced}
        busiest = Counter(staying.values()).most_common(1)[0][0]
        oldest = next(connection for connection, host in staying.items() if host == busiest)
        self._displaced.add(oldest)
        with contextlib.suppress(OSError):  # it has gone by itself
            oldest.shutdown(socket.SHUT_RDWR)
