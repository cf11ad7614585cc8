"""A worker's end of its groups: the ports and the route that each group needs on the worker's machine."""

from __future__ import annotations

import asyncio

from node import wire
from node.info import RingPart
from node.relay import Neighbour, Relay, ReservedPorts
from node.spec import Join, RingSpec
from node.supervisor import LocalWorker


class RingEnd:
    """Has a worker of this machine join one group after another.

    Args:
        worker: that is a rank of them.
        relay: carries them.
    """

    def __init__(self, worker: LocalWorker, relay: Relay) -> None:
        self._worker = worker
        self._relay = relay
        self._generation = 0
        self._route = b""
        self._reserved: ReservedPorts | None = None

    async def form(self, part: RingPart, generation: int) -> None:
        """Open this end of a group, and have the worker join it; groups of the past are passed over.

        Raises:
            As ``WorkerLink.send``.
        """
        if generation <= self._generation:
            return
        self._generation = generation
        self.close()
        listen: tuple[str, ...] = ()
        connect: tuple[str, ...] = ()
        if part.backend == "ring":
            self._reserved = ReservedPorts(len(part.next))
            ports = self._relay.open(
                part.route,
                self._reserved.ports,
                part.next_route,
                list(part.next),
                part.form_seconds,
                next=Neighbour(part.next_certificate, encrypted=not part.next_in_clear),
                previous=Neighbour(part.previous_certificate, encrypted=not part.previous_in_clear),
            )
            self._route = part.route
            listen = tuple(f"127.0.0.1:{port}" for port in self._reserved.ports)
            connect = tuple(f"127.0.0.1:{port}" for port in ports)
        spec = RingSpec(
            part.rank,
            part.size,
            part.backend,
            listen,
            connect,
            part.token,
            part.form_seconds,
            part.wait_seconds,
            part.devices,
            part.leader,
            part.gradient_dtype,
        )
        # A request that was cut short could be followed by none.
        await asyncio.shield(self._worker.send_bytes(wire.encode_request(Join(spec), generation), generation))

    def close(self) -> None:
        """Carry nothing more. May be called twice."""
        if self._route:
            self._relay.close(self._route)
            self._route = b""
        if self._reserved is not None:
            self._reserved.release()
            self._reserved = None


class RingWorker(LocalWorker):
    """A worker of this very program that can be a rank of a group; see ``coordinator.crew.RingLink``.

    Attributes:
        relay: carries its groups; there must be one before the first of them.
    """

    relay: Relay | None = None
    _end: RingEnd | None = None

    async def form_ring(self, part: RingPart) -> None:
        """See ``RingLink``."""
        assert self.relay is not None
        if self._end is None:
            self._end = RingEnd(self, self.relay)
        await self._end.form(part, self.generation)

    async def close(self, timeout_seconds: float = 10.0) -> None:
        """See ``WorkerLink``."""
        try:
            await super().close(timeout_seconds)
        finally:
            if self._end is not None:
                self._end.close()
