"""How our programs talk: versions, limits, deadlines, channel options, and the words for what goes wrong."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any, get_args

import grpc
import grpc.aio

from node import wire
from node.copies import StateCopy
from node.doctor.finding import Diagnosis, Finding, Outcome, Reached, Verdict
from node.errors import NodeError, NodeLost, NodeRefused, one_line
from node.events import Condition
from node.guard import Guard
from node.hardware import Facts
from node.home import home
from node.identity import credentials, server_name
from node.info import PROTOCOL as PROTOCOL  # noqa: PLC0414 - for users of this module
from node.info import Battery, Busy, Interface, Manifest, MemoryLevel, NodeInfo, RdmaDevice, StoredFile, ThermalLevel
from node.peers import home_of
from node.trust import Trust
from tandem.v1 import node_pb2

MAX_MESSAGE_BYTES = 64 << 20
_NOT_LET_IN = "failed to connect to all addresses", "Socket closed"
"""What gRPC says of a server that ends the connection as soon as it has seen our certificate."""
MOST_STREAMS = 64
"""Calls of one connection at the same time; further ones wait."""
PART_BYTES = 1 << 20
"""Data of one FilePart."""
CALL_SECONDS = 5.0
"""For calls that are answered from memory."""
HANDSHAKE_SECONDS = 5.0
EXCHANGE_SECONDS = 0.05
"""Far more than gRPC needs from its question to its use of the answer, and far less than a person notices."""
MOST_CONNECTIONS = 256
"""To one server, of friends and strangers."""
KEEPALIVE_SECONDS = 5.0
KEEPALIVE_TIMEOUT_SECONDS = 10.0

_VERDICTS: dict[str, Verdict] = {word: word for word in get_args(Verdict)}
_OUTCOMES: dict[str, Outcome] = {word: word for word in get_args(Outcome)}

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_SECONDS * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_SECONDS * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2000),
    # A machine that was busy, or slept, reads pings in a bunch: that is no flood.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    # Who connects and says nothing.
    ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
    ("grpc.max_allowed_incoming_connections", MOST_CONNECTIONS),
    ("grpc.max_concurrent_streams", MOST_STREAMS),
]


def open_channel(address: str, certificate: bytes | None = None) -> grpc.aio.Channel:
    """A channel to a node; connects when it is first used, and to nobody but the node of this certificate.

    Args:
        address: ``host:port``.
        certificate: of the other ``TANDEM_HOME``, in PEM; None for our own.

    Raises:
        UserError: that is no certificate of ours.
        TandemError: our own key cannot be read.
    """
    ours = credentials(home())
    theirs = ours.certificate if certificate is None else certificate
    secured = grpc.ssl_channel_credentials(theirs, ours.key, ours.certificate)
    name = server_name(home_of(theirs))
    # A proxy for the web is no way to a machine in the next room.
    options = [*OPTIONS, ("grpc.enable_http_proxy", 0), ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, secured, options=options)


def new_server(trust: Trust) -> grpc.aio.Server:
    """A server whose services only trusted machines reach; ``listen`` gives it a port.

    Args:
        trust: who is; within a running loop.
    """
    return grpc.aio.server(options=SERVER_OPTIONS, interceptors=[Guard(trust)])


def listen(server: grpc.aio.Server, address: str, trust: Trust) -> int:
    """Have a server listen at an address, for machines that are trusted when they connect; the port.

    Raises:
        RuntimeError: the port is taken.
    """
    roots = _Roots(trust)
    secured = grpc.dynamic_ssl_server_credentials(roots.first(), roots.changed, require_client_authentication=True)
    port: int = server.add_secure_port(address, secured)
    return port


class _Roots:
    """Tells gRPC whom to let in, asked by each connection that begins, in threads of gRPC's own.

    gRPC (1.85) exchanges its state when it is given a new one, without a lock: a connection that takes the state at
    that moment takes what is being released, and the process ends. (600 connections at once, each given a new one: it
    ended every time.) So nothing is given that is not new; and while something is, every other connection waits, before
    until those that were asked are past that point, and after until the exchange is over. Nothing tells when.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._given = trust.certificates()
        self._lock = threading.Lock()
        self._settled = 0.0

    def first(self) -> Any:
        """What it begins with."""
        ours = self._trust.credentials
        roots = b"\n".join(self._given)
        return grpc.ssl_server_certificate_configuration([(ours.key, ours.certificate)], root_certificates=roots)

    def changed(self) -> Any:
        """What is new; None while nothing is."""
        with self._lock:
            time.sleep(max(0.0, self._settled - time.monotonic()))
            now = self._trust.certificates()
            if now == self._given:
                return None
            self._given = now
            time.sleep(EXCHANGE_SECONDS)
            self._settled = time.monotonic() + EXCHANGE_SECONDS
            return self.first()


def error_of(error: grpc.aio.AioRpcError, who: str) -> NodeError:
    """What a failed call means, in words; ``who`` names the other machine."""
    code, details = error.code(), " ".join((error.details() or "").split())
    if code == grpc.StatusCode.UNAUTHENTICATED or (_NOT_LET_IN[0] in details and _NOT_LET_IN[1] in details):
        return NodeRefused("unpaired", f"{who} does not know this machine (any more): pair the two again")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return NodeRefused("unpaired", f"another machine answers where {who} should be")
        return NodeLost(f"{who} cannot be reached: {details}" if details else f"{who} cannot be reached")
    if code == grpc.StatusCode.INTERNAL:
        # No server of ours says so: it is what the library says of a stream that broke.
        return NodeLost(f"the connection to {who} broke")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return NodeLost(f"{who} did not answer in time")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return NodeError(f"{who} runs another version of mlx-tandem")
    return NodeError(f"{who}: {details or one_line(error)}")


