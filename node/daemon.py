"""A node: its services, relay, advert and identity, for ``node serve`` and for a coordinator's own machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import ipaddress
import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from node import links, rpc
from node.advert import EVERYWHERE, Advert, BonjourOff, wanted_interfaces
from node.client import NodeClient
from node.doctor.examine import examine, serving_now
from node.doctor.finding import Diagnosis, Wanted
from node.doctor.lan import permitted
from node.errors import NodeError, TandemError, UserError, one_line
from node.events import Condition
from node.file_service import FileService
from node.files import make_private_folder, write_text_atomically
from node.hardware import describe, facts
from node.home import holds, tidy_jobs
from node.home import home as tandem_home
from node.identity import identity
from node.info import DEFAULT_PORT, PAIRING_PORT, NodeInfo
from node.names import usable_name
from node.owner import Owner, load_per_core
from node.pairing.desk import Desk, Happening, OpenCode
from node.pairing.exchange import Party
from node.pairing.tokens import Token
from node.power import Watch, condition
from node.relay import Relay
from node.running import RunningNode, running_nodes
from node.service import NodeService
from node.store import Store
from node.trust import Trust
from tandem.v1 import node_pb2_grpc

log = logging.getLogger(__name__)

OPEN_FILES = 4096

LEAVING_SECONDS = 5.0
HANDING_OVER_SECONDS = 20.0
"""For the coordinator of the job at hand to go on without this node."""
REFRESH_SECONDS = 5.0
"""Between two looks at the machine: memory, load and interfaces are asked of other programs."""


class Daemon:
    """One node.

    Args:
        home: the ``TANDEM_HOME``.
        name: what people call it.
        host: IPv4 address to serve on.
        port: to serve on; 0 takes a free one, None ``DEFAULT_PORT``, or a free one when that is taken.
        takes_jobs: False to give files only.
        advertise: whether others are told by Bonjour.
        owner: what its owner allows.
        store_limit: bytes that its store may take, None for its own choice.
        condition: looks at power and pressure.
        token: with which it waits to be paired, by the coordinator that printed it.
        tell: told what happens with its pairing, for its people.

    Attributes:
        port: where it serves.
        remark: why it does not serve on ``DEFAULT_PORT`` although it was to, or "".

    Raises:
        UserError: the port is taken, the host is not this machine, or the name serves already (from ``start``).
    """

    def __init__(
        self,
        home: Path,
        name: str,
        *,
        host: str = EVERYWHERE,
        port: int | None = 0,
        takes_jobs: bool = True,
        advertise: bool = True,
        owner: Owner | None = None,
        store_limit: int | None = None,
        condition: Callable[[], Condition] = condition,
        token: Token | None = None,
        tell: Callable[[Happening], None] = lambda _: None,
    ) -> None:
        self._home = home
        self.name = name
        self._host = host
        self._wanted_port = port
        self._takes_jobs = takes_jobs
        self._advert = Advert(host) if advertise else None
        self._owner = owner or Owner(home)
        self._store = Store(home / "store", store_limit, takes_code=self._owner.trusts_code)
        self._trust = Trust(home)
        self._relay = Relay(host, measured=links.serve_measure, trust=self._trust)
        self._identity = identity(home, name)
        self._server: grpc.aio.Server | None = None
        self._record = home / "nodes" / f"{self._identity.id}.json"
        self._recorded = False
        self._lock: int | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._machine: dict[str, Any] = {}
        self._look_at_condition = condition
        self._watch = Watch()
        self._condition = Condition()
        self._service = NodeService(
            self.info,
            self._owner,
            self._store,
            self._relay,
            self._trust,
            self._identity.secret,
            self._end,
            self._pair,
            self._diagnose,
        )
        self._token = token
        # A coordinator's own machine is not paired by itself: `node serve` is what others may use.
        self._desk = Desk(
            home,
            Party(name, self._trust.credentials.certificate),
            host,
            0 if port == 0 else PAIRING_PORT,
            tell=tell,
            changed=self._advertise_pairing,
            hosts=lambda: _outside(self.info()),
        )
        self._advertising: set[asyncio.Task[None]] = set()
        self._failing: set[str] = set()
        self._since = int(time.time())
        self.stopped = asyncio.Event()
        self.port = 0
        self.remark = ""

    @property
    def host(self) -> str:
        """Where programs of this machine reach it, without the port."""
        return "127.0.0.1" if self._host == EVERYWHERE else self._host

    @property
    def address(self) -> str:
        """Where programs of this machine reach it."""
        return f"{self.host}:{self.port}"

    @property
    def relay(self) -> Relay:
        """Carries groups, those of workers that are not its own too."""
        return self._relay

    @property
    def trouble(self) -> str:
        """Why it is not advertised, or ""."""
        return self._advert.trouble if self._advert is not None else ""

    @property
    def invitation(self) -> Happening | None:
        """How it can be paired now; None when it cannot."""
        return self._desk.invitation()

    async def _pair(self) -> OpenCode:
        if self._advert is None:
            raise UserError(f"{self.name} serves a coordinator; run `node serve` to be paired")
        return await self._desk.new_code()

    async def _diagnose(self, wanted: Wanted, caller: IPv4Address | None) -> Diagnosis:
        advertised = self._advert is not None
        serving = await serving_now(self.port, self._relay.port, self.host, advertised=advertised, remark=self.remark)
        info = dataclasses.replace(self.info(), busy=self._service.busy)
        allowed, refused = await asyncio.to_thread(permitted, wanted.reach, caller, info.interfaces)
        found = await examine(self._home, info, serving, dataclasses.replace(wanted, reach=allowed))
        return dataclasses.replace(found, reached=(*found.reached, *refused))

    def _advertise_pairing(self) -> None:
        if self._advert is not None:
            task = asyncio.create_task(self._try("pairing on the network", self._advert.offer(self._desk.entries)))
            self._advertising.add(task)
            task.add_done_callback(self._advertising.discard)

    def info(self) -> NodeInfo:
        """The node as it is now, without who has it."""
        return NodeInfo(
            id=self._identity.id,
            home=self._identity.home,
            name=self.name,
            protocol=rpc.PROTOCOL,
            version=metadata.version("mlx-tandem"),
            relay_port=self._relay.port,
            paused=self._owner.paused,
            waits_for=self._owner.waits_for_mains(self._condition.battery) or self._owner.waits_for,
            max_memory_bytes=self._owner.max_memory_bytes,
            load=load_per_core(),
            takes_jobs=self._takes_jobs,
            on_battery=self._condition.battery,
            memory_pressure=self._condition.memory,
            thermal_pressure=self._condition.thermal,
            since=self._since,
            **self._machine,
        )

    async def start(self) -> None:
        """Serve."""
        await asyncio.to_thread(check_host, self._host)
        if self._advert is not None:
            self._take_name()
        await asyncio.gather(asyncio.to_thread(_tidy), self._look(), self._look_at_power())
        await self._listen()
        self._relay.start()
        if self._advert is not None:
            record = RunningNode(self.name, self._identity.id, self.port, os.getpid(), self.host)
            write_text_atomically(self._record, json.dumps(dataclasses.asdict(record)))
            self._recorded = True
            log.info("%s serves on %s, relay on port %d", self.name, self.address, self._relay.port)
            await self._desk.start(self._token)
            await self._advert.start(self.info(), self.port, self._desk.entries)
        self._refreshing = asyncio.create_task(self._keep_fresh())
        self._watching = asyncio.create_task(self._trust.watch())

    async def _listen(self) -> None:
        server = rpc.new_server(self._trust)
        node_pb2_grpc.add_NodeServicer_to_server(self._service, server)
        node_pb2_grpc.add_FilesServicer_to_server(FileService(self._store, model_for=self._service.model_for), server)
        answers = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(answers, server)
        self.port = await self._bind(server)
        await server.start()
        await answers.set("", health_pb2.HealthCheckResponse.SERVING)
        self._server = server

    @property
    def busy(self) -> bool:
        """Whether it works on a job."""
        return self._service.busy is not None

    async def leave(self) -> None:
        """Hand over the job at hand, then let ``stopped`` be seen."""
        log.info("%s leaves", self.name)
        try:
            await self._service.leave(HANDING_OVER_SECONDS)
        finally:
            self.stopped.set()

    async def _bind(self, server: grpc.aio.Server) -> int:
        """Have the server listen; its port.

        Raises:
            UserError: it cannot, on the port that was asked for.
        """
        wanted = DEFAULT_PORT if self._wanted_port is None else self._wanted_port
        # Asked first: grpc would write of it, too.
        if not taken_port(self._host, wanted):
            with contextlib.suppress(RuntimeError):  # somebody was faster
                return rpc.listen(server, f"{self._host}:{wanted}", self._trust)
        who = await self._who_has(wanted)
        if self._wanted_port is not None:
            raise UserError(f"--port {wanted}: {who} listens there; take another port, or --port 0 for any")
        port = rpc.listen(server, f"{self._host}:0", self._trust)
        self.remark = f"port {wanted} is taken, {who} listens there: it is {port} until this node starts again"
        return port

    async def stop(self) -> None:
        """Withdraw the advert, end the job at hand, and stop. May be called twice."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
            self._refreshing = None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        if self._advert is not None:
            await self._desk.stop()
            await asyncio.gather(*self._advertising, return_exceptions=True)
            await self._advert.stop()
        if self._recorded:
            self._recorded = False
            self._record.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(LEAVING_SECONDS if self._advert is not None else 0)
            await self._service.settle()
            await asyncio.to_thread(self._relay.stop)
        self.stopped.set()

    async def _end(self) -> None:
        self._leaving = asyncio.create_task(self.leave())

    def _take_name(self) -> None:
        """Hold this name's lock for as long as the process lives: a pid in a file may be anybody's by now."""
        make_private_folder(self._record.parent)
        handle = os.open(self._record.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            pids = [str(node.pid) for node in running_nodes(self._home) if node.id == self._identity.id]
            who = f"process {pids[0]}" if pids else "another process"
            raise UserError(
                f"--name {self.name}: {who} serves under this name already; stop it or take another"
            ) from None
        self._lock = handle

    async def _who_has(self, port: int) -> str:
        """Words for who listens on a port: the name of the node, if it is one."""
        client = NodeClient(f"{self.host}:{port}")
        try:
            return f"the node {(await client.describe(2.0)).name}"
        except (NodeError, TandemError):
            return "another program"
        finally:
            await client.close()

    async def _look(self) -> None:
        def look() -> dict[str, Any]:
            return {
                "facts": facts(),
                "interfaces": tuple(item for item in links.interfaces() if self._host in (EVERYWHERE, item.address)),
                "rdma": links.rdma_devices(),
                "store_bytes": self._store.size,
            }

        self._machine = await asyncio.to_thread(look)

    async def _look_at_power(self) -> None:
        self._condition = self._watch.saw(await asyncio.to_thread(self._look_at_condition))
        self._service.is_now(self._condition)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            await self._try("power and pressure", self._look_at_power())
            await self._try("hardware and store", self._look())
            if self._advert is not None:
                await self._try("who may be paired", self._desk.look())
                await self._try("the advert on the network", self._advert.update(self.info()))

    async def _try(self, what: str, work: Awaitable[None]) -> None:
        """Do what is done again anyway: if it fails, what was known holds till then. The first failure is logged."""
        try:
            await work
        except (OSError, TandemError) as error:
            if what not in self._failing:
                log.warning("%s cannot be brought up to date now: %s", what, one_line(error))
            self._failing.add(what)
        else:
            self._failing.discard(what)


def _tidy() -> None:
    """Put away what killed processes left behind, and what was kept long enough; a full disk stops no node."""
    with contextlib.suppress(OSError):
        tidy_jobs()
        holds().expire()


def _bind_problem(host: str, port: int) -> int:
    """Why nobody can listen there, as an errno; 0 when one can."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            return error.errno or errno.EADDRNOTAVAIL
    return 0


def check_host(host: str) -> None:
    """Refuse what is no address of this machine.

    Raises:
        UserError: it is none.
    """
    try:
        address = ipaddress.IPv4Address(host)
        # Which a socket can be bound to, and nobody can connect to.
        ours = not (address.is_multicast or address.is_reserved) and _bind_problem(host, 0) != errno.EADDRNOTAVAIL
    except ValueError:
        ours = False
    if not ours:
        own = ", ".join(item.address for item in links.interfaces())
        raise UserError(f"--host {host}: no IPv4 address of this machine; it has {own}; {EVERYWHERE} is all of them")


def taken_port(host: str, port: int) -> bool:
    """Whether another program listens there.

    Raises:
        UserError: nobody may.
    """
    problem = _bind_problem(host, port)
    if problem not in (0, errno.EADDRINUSE):
        raise UserError(f"--port {port}: {os.strerror(problem)}; take another port, or --port 0 for any")
    return problem != 0


def check_place(host: str, port: int | None) -> None:
    """Refuse where this machine cannot serve; a port that is taken may be free when it is to serve.

    Args:
        host: as ``Daemon`` takes it.
        port: likewise.

    Raises:
        UserError: the host is not this machine, or the port may not be listened on.
    """
    check_host(host)
    taken_port(host, DEFAULT_PORT if port is None else port)


def _allow_connections() -> None:
    """Have room for all connections that are let in: a terminal of macOS allows its programs 256 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # then it serves with fewer
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(
    name: str | None,
    host: str,
    port: int | None,
    owner: Owner,
    store_limit: int | None,
    say: Callable[[Daemon], None],
    say_leaving: Callable[[], None],
    token: Token | None = None,
    tell: Callable[[Happening], None] = lambda _: None,
) -> None:
    """Serve until Ctrl-C or ``node stop``; a second Ctrl-C leaves at once.

    Args:
        name: of the node; None takes the machine's.
        host: address to serve on, as ``Daemon`` takes it.
        port: likewise.
        owner: what the machine's owner allows.
        store_limit: bytes for the store, or None.
        say: told of the daemon when it serves.
        say_leaving: called when it hands over the job at hand before it ends.
        token: with which it waits to be paired, or None.
        tell: told what happens with its pairing.
    """
    _allow_connections()
    name = name or usable_name(facts().name)
    daemon = Daemon(
        tandem_home(), name, host=host, port=port, owner=owner, store_limit=store_limit, token=token, tell=tell
    )
    loop = asyncio.get_running_loop()

    leaving: asyncio.Task[None] | None = None

    def leave() -> None:
        nonlocal leaving
        if leaving is not None:
            os._exit(130)  # the worker goes with us
        if daemon.busy:
            say_leaving()
        leaving = asyncio.create_task(daemon.leave())

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, leave)
    try:
        await daemon.start()
        say(daemon)
        await daemon.stopped.wait()
    finally:
        await daemon.stop()


def greeting(daemon: Daemon) -> str:
    """What a person is told when a node serves."""
    info = daemon.info()
    where = ", ".join(f"{address}:{daemon.port}" for address in _outside(info)) or daemon.address
    trouble = f"; not advertised: {daemon.trouble}" if daemon.trouble else ""
    remark = f"\n{daemon.remark}" if daemon.remark else ""
    return f"{describe(info.facts)}\nserving as {daemon.name} on {where}{trouble}; Ctrl-C stops{remark}"


def _outside(info: NodeInfo) -> list[str]:
    """Addresses for other machines: those that ``TANDEM_BONJOUR`` lists, where it lists some."""
    found = [item.address for item in info.interfaces if item.kind != "loopback"]
    try:
        wanted = wanted_interfaces()
    except BonjourOff:
        return found  # then others give them by hand
    return [address for address in found if address in wanted] if isinstance(wanted, list) else found
