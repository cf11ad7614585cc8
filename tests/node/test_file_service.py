from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from node import file_service, rpc
from node.client import NodeClient
from node.errors import NodeError, NodeLost
from node.file_service import FileService, RemoteStore
from node.info import Manifest, StoredFile
from node.manifest import digest
from node.rpc import PART_BYTES
from node.store import Store
from tandem.v1 import node_pb2, node_pb2_grpc
from tests.fixtures.stores import CountingService, described, model_folder, serving_files

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def holding(tmp_path: Path, sizes: tuple[int, ...] = (5 * MEGABYTE, 2_000_000)) -> tuple[Store, Manifest]:
    """A store with a model in it."""
    folder = model_folder(tmp_path / "model", sizes=sizes)
    store, manifest = Store(tmp_path / "holder"), described(folder)
    store.adopt(manifest, folder)
    return store, manifest


def silent(done: int, total: int) -> None:
    pass


async def until(condition: object) -> None:
    """Let the others go on until something has happened."""
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def test_missing_files_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path)
        other = StoredFile("x", "0" * 64, 5)
        async with serving_files(FileService(store)) as client:
            assert await client.missing([*manifest.files, other]) == (other,)
            with pytest.raises(NodeError, match="no bare file name"):
                await client.missing([StoredFile("../x", "0" * 64, 5)])

    asyncio.run(main())


def test_files_come_in_parts_from_any_offset(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path)
        file = manifest.files[1]
        content = (tmp_path / "model" / file.name).read_bytes()
        async with serving_files(FileService(store)) as client:
            remote = RemoteStore(client.address)
            for offset in (0, 3, 4 * MEGABYTE, file.size):
                parts = [data async for data in remote.fetch(file.sha256, offset)]
                assert b"".join(parts) == content[offset:]
                assert all(len(data) <= PART_BYTES for data in parts)
            await remote.close()

    asyncio.run(main())


def test_files_that_nobody_has_and_names_that_mean_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_service, "GRACE_SECONDS", 0.0)

    async def main() -> None:
        store, _ = holding(tmp_path, (10,))
        async with serving_files(FileService(store)) as client:
            remote = RemoteStore(client.address)
            for sha256, words in (("0" * 64, "no file 000000000000"), ("../../etc/passwd", "SHA-256")):
                with pytest.raises(NodeError, match=words):
                    _ = [data async for data in remote.fetch(sha256, 0)]
            await remote.close()
            bad = Manifest("m", "", (StoredFile("a/../b", "0" * 64, 5),))
            with pytest.raises(NodeError, match="no bare file name"):
                await client.pull(bad, [], silent)
            async with rpc.open_channel(client.address) as channel:
                many = node_pb2.PullRequest(sources=["a:1"] * 1000)
                with pytest.raises(grpc.aio.AioRpcError, match="more files or sources"):
                    _ = [state async for state in node_pb2_grpc.FilesStub(channel).Pull(many)]

    asyncio.run(main())


def test_a_file_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    store, _ = holding(tmp_path, (10,))

    async def main() -> None:
        service = FileService(store)
        reading = file_service._Reading(store, service._puller, "0" * 64, 5, 1.0)
        path = tmp_path / "short"
        path.write_bytes(b"123")
        reading._open = lambda: (os.open(path, os.O_RDONLY), 10)  # type: ignore[method-assign]
        with pytest.raises(OSError, match="shorter"):
            _ = [part async for part in reading.parts()]

    asyncio.run(main())


def test_a_chain_of_nodes_takes_each_byte_from_the_source_once(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path, (8 * MEGABYTE, 3 * MEGABYTE))
        async with AsyncExitStack() as stack:
            source = CountingService(store)
            services = [CountingService(Store(tmp_path / f"s{i}")) for i in range(3)]
            first = await stack.enter_async_context(serving_files(source))
            clients = [await stack.enter_async_context(serving_files(service)) for service in services]
            sources = [first.address]
            pulls = []
            for client in clients:
                pulls.append(client.pull(manifest, list(sources), silent))
                sources.insert(0, client.address)
            # The last of the chain asks first: it waits until those before it have begun.
            done = await asyncio.gather(*reversed(pulls))
            assert done == [digest(manifest)] * 3
            assert source.sent == manifest.size
            assert [service.sent for service in services] == [manifest.size, manifest.size, 0]
            for index in range(3):
                assert Store(tmp_path / f"s{index}").folder_of(digest(manifest)) is not None

    asyncio.run(main())


