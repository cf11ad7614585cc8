"""What a model is, as files: names, sizes and the SHA-256 of what is in them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from node.errors import UserError
from node.files import CHUNK_BYTES, make_private_folder, write_text_atomically
from node.info import Manifest, StoredFile

Progress = Callable[[int, int], None]
"""Is told of bytes read, and of bytes to read in all."""

MOST_FILES = 10_000
MOST_MANIFEST_BYTES = 16 << 20
LONGEST_NAME = 255
LARGEST_FILE = 1 << 46

# What mlx_lm opens. Not every *.safetensors: some repositories hold the same weights twice, under another name.
PATTERNS = (
    "config.json",
    "*_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*.json",
    "*.jinja",
)
_NEVER = ("adapter_config.json",)
_CODE = (".py", ".pyc", ".pyo", ".pyd", ".so", ".dylib")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BIG_BYTES = 1 << 20
# A file that changes again within its clock's tick shows the same time: what is younger than this is not remembered.
_SETTLED_NS = 2_000_000_000


def manifest_of(
    folder: Path, name: str, revision: str, cache: Path, progress: Progress | None = None, *, with_code: bool = False
) -> Manifest:
    """The files of a model's folder that loading needs.

    Args:
        folder: in Hugging Face form.
        name: what people call the model.
        revision: its commit on the Hub, or "".
        cache: file in which digests of big files are remembered, by path, size, time and inode.
        progress: is told how many bytes have been read.
        with_code: whether the model's own Python files come along.

    Raises:
        UserError: a file cannot be read, or changes meanwhile.
    """
    patterns = (*PATTERNS, "*.py") if with_code else PATTERNS
    try:
        paths = sorted(path for path in folder.iterdir() if _is_wanted(path, patterns))
        known = _Digests(cache)
        unread = [path for path in paths if known.get(path) is None]
        meter = _Meter(sum(path.stat().st_size for path in unread), progress)
        files = []
        for path in paths:
            sha256 = known.get(path) or known.read(path, meter)
            files.append(StoredFile(path.name, sha256, path.stat().st_size))
        known.save()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from error
    return Manifest(name, revision, tuple(files))


def digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest's names, digests and sizes; what people call the model plays no part."""
    rows = sorted([file.name, file.sha256, file.size] for file in manifest.files)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 in lower-case hex."""
    return _SHA256.fullmatch(text) is not None


def check_files(files: tuple[StoredFile, ...]) -> None:
    """Check that files' names, digests and sizes can be meant.

    Raises:
        UserError: which of them cannot.
    """
    if len(files) > MOST_FILES:
        raise UserError(f"{len(files)} files are more than a model has; {MOST_FILES} are the most")
    names = set()
    for file in files:
        bare = Path(file.name).name == file.name and file.name.isprintable() and not file.name.startswith(".")
        if not file.name or not bare or "\\" in file.name or len(file.name.encode()) > LONGEST_NAME:
            raise UserError(f"{file.name!r} is no bare file name")
        # Macs do not tell names apart that differ in case only.
        if file.name.casefold() in names:
            raise UserError(f"{file.name} stands twice in the list of files")
        names.add(file.name.casefold())
        if not is_sha256(file.sha256):
            raise UserError(f"{file.name}: {file.sha256[:80]!r} is no SHA-256")
        if not 0 <= file.size <= LARGEST_FILE:
            raise UserError(f"{file.name}: a size of {file.size} bytes")


def code_in(manifest: Manifest) -> tuple[str, ...]:
    """Names of a model's files that are programs."""
    return tuple(file.name for file in manifest.files if file.name.lower().endswith(_CODE))


def needs_own_code(where: object, file: str) -> str:
    """What a person is told of a model that cannot be loaded without running a file of its own."""
    return f"{where}: the model needs its own Python file {file[:80]!r}, which runs only with --trust-remote-code"


def tokenizer_needs_own_code(where: object) -> str:
    """Likewise of a tokenizer."""
    return f"the tokenizer in {where} needs its own Python files, which run only with --trust-remote-code"


def to_json(manifest: Manifest) -> str:
    """A manifest as text."""
    files = [{"name": file.name, "sha256": file.sha256, "size": file.size} for file in manifest.files]
    return json.dumps({"name": manifest.name, "revision": manifest.revision, "files": files}, indent=1)


def from_json(text: str) -> Manifest:
    """A manifest from the text of ``to_json``.

    Raises:
        ValueError: it is none.
    """
    try:
        read = json.loads(text)
        files = tuple(StoredFile(item["name"], item["sha256"], item["size"]) for item in read["files"])
        return Manifest(read["name"], read["revision"], files)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no manifest: {error}") from error


def _is_wanted(path: Path, patterns: tuple[str, ...]) -> bool:
    wanted = any(fnmatchcase(path.name, pattern) for pattern in patterns) and path.name not in _NEVER
    return wanted and not path.name.startswith(".") and path.is_file()


class _Meter:
    """Adds up what has been read and says so."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Digests:
    """What is known of files without reading them."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known = self._load()
        self._fresh: dict[str, list[Any]] = {}

    def get(self, path: Path) -> str | None:
        real = path.resolve()
        # The Hub's client names the files of its cache by what is in them, big ones by their SHA-256.
        if real.parent.name == "blobs" and is_sha256(real.name):
            return real.name
        entry = self._fresh.get(str(real)) or self._known.get(str(real))
        return str(entry[-1]) if entry and entry[:-1] == self._state(real) else None

    def read(self, path: Path, meter: _Meter) -> str:
        real = path.resolve()
        before, begun = self._state(real), time.time_ns()
        hashed = hashlib.sha256()
        with real.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hashed.update(chunk)
                meter.add(len(chunk))
        if self._state(real) != before:
            raise UserError(f"{path}: it changed while it was read; try again when nothing writes to it")
        if before[0] >= _BIG_BYTES and begun - before[1] > _SETTLED_NS:
            self._fresh[str(real)] = [*before, hashed.hexdigest()]
        return hashed.hexdigest()

    def save(self) -> None:
        if self._fresh:
            kept = {path: entry for path, entry in self._load().items() if Path(path).exists()}
            make_private_folder(self._cache.parent)
            write_text_atomically(self._cache, json.dumps({**kept, **self._fresh}, indent=0))

    def _load(self) -> dict[str, list[Any]]:
        try:
            read = json.loads(self._cache.read_text())
        except (OSError, ValueError):
            return {}  # it only saves time
        return (
            {path: entry for path, entry in read.items() if isinstance(entry, list)} if isinstance(read, dict) else {}
        )

    @staticmethod
    def _state(path: Path) -> list[int]:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, found.st_ino]
