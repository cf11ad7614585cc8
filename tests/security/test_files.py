"""Names, links and sizes that would lead a node, or a coordinator, where it should not go."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from node import room, rpc, service
from node.client import NodeClient, RemoteWorker
from node.errors import NodeError, NodeRefused, TandemError, UserError
from node.files import sha256_of
from node.info import Manifest, StoredFile
from node.manifest import MOST_FILES, check_files
from node.sizes import show_size
from node.spec import FileRef
from node.store import Absent, Store
from tandem.v1 import node_pb2, node_pb2_grpc
from tests.fixtures.models import tiny_model
from tests.node.test_service import Node, run, serving

SHA = "0" * 64
TRICKS = {
    "up": "../secret",
    "far up": "../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "backslash": "..\\secret",
    "dots": "..",
    "dot": ".",
    "nothing": "",
    "nul": "a\0b",
    "newline": "a\nb",
    "an escape": "a\x1b[2Jb",
    "right to left": "a\u202egnp.b",
    "zero width": "a\u200bb",
    "very long": "a" * 201,
    "very long in bytes": "é" * 101,
}
"""Names that no file of a job has."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.mark.parametrize("name", TRICKS.values(), ids=TRICKS)
def test_no_reference_has_such_a_name(name: str) -> None:
    with pytest.raises(TandemError, match="no name of a file in the job's folder"):
        FileRef(name, SHA, 1)


@pytest.mark.parametrize("name", [*TRICKS.values(), ".hidden"], ids=[*TRICKS, "hidden"])
def test_no_manifest_has_such_a_name(name: str) -> None:
    name = name + "a" * 60 if len(name) > 100 else name  # a model's names may be a little longer
    with pytest.raises(UserError, match="no bare file name"):
        check_files((StoredFile(name, SHA, 1),))


def test_limits_of_a_manifest() -> None:
    for size in (-1, (1 << 46) + 1, (1 << 63) - 1):
        with pytest.raises(UserError, match=f"a size of {size} bytes"):
            check_files((StoredFile("a", SHA, size),))
        with pytest.raises(TandemError, match=f"a size of {size} bytes"):
            FileRef("a", SHA, size)
    with pytest.raises(UserError, match="more than a model has"):
        check_files(tuple(StoredFile(f"{number}", SHA, 1) for number in range(MOST_FILES + 1)))
    with pytest.raises(UserError, match="stands twice"):  # the same file to a Mac
        check_files((StoredFile("config.json", SHA, 1), StoredFile("CONFIG.json", SHA, 1)))


async def put(node: NodeClient, link: RemoteWorker, name: str, size: int, *parts: bytes, sha256: str = SHA) -> Any:
    """What a coordinator would do that checks nothing itself."""
    file = node_pb2.FileInfo(name=name, sha256=sha256, size=size)

    async def sent() -> AsyncIterator[node_pb2.FilePart]:
        for number, part in enumerate(parts):
            yield node_pb2.FilePart(job=link.job, file=file, data=part) if not number else node_pb2.FilePart(data=part)

    return await node._node.PutFile(sent(), timeout=30)