def test_a_node_gives_a_file_while_it_still_receives_it(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path, (8 * MEGABYTE,))
        async with AsyncExitStack() as stack:
            source, middle = CountingService(store), CountingService(Store(tmp_path / "middle"))
            first = await stack.enter_async_context(serving_files(source))
            second = await stack.enter_async_context(serving_files(middle))
            last = await stack.enter_async_context(serving_files(FileService(Store(tmp_path / "last"))))
            # The source stops in the middle of the weights.
            await until_stopped(source, 4 * MEGABYTE, second, manifest, first.address)
            pulls = asyncio.gather(
                second.pull(manifest, [first.address], silent),
                last.pull(manifest, [second.address, first.address], silent),
            )
            await until(lambda: middle.sent > 3 * MEGABYTE)
            assert source.sent < manifest.size
            source.held.set()
            assert await pulls == [digest(manifest)] * 2
            assert source.sent == manifest.size

    async def until_stopped(
        source: CountingService, sent: int, client: NodeClient, manifest: Manifest, address: str
    ) -> None:
        """A first transfer that brings so much, then is given up by its asker; the next ones find the source held."""
        source._bytes_per_second = 64 * MEGABYTE
        task = asyncio.create_task(client.pull(manifest, [address], silent))
        await until(lambda: source.sent >= sent)
        source.held.clear()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_who_loses_its_source_goes_on_at_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path, (8 * MEGABYTE,))
        async with AsyncExitStack() as stack:
            breaking, whole = CountingService(store, most=4 * MEGABYTE), CountingService(store)
            first = await stack.enter_async_context(serving_files(breaking))
            second = await stack.enter_async_context(serving_files(whole))
            puller = await stack.enter_async_context(serving_files(FileService(Store(tmp_path / "s"))))
            assert await puller.pull(manifest, ["127.0.0.1:1", first.address, second.address], silent)
            assert breaking.sent > MEGABYTE
            assert breaking.sent + whole.sent == manifest.size

    asyncio.run(main())


def test_a_source_that_falls_silent_is_left_and_the_chain_behind_it_waits(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path, (4 * MEGABYTE,))
        async with AsyncExitStack() as stack:
            frozen, whole = CountingService(store), CountingService(store)
            frozen.held.clear()
            middle = CountingService(Store(tmp_path / "middle"), stall_seconds=0.5)
            last = CountingService(Store(tmp_path / "last"), stall_seconds=5)
            first = await stack.enter_async_context(serving_files(frozen))
            second = await stack.enter_async_context(serving_files(whole))
            third = await stack.enter_async_context(serving_files(middle))
            fourth = await stack.enter_async_context(serving_files(last))
            done = await asyncio.gather(
                third.pull(manifest, [first.address, second.address], silent),
                fourth.pull(manifest, [third.address, first.address], silent),
            )
            frozen.held.set()
            assert done == [digest(manifest)] * 2
            assert whole.sent == middle.sent == manifest.size

    asyncio.run(main())


def test_two_nodes_told_to_wait_for_each_other_do_not_wait_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path, (2 * MEGABYTE,))
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(serving_files(FileService(store)))
            one = FileService(Store(tmp_path / "one"), patience_seconds=0.3)
            two = FileService(Store(tmp_path / "two"), patience_seconds=0.3)
            left = await stack.enter_async_context(serving_files(one))
            right = await stack.enter_async_context(serving_files(two))
            done = await asyncio.gather(
                left.pull(manifest, [right.address, first.address], silent),
                right.pull(manifest, [left.address, first.address], silent),
            )
            assert done == [digest(manifest)] * 2

    asyncio.run(main())


