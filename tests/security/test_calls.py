"""Who is let in by gRPC, and for how long: a real node, and callers of every kind."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from node import file_service, rpc
from node.client import NodeClient
from node.daemon import Daemon
from node.errors import NodeError, NodeRefused, TandemError
from node.identity import Credentials, credentials, server_name
from node.manifest import digest
from node.peers import Peers
from node.store import Store
from node.trust import Trust
from tandem.v1 import node_pb2, node_pb2_grpc
from tests.fixtures.pairs import pair
from tests.fixtures.stores import CountingService, described, model_folder, serving_files

SECONDS = 10.0
OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
"""Of HTTP/2: its preface and an empty SETTINGS frame."""
ASKING = b"\0\0\5\0\1\0\0\0\1\0\0\0\0\0"
"""A DATA frame that ends stream 1: an empty message."""


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[Daemon]:
    node = Daemon(home, "Studio", host="127.0.0.1", advertise=False)
    await node.start()
    try:
        yield node
    finally:
        await node.stop()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(limited())


@asynccontextmanager
async def calling(node: Daemon, ours: Credentials, theirs: Credentials) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of another home than the test's own."""
    secured = grpc.ssl_channel_credentials(theirs.certificate, ours.key, ours.certificate)
    options = [("grpc.ssl_target_name_override", server_name(theirs.home))]
    async with grpc.aio.secure_channel(node.address, secured, options=options) as channel:
        yield channel


async def to_its_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def describe(channel: grpc.aio.Channel) -> node_pb2.NodeInfo:
    stub = node_pb2_grpc.NodeStub(channel)
    info: node_pb2.NodeInfo = await stub.Describe(node_pb2.DescribeRequest(protocol=rpc.PROTOCOL), timeout=SECONDS)
    return info


