"""Get a model's files from other machines, in the order of their preference; from the Hub when none of them can give.

Whoever reads a file here while it arrives is woken by every part of it, so a chain of machines passes a model on at
the speed of its slowest link.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from node import manifest as manifests
from node.errors import NodeError, NodeLost, TandemError, one_line
from node.files import sha256_of
from node.info import Manifest, StoredFile
from node.store import Arriving, NoRoom, Store, WrongDigest

PROGRESS_SECONDS = 0.2
OTHER_PROCESS_SECONDS = 0.1
"""Between two looks at a file that another process writes."""
OTHER_PATIENCE_SECONDS = 60.0
AGAIN_SECONDS = 1.0
"""Before sources that failed are tried once more."""
ROUNDS = 2

_T = TypeVar("_T")


class Source(Protocol):
    """Another machine's store."""

    def fetch(self, sha256: str, offset: int) -> AsyncIterator[bytes]:
        """A file's bytes from an offset on; empty ones say that it waits for them itself.

        Raises:
            NodeLost: it cannot be reached, or sends nothing.
            NodeError: it does not have the file.
        """

    async def close(self) -> None:
        """Close the connection."""


Hub = Callable[[Manifest, StoredFile], Path]
"""Gets one file of a model from the Hub; where it lies then. Raises TandemError."""


@dataclass(frozen=True)
class Pulled:
    """How far a transfer is.

    Attributes:
        bytes: here so far, of all files.
        total: bytes of all files.
        source: where the last ones came from, or "".
        digest: of the manifest, once the model is complete; "" before.
    """

    bytes: int
    total: int
    source: str
    digest: str = ""


