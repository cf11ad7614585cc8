"""The server: an application on an open socket, until Ctrl-C or until a stream ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import uvicorn

from coordinator.dashboard.app import make_app
from coordinator.dashboard.guard import Guard

GRACE_SECONDS = 2


def serve(folders: Sequence[Path], opened: socket.socket, host: str, token: str, until: BinaryIO | None = None) -> None:
    """Serve until Ctrl-C.

    Args:
        folders: of the runs.
        opened: a listening socket.
        host: that was asked for.
        token: that must be shown; "" for none.
        until: a stream at whose end the server stops; Ctrl-C is left to whoever holds the other end.
    """
    asyncio.run(_serve(folders, opened, host, token, until))


async def _serve(folders: Sequence[Path], opened: socket.socket, host: str, token: str, until: BinaryIO | None) -> None:
    ending = asyncio.Event()
    app = Guard(make_app(folders, ending), host, opened.getsockname()[1], token)
    config = uvicorn.Config(
        app,
        log_level="critical",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config, ending)
    watching = asyncio.create_task(_watch(until, server)) if until is not None else None
    await server.serve(sockets=[opened])
    if watching is not None:
        watching.cancel()


class _Server(uvicorn.Server):
    """A server that tells its streams to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, ending: asyncio.Event) -> None:
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._ending.set()
        await super().shutdown(sockets)


async def _watch(stream: BinaryIO, server: uvicorn.Server) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    while await reader.read(1024):
        pass
    server.should_exit = True