def test_a_paired_machine_is_served_and_a_stranger_is_told_nothing(tmp_path: Path, tandem_home: Path) -> None:
    home, stranger = tmp_path / "home", credentials(tmp_path / "stranger")
    pair(home, tandem_home)

    async def work() -> None:
        async with serving(home) as node:
            theirs = credentials(home)
            client = NodeClient(node.address, "Studio", theirs.certificate)
            assert (await client.describe()).home == theirs.home
            # It may train, but it is not the owner.
            with pytest.raises(NodeError, match="only programs of this TANDEM_HOME"):
                await client.control("pause", (home / "identity" / "secret").read_text())
            await client.close()
            async with calling(node, stranger, theirs) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await describe(channel)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
                assert "Studio" not in str(refused.value.details())
                assert isinstance(rpc.error_of(refused.value, "Studio"), NodeRefused)
            async with grpc.aio.insecure_channel(node.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await describe(channel)

    run(work)


def test_another_certificate_at_the_address_is_not_talked_to(tmp_path: Path, tandem_home: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    pair(home, tandem_home)
    pair(other, tandem_home)

    async def work() -> None:
        async with serving(home) as node:
            client = NodeClient(node.address, "Other", credentials(other).certificate)
            with pytest.raises(NodeRefused, match="another machine answers where Other should be"):
                await client.describe()
            await client.close()

    run(work)


def test_a_certificate_that_says_it_is_somebody_elses_is_refused(tmp_path: Path, tandem_home: Path) -> None:
    """Of the certificate only what it is counts: its name, issuer and dates are whatever its maker likes."""
    home, paired = tmp_path / "home", tmp_path / "paired"
    pair(home, paired)
    forged = credentials(tmp_path / "stranger")
    # The name of the paired one under a key of its own.
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from node.identity import self_signed

    key = serialization.load_pem_private_key(forged.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    certificate = self_signed(key, credentials(paired).home)
    forged = Credentials(credentials(paired).home, certificate, forged.key, Path(), Path())

    async def work() -> None:
        async with serving(home) as node, calling(node, forged, credentials(home)) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await describe(channel)

    run(work)


def test_a_revoked_machine_is_cut_off_at_once_and_stays_out(tmp_path: Path, tandem_home: Path) -> None:
    home, paired, spared = tmp_path / "home", credentials(tmp_path / "paired"), credentials(tmp_path / "spared")
    pair(home, tmp_path / "paired")
    pair(home, tmp_path / "spared")

    async def work() -> None:
        async with (
            serving(home) as node,
            calling(node, paired, credentials(home)) as channel,
            calling(node, spared, credentials(home)) as other,
        ):
            call = node_pb2_grpc.NodeStub(channel).Work()
            await call.write(node_pb2.WorkRequest(open=node_pb2.Open(run="r", owner="o", protocol=rpc.PROTOCOL)))
            assert (await call.read()).WhichOneof("body") == "opened"
            assert (await describe(other)).busy.run == "r"
            Peers(home).remove(paired.home)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await to_its_end(call)
            # Its connection is open still; nothing comes of it.
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                await describe(channel)
            while (await describe(other)).HasField("busy"):
                await asyncio.sleep(0.05)
            async with calling(node, paired, credentials(home)) as again:
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await describe(again)

    run(work)


def test_who_was_introduced_gets_the_models_files_until_the_job_ends(tmp_path: Path, tandem_home: Path) -> None:
    home, guest = tmp_path / "home", credentials(tmp_path / "guest")
    pair(home, tandem_home)

    async def work() -> None:
        async with serving(home) as node:
            client = NodeClient(node.address, "Studio", credentials(home).certificate)
            link = await client.open_worker("run", "anna")
            with pytest.raises(TandemError, match="no certificate"):
                await client.introduce(link.job, [b"nonsense"], "")
            with pytest.raises(TandemError, match="does not work on that job"):
                await client.introduce("another", [guest.certificate], "")
            with pytest.raises(TandemError, match="named by its SHA-256"):
                await client.introduce(link.job, [guest.certificate], "../manifests/x")
            await client.introduce(link.job, [guest.certificate], "")
            async with calling(node, guest, credentials(home)) as channel:
                with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
                    await fetched(channel, "0" * 64)
                calls: list[Callable[[], Awaitable[object]]] = [
                    lambda: describe(channel),
                    lambda: node_pb2_grpc.FilesStub(channel).Missing(node_pb2.FileList(), timeout=SECONDS),
                    lambda: node_pb2_grpc.NodeStub(channel).Held(node_pb2.HeldWanted(run="r"), timeout=SECONDS),
                    lambda: node_pb2_grpc.NodeStub(channel).Diagnose(node_pb2.DiagnoseRequest(), timeout=SECONDS),
                    lambda: node_pb2_grpc.NodeStub(channel).ListFiles(
                        node_pb2.FolderWanted(job=link.job), timeout=SECONDS
                    ),
                ]
                for call in calls:
                    with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
                        await call()
                await link.close()
                with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                    await describe(channel)
            await client.close()

    run(work)


async def fetched(channel: grpc.aio.Channel, sha256: str) -> bytes:
    """A file of a node's store."""
    call = node_pb2_grpc.FilesStub(channel).Fetch(node_pb2.FetchRequest(sha256=sha256), timeout=SECONDS)
    return b"".join([part.data async for part in call])


async def refusal(channel: grpc.aio.Channel, sha256: str) -> str:
    """What is said to who may not have a file; anything else fails."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await fetched(channel, sha256)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    return refused.value.details() or ""


def test_who_was_introduced_gets_files_of_the_jobs_model_and_no_others(
    tmp_path: Path, tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, guest = tmp_path / "home", credentials(tmp_path / "guest")
    pair(home, tandem_home)
    monkeypatch.setattr(file_service, "GRACE_SECONDS", 0.2)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    store, models = Store(home / "store"), []
    for seed, name in enumerate(("model", "another")):
        models.append(described(model_folder(tmp_path / name, sizes=(50_000,), seed=seed)))
        store.adopt(models[-1], tmp_path / name)
    wanted, other = (next(file for file in model.files if file.size == 50_000) for model in models)
    cached = hashlib.sha256(b"a private model").hexdigest()
    blobs = tmp_path / "hub" / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / cached).write_bytes(b"a private model")

    async def work() -> None:
        async with serving(home) as node:
            client = NodeClient(node.address, "Studio", credentials(home).certificate)
            link = await client.open_worker("run", "anna")
            await client.introduce(link.job, [guest.certificate], digest(models[0]))
            async with calling(node, guest, credentials(home)) as channel:
                for file in models[0].files:
                    assert await fetched(channel, file.sha256) == (tmp_path / "model" / file.name).read_bytes()
                # It cannot be told from the words whether a file is there.
                absent = await refusal(channel, "0" * 64)
                assert {await refusal(channel, sha256) for sha256 in (other.sha256, cached)} == {absent}
                # Nor is anything given of a model that the node does not know, or has not been told.
                for manifest in ("0" * 64, ""):
                    await client.introduce(link.job, [guest.certificate], manifest)
                    assert {await refusal(channel, file.sha256) for file in (wanted, other)} == {absent}
                # The paired may have all.
                assert len(await fetched(client._channel, other.sha256)) == other.size
                assert await fetched(client._channel, cached) == b"a private model"
                await link.close()
            await client.close()

    run(work)


@pytest.mark.parametrize("first", ["asked", "pulled"])
def test_who_was_introduced_gets_the_jobs_model_while_it_arrives(
    first: str, tmp_path: Path, tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, guest = tmp_path / "home", credentials(tmp_path / "guest")
    pair(home, tandem_home)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    manifest = described(model_folder(tmp_path / "model", sizes=(3 << 20,)))
    source = Store(tandem_home / "store")
    source.adopt(manifest, tmp_path / "model")
    large = max(manifest.files, key=lambda file: file.size)
    content = (tmp_path / "model" / large.name).read_bytes()

    async def work() -> None:
        giver = CountingService(source)
        async with serving_files(giver) as theirs, serving(home) as node:
            giver.held.clear()
            client = NodeClient(node.address, "Studio", credentials(home).certificate)
            link = await client.open_worker("run", "anna")
            await client.introduce(link.job, [guest.certificate], digest(manifest))
            async with calling(node, guest, credentials(home)) as channel:
                begun = asyncio.Event()
                # Of a chain, whoever is last may ask first.
                if first == "asked":
                    asking = asyncio.create_task(fetched(channel, large.sha256))
                    await asyncio.wait({asking}, timeout=0.3)
                    assert not asking.done(), "it waits for the transfer to begin"
                pulling = asyncio.create_task(
                    client.pull(
                        manifest, [theirs.address], lambda *_: begun.set(),
                        {theirs.address: credentials(tandem_home).certificate},
                    )
                )  # fmt: skip
                await begun.wait()
                if first == "pulled":
                    asking = asyncio.create_task(fetched(channel, large.sha256))
                await asyncio.wait({asking}, timeout=0.3)
                assert not asking.done(), "nothing has arrived yet"
                giver.held.set()
                assert await asking == content
                assert await pulling == digest(manifest)
                await link.close()
            await client.close()

    run(work)


def test_only_the_coordinator_of_a_job_reaches_its_folder(tmp_path: Path, tandem_home: Path) -> None:
    home, other = tmp_path / "home", credentials(tmp_path / "other")
    pair(home, tandem_home)
    pair(home, tmp_path / "other")

    async def work() -> None:
        async with serving(home) as node, calling(node, other, credentials(home)) as channel:
            client = NodeClient(node.address, "Studio", credentials(home).certificate)
            link = await client.open_worker("run", "anna")
            assert await link.outputs("fused") == ()
            stub = node_pb2_grpc.NodeStub(channel)
            with pytest.raises(grpc.aio.AioRpcError, match="does not work on that job"):
                await stub.ListFiles(node_pb2.FolderWanted(job=link.job, folder="fused"), timeout=SECONDS)
            with pytest.raises(grpc.aio.AioRpcError, match="does not work on that job"):
                await stub.Introduce(node_pb2.Introduction(job=link.job), timeout=SECONDS)
            await link.close()
            await client.close()

    run(work)


def test_an_older_tls_is_refused_even_with_the_right_certificate(tmp_path: Path, tandem_home: Path) -> None:
    home = tmp_path / "home"
    pair(home, tandem_home)
    trust = Trust(tandem_home)

    def request(version: ssl.TLSVersion, port: int) -> bytes:
        """The first frames of a call, by a client that can be told which TLS it speaks."""
        context = trust.context(server=False)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", port), SECONDS) as raw, context.wrap_socket(raw) as end:
            end.sendall(OPENING + headers() + ASKING)
            said = b""
            while b"grpc-status" not in said and (more := end.recv(65536)):
                said += more
            return said

    def headers() -> bytes:
        def literal(name: str, value: str) -> bytes:
            return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

        block = b"".join(
            literal(name, value)
            for name, value in (
                (":method", "POST"),
                (":scheme", "https"),
                (":path", "/tandem.v1.Node/Describe"),
                (":authority", "x"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            )
        )
        return len(block).to_bytes(3, "big") + b"\1\4\0\0\0\1" + block

    async def work() -> None:
        async with serving(home) as node:
            newest = await asyncio.to_thread(request, ssl.TLSVersion.TLSv1_3, node.port)
            assert b"Studio" in newest
            older = await asyncio.to_thread(request, ssl.TLSVersion.TLSv1_2, node.port)
            assert b"Studio" not in older
            assert b"not paired" in older

    run(work)


def test_a_flood_of_connections_that_say_nothing_harms_nobody(tmp_path: Path, tandem_home: Path) -> None:
    """Not even while it changes who is trusted: gRPC as it is would end the process."""
    home, guest = tmp_path / "home", credentials(tmp_path / "guest").certificate
    pair(home, tandem_home)

    def flood(port: int) -> None:
        opened = [socket.create_connection(("127.0.0.1", port), SECONDS) for _ in range(600)]
        for connection in opened:
            connection.close()

    async def work() -> None:
        async with serving(home) as node:
            client = NodeClient(node.address, "Studio", credentials(home).certificate)
            await client.describe()
            flooding = asyncio.gather(*(asyncio.to_thread(flood, node.port) for _ in range(3)))
            changes = 0
            while not flooding.done():
                node._trust.introduce([guest] if changes % 2 else [])
                changes += 1
                await client.describe()
            await flooding
            assert changes
            # Who came meanwhile may have found no room; there is some again.
            for attempt in range(20):
                late = NodeClient(node.address, "Studio", credentials(home).certificate)
                try:
                    await late.describe()
                    break
                except NodeError:
                    assert attempt < 19
                    await asyncio.sleep(0.5)
                finally:
                    await late.close()
            await client.close()

    run(work)
