"""The models of one machine, by what is in them.

    blobs/<sha256>            whole, verified files; their time is a fixed one, so that a later change shows
    partial/<sha256>          files that are arriving; who writes one has it locked
    adopted/<sha256>.json     files of this machine that are used where they are: path, size, time
    manifests/<sha256>.json   models; the file's time is that of the last use, and who uses the model has it locked
    models/<sha256>/          a folder of links for ``mlx_lm``, named as in the manifest

Big files of the user's Hugging Face cache are used where they are too: their names there are their SHA-256. Locks are
``flock``, so programs of one ``TANDEM_HOME`` share a store, and a killed one leaves nothing locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from node import manifest as manifests
from node.errors import TandemError
from node.files import CHUNK_BYTES, make_private_folder, sync_folder, write_text_atomically
from node.info import Manifest, StoredFile
from node.sizes import show_size

LEAST_LIMIT_BYTES = 20 << 30
LEAST_USEFUL_BYTES = 64 << 20
"""A limit below it holds no model."""
RESERVE_BYTES = 256 << 20
"""Of the disk, left to everybody else."""
SYNC_BYTES = 128 << 20
"""Written between two syncs, so that the last one of a large file is short."""
RESUME_BYTES = 64 << 20
"""Read at once of what an interrupted transfer has left."""
_VERIFIED_NS = 946_684_800 * 10**9
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(TandemError):
    """The disk or the store's limit does not suffice; what has arrived is kept."""


class WrongDigest(TandemError):
    """A file that arrived is not what it should be; it was thrown away."""


class Absent(TandemError):
    """The store does not have a file."""


@dataclass(frozen=True)
class StoredModel:
    """A model of the store.

    Attributes:
        digest: SHA-256 of its manifest.
        name, revision: as in the manifest.
        size: bytes of all its files.
        present: bytes of them that are here.
        own: bytes of them that are the store's own, and not files of the user used in place.
        complete: whether it can be loaded.
        in_use: whether a job or a transfer uses it now.
        used: when it was last used, in seconds since 1970.
        folder: to load it from; "" while it is not complete.
    """

    digest: str
    name: str
    revision: str
    size: int
    present: int
    own: int
    complete: bool
    in_use: bool
    used: float
    folder: str


@dataclass(frozen=True)
class Pruned:
    """What was removed: models, bytes, and bytes left."""

    models: tuple[StoredModel, ...]
    freed: int
    left: int


