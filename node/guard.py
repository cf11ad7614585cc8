"""Lets calls in: only from machines that are trusted, only those that are theirs to make, and no longer than that."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from ipaddress import IPv4Address, ip_address
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from node.errors import UserError
from node.peers import fingerprint, home_of
from node.trust import Standing, Trust

TLS = "TLSv1.3"
FOR_THE_INTRODUCED = frozenset({"/tandem.v1.Files/Fetch"})
"""What machines may ask that only the job at hand makes known to us; the service sees that they get its model alone."""

log = logging.getLogger(__name__)


def caller(context: Any) -> str:
    """The fingerprint of the certificate that a call came with; "" without one."""
    pem = context.auth_context().get("x509_pem_cert")
    try:
        return fingerprint(bytes(pem[0])) if pem else ""
    except UserError:
        return ""


def caller_home(context: Any) -> str:
    """The id of the home whose certificate a call came with.

    Raises:
        UserError: it came with none of ours; the guard lets no such call in.
    """
    return home_of(bytes(context.auth_context()["x509_pem_cert"][0]))


def caller_address(context: Any) -> IPv4Address | None:
    """Where a call came from; None where that is no address of IPv4."""
    # ipv4:10.0.0.1:50000, or ipv6:%5B::ffff:10.0.0.1%5D:50000
    host = unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return address if isinstance(address, IPv4Address) else address.ipv4_mapped


class Guard(grpc.aio.ServerInterceptor):
    """Stands before all services of a server.

    TLS has let nobody in who was a stranger when the connection was made; here it is seen again with each call, and
    calls that run are ended when their machine is trusted no more.

    Args:
        trust: who may.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}
        self._revoked: set[asyncio.Task[Any]] = set()
        loop = asyncio.get_running_loop()
        self._end = trust.on_revoked(lambda mark: loop.call_soon_threadsafe(self._revoke, mark))

    def close(self) -> None:
        """Hear of no more revocations."""
        self._end()

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method: str = handler_call_details.method
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def answer(request: Any, context: Any) -> Any:
            return await self._let_in(method, context, _answered(inner, request, context))

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(answer, handler.request_deserializer, handler.response_serializer)

    async def _let_in(self, method: str, context: Any, work: Coroutine[Any, Any, Any]) -> Any:
        mark = caller(context)
        version = context.auth_context().get("ssl_tls_version", [b""])[0].decode()
        standing = self._trust.standing(mark) if mark and version == TLS else None
        if standing is None:
            work.close()
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not paired")
        if standing is Standing.INTRODUCED and method not in FOR_THE_INTRODUCED:
            work.close()
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not paired: only the files of the job at hand")
        task = asyncio.ensure_future(work)
        calls = self._calls.setdefault(mark, set())
        calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task not in self._revoked:
                raise
            log.warning("a call of a machine that is trusted no more was ended: %s", method)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "paired no more")
        finally:
            self._revoked.discard(task)
            calls.discard(task)
            if not calls and self._calls.get(mark) is calls:
                del self._calls[mark]

    def _revoke(self, mark: str) -> None:
        for task in self._calls.get(mark, ()):
            self._revoked.add(task)
            task.cancel()


async def _answered(inner: Callable[..., Any], request: Any, context: Any) -> Any:
    """What a handler answers, whichever way it is written."""
    if not inspect.isasyncgenfunction(inner):
        return await inner(request, context)
    async for message in inner(request, context):
        await context.write(message)
    return None