async def refused(call: Any) -> str:
    """The words of a refusal; anything else fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.DATA_LOSS,
    )
    words = caught.value.details() or ""
    assert "\n" not in words
    return words


def test_what_a_node_takes_and_gives(tmp_path: Path, model: Path, tandem_home: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")

    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            link = await client.open_worker("../../etc", "anna\x1b[2J\n" + "x" * 1000)
            (folder,) = (tandem_home / "jobs").iterdir()
            assert folder.parent == tandem_home / "jobs", "the run's name leads nowhere"
            # Names.
            for name in TRICKS.values():
                assert "no name of a file" in await refused(put(client, link, name, 1, b"x"))
                wanted = node_pb2.FileWanted(job=link.job, name=name)
                assert "no name of a file" in await refused(anext(aiter(client._node.GetFile(wanted)), None))
            for name in ("worker.log", "WORKER.LOG", "reducer.log", "fused"):
                assert "keeps for itself" in await refused(put(client, link, name, 1, b"x"))
            for inner in ("..", "/etc", "fused/..", ".", "jobs"):
                listed = node_pb2.FolderWanted(job=link.job, folder=inner)
                assert "has no folder" in await refused(client._node.ListFiles(listed))
            for job in ("", "..", "another", f"../jobs/{link.job}"):
                wanted = node_pb2.FileWanted(job=job, name="worker.log")
                assert "does not work on that job" in await refused(anext(aiter(client._node.GetFile(wanted)), None))
            for held in ("..", "../jobs", "", "a/b", "x" * 65):
                wanted = node_pb2.FileWanted(job="no", held_run=held, name="state.json")
                await refused(anext(aiter(client._node.GetFile(wanted)), None))
            # Sizes.
            for size in (-1, 1 << 62, (1 << 63) - 1):
                assert f"a size of {size} bytes" in await refused(put(client, link, "a", size, b"x"))
            assert "are free on that disk" in await refused(put(client, link, "a", 1 << 38, b"x"))
            assert "512 GB are the most" in await refused(put(client, link, "a", (512 << 30) + 1, b"x"))
            for parts in ((b"xxxx",), (b"x", b"x", b"xx"), (b"x" * (3 << 20), b"x")):
                size = sum(map(len, parts)) - 1
                assert "is longer than was said" in await refused(put(client, link, "a", size, *parts))
            assert "did not arrive as it was sent" in await refused(put(client, link, "a", 9, b"xxx"))
            assert not [path for path in folder.iterdir() if path.name != "worker.log"], "nothing half is left"
            # Links out of the job's folder, as code of a model might make them.
            (folder / "link").symlink_to(secret)
            (folder / "fused").symlink_to(tmp_path)
            os.mkfifo(folder / "pipe")
            for inner, name in (("", "link"), ("fused", "secret")):
                wanted = node_pb2.FileWanted(job=link.job, folder=inner, name=name)
                assert "leads out of the job's folder" in await refused(
                    anext(aiter(client._node.GetFile(wanted)), None)
                )
            wanted = node_pb2.FileWanted(job=link.job, name="pipe")
            assert "no ordinary file" in await refused(anext(aiter(client._node.GetFile(wanted)), None))
            listed = node_pb2.FolderWanted(job=link.job, folder="fused")
            assert "leads out" in await refused(client._node.ListFiles(listed))
            listed = node_pb2.FolderWanted(job=link.job)
            names = {file.name for file in (await client._node.ListFiles(listed)).files}
            assert names == {"worker.log"}
            source = tmp_path / "other"
            source.write_text("other")
            await link.give(FileRef("link", sha256_of(source), 5), source)
            assert secret.read_text() == "a secret"
            assert (folder / "link").read_text() == "other"
            wanted = node_pb2.FileWanted(job=link.job, name="link", offset=-1)
            assert "has no byte -1" in await refused(anext(aiter(client._node.GetFile(wanted)), None))
            await link.close()

    run(work)


def test_how_many_files_a_job_may_have(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MOST_JOB_FILES", 4)
    monkeypatch.setattr(room, "MOST_JOB_BYTES", 1000)
    source = tmp_path / "source"
    source.write_bytes(b"x" * 300)

    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            link = await client.open_worker("run", "anna")

            async def give(name: str) -> None:
                await link.give(FileRef(name, sha256_of(source), 300), source)

            await give("1")
            await give("2")
            await give("3")
            for _ in range(3):
                await give("3")  # again: it takes no more than before
            with pytest.raises(NodeError, match="the job's folder has 4 files; 4 are the most"):
                await give("4")
            monkeypatch.setattr(room, "MOST_JOB_FILES", 9)
            with pytest.raises(NodeError, match=r"4 .*the job's folder holds .* are the most"):
                await give("4")
            await link.close()

    run(work)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"MOST_JOB_FILES": 4}, "the job's folder has 4 files; 4 are the most"),
        ({"MOST_JOB_BYTES": 1000}, f"the job's folder holds {show_size(900)}"),
        ({"free": 1100}, "are kept free"),
    ],
    ids=["files", "bytes", "disk"],
)
def test_files_that_arrive_at_the_same_time_take_no_more_than_one_after_the_other(
    limits: dict[str, int], words: str, tmp_path: Path, model: Path, tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 300 bytes have room, beside the worker's log, in each case."""
    free = limits.pop("free", 1 << 40) + room.RESERVE_BYTES
    monkeypatch.setattr(room, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free)))
    for name, limit in limits.items():
        monkeypatch.setattr(room, name, limit)
    content = b"x" * 300
    sha256 = hashlib.sha256(content).hexdigest()

    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            link = await client.open_worker("run", "anna")
            (folder,) = (tandem_home / "jobs").iterdir()
            go = asyncio.Event()

            async def give(name: str, sha256: str = sha256) -> None:
                async def sent() -> AsyncIterator[node_pb2.FilePart]:
                    yield node_pb2.FilePart(
                        job=link.job, file=node_pb2.FileInfo(name=name, sha256=sha256, size=300), data=content[:1]
                    )
                    await go.wait()
                    yield node_pb2.FilePart(data=content[1:])

                await client._node.PutFile(sent(), timeout=30)

            async def those_that_end(tasks: set[asyncio.Task[None]], count: int) -> set[asyncio.Task[None]]:
                async with asyncio.timeout(20):
                    while len(done := {task for task in tasks if task.done()}) < count:
                        await asyncio.wait(tasks - done, return_when=asyncio.FIRST_COMPLETED)
                return done

            # Of another content than was said: in the end nothing of them is there, and their room is free again.
            bent = {asyncio.create_task(give(f"bent{number}", SHA)) for number in range(8)}
            for task in await those_that_end(bent, 5):
                assert words in await refused(task)
            go.set()
            ends = await asyncio.gather(*bent, return_exceptions=True)
            assert sum("did not arrive as it was sent" in str(end) for end in ends) == 3
            go.clear()
            tasks = {asyncio.create_task(give(f"file{number}")) for number in range(8)}
            for task in await those_that_end(tasks, 5):
                assert words in await refused(task)
            assert len(list(folder.glob(".file*"))) == 3
            go.set()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert ends.count(None) == 3
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            assert sorted(sizes.values()) == [0, 300, 300, 300]
            assert "worker.log" in sizes
            await link.close()

    run(work)


