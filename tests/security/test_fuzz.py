"""A hundred thousand messages that nobody would send, at every port, while a run is under way."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from zeroconf import DNSOutgoing, DNSPointer, DNSService, DNSText, const

from coordinator.discovery import find
from node import rpc
from node.client import NodeClient
from node.identity import credentials, server_name
from node.relay import KIND_ROUTE, preamble
from node.trust import Trust
from tandem.v1 import node_pb2, worker_pb2
from tests.faults.harness import arguments, make_inputs
from tests.fixtures.nodes import ServingNode, serving
from tests.fixtures.pairs import pair
from tests.fixtures.runs import Run, assert_same_losses, losses
from tests.security.mutations import bad_messages

SEED = 20261124
ITERS = 2000
CALLS_AT_ONCE = 32
"""Below ``rpc.MOST_STREAMS``: those that have just ended still count."""
MOST_MORE_BYTES = 25 << 20
"""Of a node's memory: a leak of half a kilobyte a message would be more."""

CALLS: dict[str, tuple[bytes, ...]] = {
    "Node/Describe": (node_pb2.DescribeRequest(protocol=rpc.PROTOCOL).SerializeToString(),),
    "Node/Held": (node_pb2.HeldWanted(run="20261124-101112-abcd").SerializeToString(),),
    "Node/ListFiles": (node_pb2.FolderWanted(job="job-pid1-ab", folder="fused").SerializeToString(),),
    "Node/GetFile": (
        node_pb2.FileWanted(job="job-pid1-ab", folder="fused", name="model.safetensors").SerializeToString(),
        node_pb2.FileWanted(held_run="20261124-101112-abcd", name="x", offset=1 << 40).SerializeToString(),
    ),
    "Node/PutFile": (
        node_pb2.FilePart(
            job="job-pid1-ab", file=node_pb2.FileInfo(name="a.safetensors", sha256="0" * 64, size=9), data=b"some data"
        ).SerializeToString(),
    ),
    "Node/Introduce": (node_pb2.Introduction(job="job-pid1-ab", certificates=[b"-----BEGIN"]).SerializeToString(),),
    "Node/Control": (node_pb2.ControlRequest(action="pause", secret="0" * 64).SerializeToString(),),
    "Node/Work": (
        node_pb2.WorkRequest(
            open=node_pb2.Open(run="run", owner="anna", protocol=rpc.PROTOCOL)
        ).SerializeToString(),
        node_pb2.WorkRequest(
            requests=node_pb2.WorkerRequests(requests=[worker_pb2.Request(generation=1).SerializeToString()])
        ).SerializeToString(),
    ),
    "Files/Missing": (
        node_pb2.FileList(files=[node_pb2.FileInfo(name="config.json", sha256="0" * 64, size=3)]).SerializeToString(),
    ),
    "Files/Fetch": (node_pb2.FetchRequest(sha256="0" * 64, offset=5).SerializeToString(),),
}  # fmt: skip
"""What a paired machine may send. Not the calls that would have a node reach for the addresses in them."""


@dataclass
class Load:
    """What a process holds.

    Attributes:
        bytes: of memory.
        descriptors, threads: how many.
    """

    bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Load:
        """Of this process now."""
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        descriptors, threads = (len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threads)


