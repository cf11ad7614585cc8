from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from node import pull
from node.errors import NodeError, NodeLost, TandemError
from node.info import Manifest, StoredFile
from node.manifest import digest
from node.pull import Puller, from_hub
from node.store import NoRoom, Store
from tests.fixtures.stores import described, model_folder

PART = 1 << 18


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(pull, "AGAIN_SECONDS", 0.01)


class Holder:
    """A source in this process: files of a folder, and what goes wrong."""

    def __init__(self, folder: Path, *, most: int | None = None, wrong: bool = False, lacks: bool = False) -> None:
        self._contents = {file.sha256: (folder / file.name).read_bytes() for file in described(folder).files}
        self._most = most
        self._wrong = wrong
        self._lacks = lacks
        self.sent = 0
        self.go = asyncio.Event()
        self.go.set()

    async def fetch(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        if self._lacks:
            raise NodeError("has no such file")
        content = self._contents[sha256]
        while offset < len(content):
            await self.go.wait()
            data = content[offset : offset + PART]
            if self._most is not None and self.sent + len(data) > self._most:
                raise NodeLost("went away")
            self.sent += len(data)
            offset += len(data)
            yield b"\0" * len(data) if self._wrong else data

    async def close(self) -> None:
        pass


def no_hub(manifest: Manifest, file: StoredFile) -> Path:
    raise TandemError("no Hub here")


async def get(puller: Puller, manifest: Manifest, *sources: str) -> list[pull.Pulled]:
    return [state async for state in puller.pull(manifest, sources)]


def test_a_model_arrives_and_progress_ends_with_its_digest(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest, holder = described(folder), Holder(folder)
        states = await get(Puller(store, lambda address: holder, no_hub), manifest, "a:1")
        assert states[-1] == pull.Pulled(manifest.size, manifest.size, "a:1", digest(manifest))
        assert store.folder_of(digest(manifest)) is not None
        assert holder.sent == manifest.size
        # All is here: nobody is asked.
        assert (await get(Puller(store, lambda address: holder, no_hub), manifest))[-1].digest
        assert holder.sent == manifest.size

    asyncio.run(main())


def test_the_next_source_goes_on_where_one_stopped(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest = described(folder)
        holders = {"a": Holder(folder, lacks=True), "b": Holder(folder, most=1_000_000), "c": Holder(folder)}
        await get(Puller(store, holders.__getitem__, no_hub), manifest, "a", "b", "c")
        assert holders["b"].sent > 500_000
        assert holders["b"].sent + holders["c"].sent == manifest.size

    asyncio.run(main())


def test_a_source_that_gives_something_else_is_not_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest = described(folder)
        holders = {"a": Holder(folder, wrong=True), "b": Holder(folder)}
        await get(Puller(store, holders.__getitem__, no_hub), manifest, "a", "b")
        assert holders["a"].sent <= manifest.size
        assert store.folder_of(digest(manifest)) is not None
        other = Store(tmp_path / "other")
        with pytest.raises(TandemError, match=r"nobody gives config.json of some/model: .*damaged.*no Hub here"):
            await get(Puller(other, holders.__getitem__, no_hub), manifest, "a")

    asyncio.run(main())


class BentOnce(Holder):
    """What it sends arrives damaged, the first time."""

    async def fetch(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        try:
            async for data in super().fetch(sha256, offset):
                yield data
        finally:
            self._wrong = False


def test_what_is_damaged_on_its_way_is_asked_for_once_more_where_nobody_else_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest, holder = described(folder), BentOnce(folder, wrong=True)
        await get(Puller(store, lambda address: holder, no_hub), manifest, "a")
        assert store.folder_of(digest(manifest)) is not None

    asyncio.run(main())


def test_a_damaged_rest_of_an_earlier_transfer_is_nobodys_fault(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m", sizes=(1_000_000,)), Store(tmp_path / "store")
        manifest, holder = described(folder), Holder(folder)
        weights = manifest.files[1]
        arriving = store.begin(weights)
        assert arriving is not None
        arriving.write(b"x" * 1000)
        arriving.close()
        await get(Puller(store, lambda address: holder, no_hub), manifest, "a")
        assert store.folder_of(digest(manifest)) is not None

    asyncio.run(main())


def test_when_nobody_gives_it_each_reason_is_named_and_what_came_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m", sizes=(2_000_000,)), Store(tmp_path / "store")
        manifest = described(folder)
        puller = Puller(store, lambda address: Holder(folder, most=1_000_000), no_hub)
        with pytest.raises(TandemError, match=r"nobody gives model-.*: went away; no Hub here"):
            await get(puller, manifest, "a")
        assert not puller.expects(manifest.files[1].sha256)
        before = sum(path.stat().st_size for path in store.folder.glob("partial/*"))
        assert before > 500_000
        whole = Holder(folder)
        await get(Puller(store, lambda address: whole, no_hub), manifest, "a")
        assert whole.sent <= manifest.size - before

    asyncio.run(main())


def test_two_who_want_the_same_share_one_transfer_and_either_may_leave(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest, holder = described(folder), Holder(folder)
        puller = Puller(store, lambda address: holder, no_hub)
        holder.go.clear()
        async with aclosing(puller.pull(manifest, ["a"])) as leaving:
            assert not (await anext(leaving)).digest
            second = asyncio.create_task(get(puller, manifest, "b"))
            await asyncio.sleep(0)
        assert puller.expects(manifest.files[0].sha256)
        holder.go.set()
        assert (await second)[-1].digest == digest(manifest)
        assert holder.sent == manifest.size

    asyncio.run(main())


def test_a_transfer_that_nobody_wants_any_more_stops_and_is_taken_up_later(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest, holder = described(folder), Holder(folder)
        puller = Puller(store, lambda address: holder, no_hub)
        async with aclosing(puller.pull(manifest, ["a"])) as states:
            async for _ in states:
                break
        assert not puller.expects(manifest.files[0].sha256)
        assert not any(store.is_arriving(file.sha256) for file in manifest.files)
        assert (await get(puller, manifest, "a"))[-1].digest
        assert holder.sent <= manifest.size + PART

    asyncio.run(main())


def test_two_processes_of_one_home_receive_a_file_once(tmp_path: Path) -> None:
    async def main() -> None:
        folder = model_folder(tmp_path / "m")
        manifest, holder = described(folder), Holder(folder)
        # Two stores over one folder know no more of each other than two processes do.
        pullers = [Puller(Store(tmp_path / "store"), lambda address: holder, no_hub) for _ in range(2)]
        done = await asyncio.gather(*(get(puller, manifest, "a") for puller in pullers))
        assert [states[-1].digest for states in done] == [digest(manifest)] * 2
        assert holder.sent == manifest.size

    asyncio.run(main())


def test_a_model_that_does_not_fit_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store", 1_000_000)
        manifest, holder = described(folder), Holder(folder)
        with pytest.raises(NoRoom, match="the store's limit"):
            await get(Puller(store, lambda address: holder, no_hub), manifest, "a")
        assert holder.sent == 0

    asyncio.run(main())


def test_the_hub_is_the_last_resort_and_its_files_are_verified_and_used_in_place(tmp_path: Path) -> None:
    async def main() -> None:
        folder, store = model_folder(tmp_path / "m"), Store(tmp_path / "store")
        manifest = described(folder)
        puller = Puller(store, lambda address: Holder(folder, most=1_000_000), lambda _, file: folder / file.name)
        await get(puller, manifest, "a")
        found = store.folder_of(digest(manifest))
        assert found is not None
        assert any((found / file.name).resolve() == (folder / file.name).resolve() for file in manifest.files)
        assert not any(store.folder.glob("partial/*"))
        other = model_folder(tmp_path / "other", seed=7)
        with pytest.raises(TandemError, match=r"the Hub's model-.* is another one"):
            await get(Puller(Store(tmp_path / "b"), Holder, lambda _, file: other / file.name), manifest)  # type: ignore[arg-type]

    asyncio.run(main())


def test_models_that_are_not_from_the_hub_are_not_asked_for_there() -> None:
    file = StoredFile("config.json", "a" * 64, 2)
    for manifest in (
        Manifest("/a/folder", "", (file,)),
        Manifest("/a/folder", "abc", (file,)),
        Manifest("a/b", "", ()),
    ):
        with pytest.raises(TandemError, match="not from the Hub"):
            from_hub(manifest, file)


def test_a_hub_that_cannot_be_reached_is_said() -> None:
    file = StoredFile("config.json", "a" * 64, 2)
    with pytest.raises(TandemError, match="the Hub: "):
        from_hub(Manifest("org/name", "0" * 40, (file,)), file)


def test_a_file_comes_from_a_hub_without_a_token(tmp_path: Path) -> None:
    seen: list[str | None] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            content = b'{"model_type": "llama"}'
            self.send_response(200)
            self.send_header("ETag", '"0123456789012345678901234567890123456789"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = Thread(target=server.serve_forever)
    thread.start()
    code = (
        "from node.pull import from_hub; from node.info import *\n"
        "file = StoredFile('config.json', 'a' * 64, 23)\n"
        "print(from_hub(Manifest('org/name', '0' * 40, (file,)), file).read_text())"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.stdout.strip() == '{"model_type": "llama"}', done.stderr
    assert seen
    assert not any(seen)