def test_files_that_replace_one_another_at_the_same_time_are_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MOST_JOB_BYTES", 1000)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(bytes(300))
    had = room.Room(tmp_path)
    with had.reserved(FileRef("a", SHA, 400)):
        for name in ("a", "b", "d"):
            with pytest.raises(UserError, match="are the most"), had.reserved(FileRef(name, SHA, 400)):
                pass
    with had.reserved(FileRef("b", SHA, 400)):
        pass


def test_the_line_at_a_node_has_an_end(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_WAITING", 2)

    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            first = await client.open_worker("run", "anna")
            heard = [asyncio.Event(), asyncio.Event()]
            waiting = [
                asyncio.create_task(
                    client.open_worker(f"run{number}", "ben", wait=True, on_queue=lambda *_, event=event: event.set())
                )
                for number, event in enumerate(heard)
            ]
            await asyncio.gather(*(event.wait() for event in heard))
            with pytest.raises(NodeRefused, match="is busy, and 2 others stand in line; try again later"):
                await client.open_worker("run9", "eve", wait=True)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await first.close()

    run(work)


@pytest.mark.parametrize("what", ["blob", "partial", "hub"])
def test_a_store_neither_gives_nor_writes_through_links(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    sha256 = sha256_of(secret)
    os.utime(secret, ns=(946_684_800 * 10**9, 946_684_800 * 10**9))  # the time that the store gives what it verified
    store = Store(tmp_path / "store")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    place = {
        "blob": store.folder / "blobs" / sha256,
        "partial": store.folder / "partial" / sha256,
        "hub": tmp_path / "hub" / "models--a" / "blobs" / sha256,
    }[what]
    place.parent.mkdir(parents=True)
    place.symlink_to(secret)
    assert store.locate(sha256) is None
    with pytest.raises((Absent, OSError)):
        store.open_for_reading(sha256)
    if what == "partial":
        with pytest.raises(TandemError):
            store.begin(StoredFile("a", sha256, 8))
    else:
        arriving = store.begin(StoredFile("a", sha256, 8))
        assert arriving is not None
        arriving.write(b"x")
        arriving.discard()
    assert secret.read_text() == "a secret"
    assert secret.stat().st_mode & 0o777 != 0o444


def test_a_pull_cannot_name_what_is_no_model(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        node = Node(tmp_path / "home", model)
        from node.file_service import FileService

        server = rpc.new_server(node.trust)
        node_pb2_grpc.add_FilesServicer_to_server(FileService(node.store), server)
        port = rpc.listen(server, "127.0.0.1:0", node.trust)
        await server.start()
        client = NodeClient(f"127.0.0.1:{port}")
        try:
            for file, words in (
                (StoredFile("../../x", SHA, 1), "no bare file name"),
                (StoredFile("a", "../../x", 1), "no SHA-256"),
                (StoredFile("a", SHA.replace("0", "A"), 1), "no SHA-256"),
                (StoredFile("a", SHA, -1), "a size of -1 bytes"),
                (StoredFile("a", SHA, 1 << 45), "no room for a model"),
            ):
                with pytest.raises(NodeError, match=words):
                    await client.pull(Manifest("m", "", (file,)), ["127.0.0.1:1"], lambda done, total: None)
            many = tuple(StoredFile(str(number), SHA, 1) for number in range(MOST_FILES + 1))
            with pytest.raises(NodeError, match="more than a model has"):
                await client.pull(Manifest("m", "", many), [], lambda done, total: None)
            for sha256 in ("../manifests/x", "", "/etc/passwd", SHA + "0"):
                request = node_pb2.FetchRequest(sha256=sha256)
                assert "named by its SHA-256" in await refused(anext(aiter(client._files.Fetch(request)), None))
        finally:
            await client.close()
            await server.stop(0)

    run(work)