def encode_info(info: NodeInfo) -> node_pb2.NodeInfo:
    """A node's description as a message; what is unknown is left out."""
    message = node_pb2.NodeInfo()
    for field in dataclasses.fields(info):
        value = getattr(info, field.name)
        if field.name == "facts":
            known = {name: item for name, item in dataclasses.asdict(value).items() if item is not None}
            message.machine.MergeFrom(node_pb2.Machine(**known))
        elif field.name in ("interfaces", "rdma"):
            for item in value:
                wire.fill(item, getattr(message, field.name).add())
        elif field.name == "busy":
            if value is not None:
                wire.fill(value, message.busy)
        else:
            setattr(message, field.name, value)
    return message


def decode_info(message: node_pb2.NodeInfo) -> NodeInfo:
    """A node's description from a message.

    Raises:
        WireError: a value that is refused.
    """
    machine: dict[str, Any] = {
        field.name: getattr(message.machine, field.name) or None for field in dataclasses.fields(Facts)
    }
    machine["python"] = machine["python"] or "unknown"
    plain = {
        field.name: getattr(message, field.name)
        for field in dataclasses.fields(NodeInfo)
        if field.name not in ("facts", "interfaces", "rdma", "busy")
    }
    condition = decode_condition(message)
    plain |= {
        "on_battery": condition.battery,
        "memory_pressure": condition.memory,
        "thermal_pressure": condition.thermal,
    }
    return NodeInfo(
        **plain,
        facts=Facts(**machine),
        interfaces=tuple(wire.read(Interface, item) for item in message.interfaces),
        rdma=tuple(wire.read(RdmaDevice, item) for item in message.rdma),
        busy=wire.read(Busy, message.busy) if message.HasField("busy") else None,
    )


def encode_condition(condition: Condition) -> node_pb2.Condition:
    """How a machine is, as a message."""
    return node_pb2.Condition(
        memory_pressure=condition.memory, thermal_pressure=condition.thermal, on_battery=condition.battery
    )


def decode_condition(message: node_pb2.Condition | node_pb2.NodeInfo) -> Condition:
    """How a machine is, from a message that tells it; what this version has no name for is unknown."""
    return Condition(
        _one_of(MemoryLevel, message.memory_pressure),
        _one_of(ThermalLevel, message.thermal_pressure),
        _one_of(Battery, message.on_battery),
    )


def encode_diagnosis(diagnosis: Diagnosis) -> node_pb2.DiagnoseReply:
    """What a machine has found out about itself, as a message."""
    reply = node_pb2.DiagnoseReply(
        info=encode_info(diagnosis.info),
        heard=diagnosis.heard,
        bonjour=diagnosis.bonjour,
        received=diagnosis.received,
        replied=diagnosis.replied,
    )
    for finding in diagnosis.findings:
        wire.fill(finding, reply.findings.add())
    for item in diagnosis.reached:
        wire.fill(item, reply.reached.add())
    return reply


def decode_diagnosis(message: node_pb2.DiagnoseReply) -> Diagnosis:
    """What a machine has found out about itself; verdicts that this version has no name for are unknown.

    Raises:
        WireError: a value that is refused.
    """
    findings = [
        Finding(item.check, _VERDICTS.get(item.verdict, "unknown"), item.seen, item.mend) for item in message.findings
    ]
    reached = [Reached(item.address, _OUTCOMES.get(item.outcome, "failed"), item.reason) for item in message.reached]
    return Diagnosis(
        decode_info(message.info),
        tuple(findings),
        tuple(reached),
        tuple(message.heard),
        message.bonjour,
        message.received,
        message.replied,
    )


def _one_of(kind: Any, word: str) -> Any:
    """One of the words of a Literal, whose first is for all others."""
    words = get_args(kind)
    return word if word in words else words[0]


def encode_file(file: StoredFile) -> node_pb2.FileInfo:
    """A file's description as a message."""
    return node_pb2.FileInfo(folder=file.folder, name=file.name, sha256=file.sha256, size=file.size)


def decode_file(message: node_pb2.FileInfo) -> StoredFile:
    """A file's description from a message."""
    return StoredFile(message.name, message.sha256, message.size, message.folder)


def encode_manifest(manifest: Manifest) -> node_pb2.Manifest:
    """A model's files as a message."""
    files = [encode_file(file) for file in manifest.files]
    return node_pb2.Manifest(name=manifest.name, revision=manifest.revision, files=files)


def decode_manifest(message: node_pb2.Manifest) -> Manifest:
    """A model's files from a message."""
    return Manifest(message.name, message.revision, tuple(decode_file(file) for file in message.files))


def encode_held(copy: StateCopy | None) -> node_pb2.HeldState:
    """What is held of a run as a message."""
    if copy is None:
        return node_pb2.HeldState()
    return node_pb2.HeldState(
        found=True,
        step=copy.step,
        weights=encode_file(copy.weights),
        optimizer=encode_file(copy.optimizer),
        written=copy.written,
        steps=copy.steps,
    )


def decode_held(message: node_pb2.HeldState) -> StateCopy | None:
    """What is held of a run from a message."""
    if not message.found:
        return None
    files = decode_file(message.weights), decode_file(message.optimizer)
    return StateCopy(message.step, *files, message.written, tuple(message.steps))