class News:
    """Wakes whoever waits for files when something of one has arrived."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """There is something new."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, seconds: float) -> None:
        """Until there is something new, but no longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()


class Puller:
    """Fills a store.

    Args:
        store: to fill.
        connect: opens the store at a ``host:port``.
        hub: the last resort.
    """

    def __init__(self, store: Store, connect: Callable[[str], Source], hub: Hub | None = None) -> None:
        self.news = News()
        self._store = store
        self._connect = connect
        self._hub = hub or from_hub
        self._running: dict[str, _Transfer] = {}

    def expects(self, sha256: str) -> bool:
        """Whether a transfer that runs will bring this file."""
        return any(sha256 in transfer.wanted for transfer in self._running.values())

    def files_of(self, digest: str) -> Set[str] | None:
        """Digests of the files of a model that is on its way here; None when it is not."""
        transfer = self._running.get(digest)
        return transfer.wanted if transfer is not None else None

    async def pull(self, manifest: Manifest, sources: Sequence[str]) -> AsyncGenerator[Pulled, None]:
        """Get a model; those who ask for the same one at the same time share a transfer.

        Args:
            manifest: its files, checked with ``manifest.check_files``.
            sources: ``host:port`` of stores, the preferred ones first.

        Yields:
            How far it is, some times a second; last of all with the digest.

        Raises:
            NoRoom: the disk or the store's limit does not suffice.
            TandemError: no source could give it; what has arrived is kept.
        """
        digest = manifests.digest(manifest)
        transfer = self._running.get(digest)
        if transfer is None:
            transfer = self._running[digest] = _Transfer(self._store, self.news, self._connect, self._hub, manifest)
        transfer.add(sources)
        task = transfer.join()
        try:
            while not task.done():
                yield transfer.state
                await asyncio.wait({task}, timeout=PROGRESS_SECONDS)
            yield Pulled(manifest.size, manifest.size, transfer.state.source, task.result())
        finally:
            if transfer.leave() and self._running.get(digest) is transfer:
                del self._running[digest]
            self.news.tell()
            await transfer.ended()


class _Transfer:
    """One model on its way here."""

    def __init__(
        self, store: Store, news: News, connect: Callable[[str], Source], hub: Hub, manifest: Manifest
    ) -> None:
        self._store = store
        self._news = news
        self._connect = connect
        self._hub = hub
        self._manifest = manifest
        self._files = list({file.sha256: file for file in manifest.files}.values())
        self._sizes = {sha256: count * size for sha256, (count, size) in _counted(manifest).items()}
        self._addresses: list[str] = []
        self._sources: dict[str, Source] = {}
        self._silent: dict[str, str] = {}
        self._task: asyncio.Task[str] | None = None
        self._listeners = 0
        self._done = 0
        self._current: tuple[StoredFile, Arriving | None] | None = None
        self._source = ""
        self.wanted = set(self._sizes)

    @property
    def state(self) -> Pulled:
        """How far it is."""
        arrived = 0
        if self._current is not None:
            file, arriving = self._current
            arrived = arriving.offset if arriving is not None else self._store.partial_size(file.sha256)
        return Pulled(min(self._done + arrived, self._manifest.size), self._manifest.size, self._source)

    def add(self, sources: Sequence[str]) -> None:
        """Further sources, behind those that are known."""
        self._addresses += [address for address in dict.fromkeys(sources) if address not in self._addresses]

    def join(self) -> asyncio.Task[str]:
        """Run for one more; the task gives the manifest's digest."""
        self._listeners += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return self._task

    def leave(self) -> bool:
        """One who joined goes; with the last one the transfer stops. Whether it has ended, or will now."""
        self._listeners -= 1
        if self._task is not None and not self._listeners:
            self._task.cancel()
        return not self._listeners or (self._task is not None and self._task.done())

    async def ended(self) -> None:
        """Wait until it has stopped, if nobody is left to want it."""
        if self._task is not None and not self._listeners:
            await asyncio.wait({self._task})

    async def _run(self) -> str:
        self._store.check_taken(self._manifest)
        digest = await asyncio.to_thread(self._store.save, self._manifest)
        hold = self._store.hold(digest)
        try:
            await asyncio.to_thread(self._store.make_room, self._manifest.files)
            for file in self._files:
                self._current = (file, None)
                await self._get(file)
                self._current = None
                self._done += self._sizes[file.sha256]
            if await asyncio.to_thread(self._store.folder_of, digest) is None:
                raise TandemError(f"files of {self._manifest.name} changed while others arrived; start again")
        finally:
            self._current = None
            if hold is not None:
                hold.close()
            sources, self._sources = self._sources, {}
            await asyncio.gather(*(source.close() for source in sources.values()), return_exceptions=True)
        return digest

    async def _get(self, file: StoredFile) -> None:
        """See that one file is here."""
        # Sources that do not have it, or gave what is wrong.
        useless: dict[str, str] = {}
        doubted = False
        while await asyncio.to_thread(self._store.locate, file.sha256, file.size) is None:
            arriving = self._store.begin(file)
            if arriving is None:
                await self._wait_for_another_process(file)
                continue
            givers: list[str] = []
            try:
                self._current = (file, arriving)
                while await _to_the_end(arriving.resume):
                    pass
                resumed = arriving.offset > 0
                self._news.tell()
                await self._receive(file, arriving, useless, givers)
            except WrongDigest as error:
                # The fault may lie with what an earlier time left, or with one of several sources: once more.
                if not doubted and (resumed or len(givers) > 1):
                    doubted = True
                elif givers:
                    useless.update(dict.fromkeys(givers, str(error)))
                    if self._best(useless) is None and not doubted:
                        # Nobody else has it. What lies between may have bent it, too: once more.
                        doubted = True
                        for giver in givers:
                            useless.pop(giver, None)
                else:
                    raise
            finally:
                self._current = (file, None)
                arriving.close()
                self._news.tell()

    async def _receive(self, file: StoredFile, arriving: Arriving, useless: dict[str, str], givers: list[str]) -> None:
        """Fill one file, from whoever gives it.

        Args:
            file: which.
            arriving: where it goes.
            useless: sources not to ask for it, with reasons; those that do not have it are added.
            givers: sources that gave a part of it are added.
        """
        rounds = 0
        while arriving.offset < file.size:
            address = self._best(useless)
            if address is None and rounds < ROUNDS and self._silent:
                rounds += 1
                await asyncio.sleep(AGAIN_SECONDS)
                self._silent.clear()
                continue
            if address is None:
                await self._from_hub(file, arriving, useless)
                return
            self._source, before = address, arriving.offset
            try:
                await self._copy(address, file, arriving)
            except NodeLost as error:
                self._silent[address] = str(error)
            except NodeError as error:
                useless[address] = str(error)
            if arriving.offset > before:
                rounds = 0
                givers.append(address)
        await _to_the_end(arriving.finish)

    async def _copy(self, address: str, file: StoredFile, arriving: Arriving) -> None:
        """From one source, as far as it goes."""
        if address not in self._sources:
            self._sources[address] = self._connect(address)
        parts: Any = self._sources[address].fetch(file.sha256, arriving.offset)
        async with contextlib.aclosing(parts):
            async for data in parts:
                if data:
                    await _to_the_end(arriving.write, data)
                    self._news.tell()
                if arriving.offset >= file.size:
                    return
        if arriving.offset < file.size:
            raise NodeLost(f"{address} ended {file.name} at {arriving.offset} of {file.size} bytes")

    def _best(self, useless: dict[str, str]) -> str | None:
        able = (address for address in self._addresses if address not in useless and address not in self._silent)
        return next(able, None)

    async def _from_hub(self, file: StoredFile, arriving: Arriving, useless: dict[str, str]) -> None:
        """The last resort; its file is used where the Hub's client keeps it."""
        self._source = "Hub"
        try:
            path = await asyncio.to_thread(self._hub, self._manifest, file)
            if await asyncio.to_thread(sha256_of, path) != file.sha256:
                raise TandemError(f"the Hub's {file.name} is another one")
            await asyncio.to_thread(self._store.adopt_file, file, path)
        except NoRoom:
            raise
        except TandemError as error:
            tried = {**self._silent, **useless}
            reasons = [tried[address] for address in self._addresses if address in tried]
            raise TandemError(
                f"nobody gives {file.name} of {self._manifest.name}: {'; '.join([*reasons, str(error)])}"
            ) from error
        arriving.discard()

    async def _wait_for_another_process(self, file: StoredFile) -> None:
        """Until it has written more of this file, or stops; a model of two manifests counts as another process, too."""
        deadline, before = time.monotonic() + OTHER_PATIENCE_SECONDS, self._store.partial_size(file.sha256)
        await self._news.wait(OTHER_PROCESS_SECONDS)
        while self._store.is_arriving(file.sha256):
            if (now := self._store.partial_size(file.sha256)) != before:
                deadline, before = time.monotonic() + OTHER_PATIENCE_SECONDS, now
            if time.monotonic() > deadline:
                raise TandemError(
                    f"another process has been receiving {file.name} into {self._store.folder} for "
                    f"{OTHER_PATIENCE_SECONDS:.0f} s without progress; end it and start again"
                )
            await self._news.wait(OTHER_PROCESS_SECONDS)


def from_hub(manifest: Manifest, file: StoredFile) -> Path:
    """Get one file of a public model from the Hub into the user's cache there; no token is sent.

    Raises:
        NoRoom: the disk is full.
        TandemError: the model has no place on the Hub, or the Hub cannot be reached.
    """
    if not manifest.revision or re.fullmatch(r"[\w.-]+/[\w.-]+", manifest.name, re.ASCII) is None:
        raise TandemError(f"and {manifest.name} is not from the Hub")
    import huggingface_hub
    from huggingface_hub import errors

    client: Any = errors
    try:
        path = huggingface_hub.hf_hub_download(manifest.name, file.name, revision=manifest.revision, token=False)
    except (OSError, ValueError, client.HTTPError) as error:
        raise TandemError(f"the Hub: {one_line(error)}") from error
    return Path(path)


def _counted(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """How many names each file of a model has, and its size."""
    counted: dict[str, tuple[int, int]] = {}
    for file in manifest.files:
        counted[file.sha256] = (counted.get(file.sha256, (0, 0))[0] + 1, file.size)
    return counted


async def _to_the_end(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a thread; who is cancelled meanwhile still waits for it, as it uses an open file."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