def test_two_coordinators_share_a_transfer(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path)
        source = CountingService(store)
        async with serving_files(source) as first, serving_files(FileService(Store(tmp_path / "s"))) as client:
            seen: list[tuple[int, int]] = []
            pulls = [client.pull(manifest, [first.address], lambda done, total: seen.append((done, total)))]
            pulls.append(client.pull(manifest, [first.address], silent))
            assert await asyncio.gather(*pulls) == [digest(manifest)] * 2
            assert source.sent == manifest.size
            assert seen[-1] == (manifest.size, manifest.size)
            assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    asyncio.run(main())


def test_what_another_process_of_the_home_receives_is_given_as_it_arrives(tmp_path: Path) -> None:
    async def main() -> None:
        content = os.urandom(3 * MEGABYTE)
        folder = tmp_path / "m"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        (file,) = described(folder).files
        arriving = Store(tmp_path / "s").begin(file)
        assert arriving is not None
        arriving.write(content[:MEGABYTE])
        async with serving_files(FileService(Store(tmp_path / "s"))) as client:
            remote = RemoteStore(client.address)
            got = b""
            async for data in remote.fetch(file.sha256, 0):
                if not got:
                    arriving.write(content[MEGABYTE:])
                    arriving.finish()
                got += data
            assert got == content
            await remote.close()

    asyncio.run(main())


def test_what_stops_arriving_breaks_off(tmp_path: Path) -> None:
    async def main() -> None:
        file = StoredFile("x", "a" * 64, 3 * MEGABYTE)
        arriving = Store(tmp_path / "s").begin(file)
        assert arriving is not None
        arriving.write(b"x" * MEGABYTE)
        async with serving_files(FileService(Store(tmp_path / "s"))) as client:
            remote = RemoteStore(client.address)
            with pytest.raises(NodeLost, match="stopped arriving"):  # noqa: PT012 - it is the loop that raises
                async for _ in remote.fetch(file.sha256, 0):
                    arriving.close()
            await remote.close()

    asyncio.run(main())


def test_no_room_is_one_clear_line(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path)
        full = Store(tmp_path / "s", free_bytes=lambda folder: 1000)
        async with serving_files(FileService(store)) as first, serving_files(FileService(full)) as client:
            with pytest.raises(NodeError, match=r"no room for a model in .*7 MB more needed, 0 MB free.*store prune"):
                await client.pull(manifest, [first.address], silent)

    asyncio.run(main())


PULLING = """
import asyncio, sys
from pathlib import Path
from node.file_service import FileService
from node.store import Store
from tests.fixtures.stores import serving_files

async def main():
    async with serving_files(FileService(Store(Path(sys.argv[1])))) as client:
        print(client.address, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_killed_node_resumes_without_receiving_a_chunk_twice(tmp_path: Path) -> None:
    async def main() -> None:
        store, manifest = holding(tmp_path, (24 * MEGABYTE,))
        source = CountingService(store, bytes_per_second=24 * MEGABYTE)
        async with serving_files(source) as first:
            process = subprocess.Popen(
                [sys.executable, "-c", PULLING, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            address = (await asyncio.to_thread(process.stdout.readline)).strip()
            client = NodeClient(address)
            task = asyncio.create_task(client.pull(manifest, [first.address], silent))
            await until(lambda: source.sent > 8 * MEGABYTE)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with pytest.raises(NodeError):
                await task
            await client.close()
            kept = sum(path.stat().st_size for path in (tmp_path / "s" / "partial").iterdir())
            assert kept > 4 * MEGABYTE
            here = kept + sum(path.stat().st_size for path in (tmp_path / "s" / "blobs").glob("*"))
            source.fetched.clear()
            source.sent = 0
            async with serving_files(FileService(Store(tmp_path / "s"))) as again:
                assert await again.pull(manifest, [first.address], silent) == digest(manifest)
            assert source.sent == manifest.size - here
            assert (manifest.files[1].sha256, kept) in source.fetched

    asyncio.run(main())