async def call_wrongly(node: ServingNode, home: Path, count: int, seed: int) -> int:
    """Send so many bad messages as a paired machine; how many calls were answered, with whatever."""
    ours, theirs = credentials(home), credentials(node.home.resolve())
    secured = grpc.ssl_channel_credentials(theirs.certificate, ours.key, ours.certificate)
    options = [("grpc.ssl_target_name_override", server_name(theirs.home))]
    answered = 0
    async with grpc.aio.secure_channel(node.address, secured, options=options) as channel:
        queue: Iterator[tuple[str, bytes]] = (
            (method, message)
            for number, (method, good) in enumerate(CALLS.items())
            for message in bad_messages(SEED + 100 * seed + number, count // len(CALLS), good)
        )

        async def caller() -> None:
            nonlocal answered
            for method, message in queue:

                async def messages(message: bytes = message) -> Iterator[bytes]:  # type: ignore[misc]
                    yield message

                # Strangers fill the port meanwhile: a connection may have to wait for its turn, as everybody's.
                way = channel.stream_stream(f"/tandem.v1.{method}")
                call = way(messages(), timeout=30, wait_for_ready=True)
                try:
                    async for _ in call:
                        pass
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        raise AssertionError(f"{method} was not answered: {message!r}") from error
                answered += 1

        await asyncio.gather(*(caller() for _ in range(CALLS_AT_ONCE)))
    return answered


async def relay_port(node: ServingNode) -> int:
    client = NodeClient(node.address, node.name, node.certificate)
    try:
        return (await client.describe()).relay_port
    finally:
        await client.close()


def write_wrongly(
    port: int, count: int, good: list[bytes], wrap: Callable[[socket.socket], socket.socket], seed: int
) -> None:
    """Connect so many times and say something bad; nothing sensible comes back."""
    for message in bad_messages(SEED + 100_000 * seed + port, count, good):
        try:
            with socket.create_connection(("127.0.0.1", port), 10) as raw, wrap(raw) as end:
                end.settimeout(10)
                end.sendall(message)
                end.shutdown(socket.SHUT_WR)
        except OSError:
            continue  # ended by the other side, as it should be


def client_hello() -> bytes:
    """The first message of TLS, as a real client says it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process holds from /proc")
@pytest.mark.timeout(900)
def test_a_run_is_not_disturbed(tmp_path: Path, tandem_home: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", ITERS)
    with serving(tmp_path, "anna", "ben") as nodes:
        rude = tmp_path / "rude"
        pair(nodes[0].home, rude)
        run = Run(*arguments(inputs, tmp_path / "adapters", nodes, iters=ITERS))
        run.until_step(5)
        node = nodes[0]
        relay = asyncio.run(relay_port(node))
        trust = Trust(rude)

        def encrypted(raw: socket.socket) -> socket.socket:
            return trust.context(server=False, peers=[node.certificate]).wrap_socket(raw)

        asking = preamble(KIND_ROUTE, b"r" * 16)

        def helping(number: int) -> Load:
            """A good half of it all, to every port at once; what the node holds afterwards."""
            others = [
                threading.Thread(target=write_wrongly, args=(port, count, good, wrap, number))
                for port, count, good, wrap in (
                    (node.port, 15_000, [client_hello()], lambda raw: raw),
                    (relay, 1_000, [client_hello(), asking], lambda raw: raw),
                    (relay, 1_000, [asking], encrypted),
                )
            ]
            for thread in others:
                thread.start()
            assert asyncio.run(call_wrongly(node, rude, 30_000, number)) == 30_000
            for thread in others:
                thread.join()
            return Load.of(node.process.pid)

        # The first fills pools and caches; what the second adds would be a leak.
        before, after = helping(1), helping(2)
        print(f"before {before}, after {after}")
        assert after.bytes - before.bytes < MOST_MORE_BYTES
        assert after.descriptors <= before.descriptors + 10
        assert after.threads <= before.threads + 10
        code, errors = run.wait()
        assert code == 0, errors
        assert node.process.poll() is None
    assert_same_losses(losses(tmp_path / "adapters"), inputs.losses, 1e-4)


def adverts() -> list[bytes]:
    """Packets as a node's Bonjour sends them."""
    service, name = "_mlx-tandem._tcp.local.", "Studio 01234567._mlx-tandem._tcp.local."
    made = DNSOutgoing(const._FLAGS_QR_RESPONSE | const._FLAGS_AA)
    text = b"".join(bytes([len(entry)]) + entry for entry in (b"id=abc", b"home=0123", b"name=Studio", b"protocol=1"))
    made.add_answer_at_time(DNSPointer(service, const._TYPE_PTR, const._CLASS_IN, 4500, name), 0)
    made.add_answer_at_time(DNSText(name, const._TYPE_TXT, const._CLASS_IN, 4500, text), 0)
    made.add_answer_at_time(DNSService(name, const._TYPE_SRV, const._CLASS_IN, 120, 0, 0, 9, "studio.local."), 0)
    return made.packets()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("count", [2_000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_bonjour_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Packets of all kinds at whoever looks for nodes; the one node that is there is found."""
    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1")
    fleet = f"fuzz-{random.randrange(1 << 32)}"
    monkeypatch.setenv("TANDEM_FLEET", fleet)
    environment = {"TANDEM_BONJOUR": "127.0.0.1", "TANDEM_FLEET": fleet}
    done = threading.Event()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            end.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            for message in bad_messages(SEED, count, adverts()):
                end.sendto(message, ("224.0.0.251", 5353))
        done.set()

    with serving(tmp_path, "Studio", environment=environment) as (studio,):
        sending = threading.Thread(target=send)
        sending.start()
        while not done.is_set():
            asyncio.run(find(1.0))
        sending.join()
        before = len(os.listdir("/proc/self/fd"))
        found = asyncio.run(find(20.0, patience=20.0))
        assert studio.process.poll() is None
        assert "Studio" in {seen.name for seen in found.nodes if seen.info is not None}
        assert len(os.listdir("/proc/self/fd")) <= before + 2