class Hold:
    """A model that is in use: it is not pruned until this is closed, or this process has ended."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def close(self) -> None:
        """Let the model go. May be called twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Arriving:
    """A file that is being written; made by ``Store.begin``. Not for two threads at once.

    Attributes:
        offset: bytes that are here; the next ones belong there.
    """

    def __init__(self, store: Store, file: StoredFile, handle: int, path: Path) -> None:
        self._store = store
        self._file = file
        self._handle: int | None = handle
        self._path = path
        self._hashed = hashlib.sha256()
        self._unsynced = 0
        self.offset = 0

    def resume(self) -> bool:
        """Read on in what an interrupted transfer has left: these bytes need not come again.

        Returns:
            Whether there is more of it; call this until there is not, before the first ``write``.
        """
        handle = self._open()
        if os.fstat(handle).st_size > self._file.size:
            os.ftruncate(handle, 0)
        end = self.offset + RESUME_BYTES
        while self.offset < end:
            chunk = os.pread(handle, CHUNK_BYTES, self.offset)
            if not chunk:
                return False
            self._hashed.update(chunk)
            self.offset += len(chunk)
        return True

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            NoRoom: the disk is full; what was written before stays.
            WrongDigest: these are more bytes than the file has.
        """
        handle = self._open()
        if self.offset + len(data) > self._file.size:
            raise self._refuse("is longer than it should be")
        rest = memoryview(data)
        while rest:
            try:
                count = os.pwrite(handle, rest, self.offset)
            except OSError as error:
                raise self._store.full(error, self._file.size - self.offset) from error
            self._hashed.update(rest[:count])
            self.offset += count
            rest = rest[count:]
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            self._sync(handle)

    def finish(self) -> None:
        """Verify the file and give it its name; it is the store's from now on.

        Raises:
            WrongDigest: it is not what it should be. It is gone, and this is closed.
            NoRoom: the disk is full.
        """
        handle = self._open()
        if self.offset < self._file.size:
            raise ValueError(f"{self._file.name}: finished at {self.offset} of {self._file.size} bytes")
        if self._hashed.hexdigest() != self._file.sha256:
            raise self._refuse(f"should have the SHA-256 {self._file.sha256[:12]}…")
        self._sync(handle)
        os.fchmod(handle, 0o444)
        os.utime(handle, ns=(_VERIFIED_NS, _VERIFIED_NS))
        target = self._store.blob(self._file.sha256)
        make_private_folder(target.parent)
        self._path.replace(target)
        sync_folder(target.parent)
        self.close()

    def discard(self) -> None:
        """Throw away what has arrived, and stop."""
        self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Stop here; what has arrived is kept, and the next who begins goes on from there. May be called twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            self._store.ended(self._file.sha256, self)

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError(f"{self._file.name}: written to after it was closed")
        return self._handle

    def _sync(self, handle: int) -> None:
        try:
            os.fsync(handle)
        except OSError as error:
            raise self._store.full(error, self._file.size - self.offset) from error
        self._unsynced = 0

    def _refuse(self, why: str) -> WrongDigest:
        self.discard()
        return WrongDigest(f"{self._file.name} arrived damaged ({why}) and was thrown away; start the transfer again")


class Store:
    """The store below a folder. Threads and processes may share it.

    Args:
        folder: of the store; made when first written to.
        limit_bytes: of its own files. By default half of what the disk has free for it, but at least 20 GB.
        takes_code: whether models may bring their own Python files from other machines.
        free_bytes: tells the free bytes of the disk that a folder is on.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int | None = None,
        *,
        takes_code: bool = True,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._folder = folder
        self._takes_code = takes_code
        self._limit = limit_bytes
        self._free_bytes = free_bytes or _free_bytes
        self._arriving: dict[str, Arriving] = {}
        self._guard = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the store is."""
        return self._folder

    # Files

    def blob(self, sha256: str) -> Path:
        """Where a file of the store's own is, once it is here."""
        return self._folder / "blobs" / sha256

    def locate(self, sha256: str, size: int | None = None) -> Path | None:
        """A whole file that has not been changed since it was verified; None when there is none.

        Args:
            sha256: of the file.
            size: that it must have; None takes any.
        """
        found, own = self._pointed_to(sha256), self.blob(sha256)
        if found is None:
            kept = _is_unchanged(own, size, _VERIFIED_NS) and not own.is_symlink()
            found = own if kept else _in_hub_cache(sha256)
        return found if found is not None and (size is None or _size(found) == size) else None

    def missing(self, files: Iterable[StoredFile]) -> tuple[StoredFile, ...]:
        """Those files that are not here in full."""
        return tuple(file for file in files if self.locate(file.sha256, file.size) is None)

    def open_for_reading(self, sha256: str) -> tuple[int, int | None]:
        """Open a file that is here, or that is arriving.

        Returns:
            A file descriptor, the caller's to close, and the file's size; None while it is still arriving. What
            arrives later can be read from the same descriptor.

        Raises:
            Absent: it is neither.
        """
        for path in (self.locate(sha256), self._partial(sha256), self.locate(sha256)):
            with contextlib.suppress(FileNotFoundError):
                if path is not None:
                    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    return handle, None if path.parent.name == "partial" else os.fstat(handle).st_size
        raise Absent(f"no file {sha256[:12]}… in {self._folder}")

    def is_arriving(self, sha256: str) -> bool:
        """Whether this process, or another, is writing this file now."""
        if sha256 in self._arriving:
            return True
        try:
            handle = os.open(self._partial(sha256), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _lock(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)

    def partial_size(self, sha256: str) -> int:
        """Bytes that are here of a file that is arriving, or of an interrupted transfer."""
        return _size(self._partial(sha256)) or 0

    def begin(self, file: StoredFile) -> Arriving | None:
        """Begin to write a file, or go on with it: call ``resume`` next. None when it is being written, or is here.

        Raises:
            NoRoom: the disk is full.
        """
        path = self._partial(file.sha256)
        try:
            make_private_folder(path.parent)
            doubtful = self.blob(file.sha256)
            if doubtful.is_symlink():
                doubtful.unlink()  # nothing of ours: its target is not touched
            if doubtful.exists() and self.locate(file.sha256, file.size) is None and not path.exists():
                # Changed since it was verified, or copied here by hand: it is verified again.
                doubtful.chmod(0o644)
                doubtful.replace(path)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise self.full(error, file.size) from error
        if not _lock(handle, fcntl.LOCK_EX) or not _is_same(handle, path):
            os.close(handle)
            return None
        if self.locate(file.sha256, file.size) is not None:  # another process has just finished it
            path.unlink(missing_ok=True)
            os.close(handle)
            return None
        arriving = Arriving(self, file, handle, path)
        with self._guard:
            self._arriving[file.sha256] = arriving
        return arriving

    def ended(self, sha256: str, arriving: Arriving) -> None:
        """Forget a file that is written no more."""
        with self._guard:
            if self._arriving.get(sha256) is arriving:
                del self._arriving[sha256]

    def full(self, error: OSError, needed: int) -> TandemError:
        """What an error of writing means, in words."""
        if error.errno not in _FULL:
            return TandemError(f"{self._folder}: {error.strerror}")
        return NoRoom(
            f"no room for a model in {self._folder}: {show_size(needed)} more needed, "
            f"{show_size(self._free_bytes(self._folder))} free; free some space or run: node store prune "
            "(what has arrived is kept)"
        )

    # Models

    def save(self, manifest: Manifest) -> str:
        """Remember a model; its digest. What is here of its files is not thrown away as nobody's any more."""
        digest = manifests.digest(manifest)
        path = self._manifest_path(digest)
        if not path.exists():
            make_private_folder(path.parent)
            write_text_atomically(path, manifests.to_json(manifest))
        return digest

    def adopt(self, manifest: Manifest, folder: Path) -> str:
        """Use a model's files where they are; nothing is copied.

        Args:
            manifest: of the folder, as ``manifest_of`` has just made it.
            folder: of the model.

        Returns:
            The manifest's digest.

        Raises:
            TandemError: a file is not what the manifest says.
        """
        digest = self.save(manifest)  # first, or a pruning in between would take the files for nobody's
        for file in manifest.files:
            self.adopt_file(file, folder / file.name)
        return digest

    def adopt_file(self, file: StoredFile, path: Path) -> None:
        """Use one file where it is; its digest is the caller's word.

        Raises:
            TandemError: it is not there, or has another size.
        """
        real = path.resolve()
        try:
            state = real.stat()
        except OSError as error:
            raise TandemError(f"{path}: {error.strerror}") from error
        if state.st_size != file.size:
            raise TandemError(f"{path}: {state.st_size} bytes instead of {file.size}; it has changed, start again")
        pointer = {"path": str(real), "size": state.st_size, "mtime_ns": state.st_mtime_ns}
        make_private_folder(self._pointer(file.sha256).parent)
        write_text_atomically(self._pointer(file.sha256), json.dumps(pointer))

    def manifest(self, digest: str) -> Manifest | None:
        """A model that the store knows, complete or not."""
        try:
            return manifests.from_json(self._manifest_path(digest).read_text())
        except (OSError, ValueError):
            return None

    def folder_of(self, digest: str) -> Path | None:
        """The folder to load a model from, made if need be; None unless all its files are here and unchanged."""
        manifest = self.manifest(digest)
        if manifest is None:
            return None
        targets = {file.name: self.locate(file.sha256, file.size) for file in manifest.files}
        folder = self._folder / "models" / digest
        make_private_folder(folder)
        for name, target in targets.items():
            if target is None:
                return None
            _link(folder / name, target.absolute())
        with contextlib.suppress(FileNotFoundError):  # another process has just pruned it
            os.utime(self._manifest_path(digest))
        return folder

    def hold(self, digest: str) -> Hold | None:
        """Keep a model from being pruned while it is used; None when the store does not know it."""
        path = self._manifest_path(digest)
        while True:
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            # Whoever prunes has it locked for a moment only.
            fcntl.flock(handle, fcntl.LOCK_SH)
            if _is_same(handle, path):
                return Hold(handle)
            os.close(handle)

    def list(self) -> tuple[StoredModel, ...]:
        """All models, the last used first."""
        found = (self._describe(path) for path in self._folder.glob("manifests/*.json"))
        return tuple(sorted((model for model in found if model is not None), key=lambda m: (-m.used, m.digest)))

    @property
    def size(self) -> int:
        """Bytes of the store's own files, arriving ones included."""
        kept = (*self._folder.glob("blobs/*"), *self._folder.glob("partial/*"))
        return sum(_size(path) or 0 for path in kept)

    @property
    def limit_bytes(self) -> int:
        """What the store's own files may take."""
        if self._limit is not None:
            return self._limit
        return max(LEAST_LIMIT_BYTES, (self._free_bytes(self._folder) + self.size) // 2)

    def check_taken(self, manifest: Manifest) -> None:
        """Refuse a model that brings code where the machine's owner has not agreed to run any.

        Raises:
            TandemError: it does; the message says how to agree.
        """
        code = manifests.code_in(manifest)
        if code and not self._takes_code:
            raise TandemError(
                f"the model brings its own Python files ({code[0]}), which run there only if its owner agrees:"
                " node serve --trust-remote-code"
            )

    def make_room(self, files: Iterable[StoredFile]) -> None:
        """See that these files fit, within the disk and the limit; prunes where it must.

        Raises:
            NoRoom: they do not.
        """
        lacking = {file.sha256: file for file in self.missing(files)}.values()
        needed = sum(file.size - min(self.partial_size(file.sha256), file.size) for file in lacking)
        if not needed:
            return
        limit, kept = self.limit_bytes, {file.sha256 for file in files}
        free = self._free_bytes(self._folder) - RESERVE_BYTES
        room = min(limit - self.size, free)
        if needed > room:
            self.prune(max(0, self.size - (needed - room)), keeping=kept)
        free = self._free_bytes(self._folder) - RESERVE_BYTES
        if needed > free:
            raise self.full(OSError(errno.ENOSPC, ""), needed)
        if needed > limit - self.size:
            raise NoRoom(
                f"no room for a model in {self._folder}: {show_size(needed)} more needed, the store's limit is "
                f"{show_size(limit)} and models in use take {show_size(self.size)} of it"
            )

    def prune(self, limit_bytes: int, *, keeping: Iterable[str] = ()) -> Pruned:
        """Remove what nobody refers to, then the models least recently used, until the store is no larger.

        Models in use stay, and so do files that are used where they are, and the models that consist of those.

        Args:
            limit_bytes: of the store's own files.
            keeping: digests of files that stay in any case.
        """
        before, removed = self.size, list[StoredModel]()
        self._sweep(set(keeping))
        for model in reversed(self.list()):
            if self.size <= limit_bytes:
                break
            if not model.in_use and (model.own or not model.complete) and self._forget(model.digest):
                removed.append(model)
                self._sweep(set(keeping))
        after = self.size
        return Pruned(tuple(removed), max(0, before - after), after)

    def _forget(self, digest: str) -> bool:
        """Remove a model, but for its files; False when it has come into use."""
        path = self._manifest_path(digest)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not _lock(handle, fcntl.LOCK_EX):
                return False
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)
        shutil.rmtree(self._folder / "models" / digest, ignore_errors=True)
        return True

    def _sweep(self, keeping: set[str]) -> None:
        """Remove files that belong to no model, and pointers to files that are gone."""
        for path in self._folder.glob("manifests/*.json"):
            manifest = self.manifest(path.stem)
            keeping.update(file.sha256 for file in (manifest.files if manifest is not None else ()))
        for path in self._folder.glob("blobs/*"):
            if path.name not in keeping:
                path.unlink(missing_ok=True)
        for path in self._folder.glob("partial/*"):
            if path.name not in keeping and not self.is_arriving(path.name):
                path.unlink(missing_ok=True)
        for path in self._folder.glob("adopted/*.json"):
            if path.stem not in keeping or self._pointed_to(path.stem) is None:
                path.unlink(missing_ok=True)

    def _describe(self, path: Path) -> StoredModel | None:
        manifest = self.manifest(path.stem)
        if manifest is None:
            return None
        files = {file.sha256: file for file in manifest.files}.values()
        places = {file: self.locate(file.sha256, file.size) for file in files}
        arrived = sum(self.partial_size(file.sha256) for file, place in places.items() if place is None)
        own = sum(file.size for file, place in places.items() if place == self.blob(file.sha256))
        complete = all(place is not None for place in places.values())
        present = sum(file.size for file, place in places.items() if place is not None) + arrived
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            in_use, used = not _lock(handle, fcntl.LOCK_EX), os.fstat(handle).st_mtime
        finally:
            os.close(handle)
        folder = str(self._folder / "models" / path.stem) if complete else ""
        return StoredModel(
            path.stem, manifest.name, manifest.revision, sum(file.size for file in files), present, own + arrived,
            complete, in_use, used, folder,
        )  # fmt: skip

    def _partial(self, sha256: str) -> Path:
        return self._folder / "partial" / sha256

    def _pointer(self, sha256: str) -> Path:
        return self._folder / "adopted" / f"{sha256}.json"

    def _manifest_path(self, digest: str) -> Path:
        return self._folder / "manifests" / f"{digest}.json"

    def _pointed_to(self, sha256: str) -> Path | None:
        try:
            pointer = json.loads(self._pointer(sha256).read_text())
            path, size, mtime_ns = Path(pointer["path"]), pointer["size"], pointer["mtime_ns"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return path if _is_unchanged(path, size, mtime_ns) else None


def hub_cache() -> Path:
    """The Hugging Face cache of this user, as its client finds it; the client itself takes long to import."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(name):
            return Path(os.path.expandvars(given)).expanduser()
    if given := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(given)).expanduser() / "hub"
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "huggingface" / "hub"


def _in_hub_cache(sha256: str) -> Path | None:
    cache = hub_cache()
    try:
        repositories = [entry.name for entry in os.scandir(cache) if entry.name.startswith("models--")]
    except OSError:
        return None
    paths = (cache / name / "blobs" / sha256 for name in repositories)
    return next((path for path in paths if path.is_file() and not path.is_symlink()), None)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _is_unchanged(path: Path, size: int | None, mtime_ns: int) -> bool:
    try:
        state = path.stat()
    except OSError:
        return False
    return (size is None or state.st_size == size) and state.st_mtime_ns == mtime_ns


def _lock(handle: int, kind: int) -> bool:
    """Lock a file, or say that another holds it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(handle: int, path: Path) -> bool:
    """Whether a path still names the file that was opened by it."""
    try:
        named = path.stat()
    except OSError:
        return False
    opened = os.fstat(handle)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _link(path: Path, target: Path) -> None:
    """Let a path be a link to the target, in one step."""
    with contextlib.suppress(OSError):
        if path.readlink() == target:
            return
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}")
    partial.symlink_to(target)
    partial.replace(path)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
