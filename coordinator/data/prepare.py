"""A data set tokenised once: read, checked, written as flat files, and found again by its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from coordinator.data.chunks import tokenised_chunks
from coordinator.data.formats import first_kind
from coordinator.data.source import DataFile, DataSource, Split
from coordinator.data.tokenise import RowTokeniser, TokeniseOptions
from coordinator.data.tokenizer import TOKENIZER_FILES, load_tokenizer, vocabulary_size
from coordinator.data.tokenset import FORMAT_VERSION, DamagedTokenSet, TokenSet, TokenSetWriter
from node.errors import UserError
from node.files import CHUNK_BYTES, make_private_folder, sync_folder
from node.jsons import read_json

Progress = Callable[[str, int, int], None]

BUILDING = ".building-"
STALE_SECONDS = 24 * 3600
# Raised when the same input gives other tokens than before.
RULES_VERSION = 1
# Settings of the model that choose the tokenizer's class; the rest of config.json does not change tokens.
TOKENIZER_SETTINGS = ("model_type", "tokenizer_class", "auto_map")


def prepare(
    source: DataSource,
    tokenizer_path: Path,
    options: TokeniseOptions,
    cache: Path,
    progress: Progress,
    splits: tuple[Split, ...] = ("train", "valid"),
    name: str = "",
) -> dict[Split, TokenSet]:
    """Tokenise splits of a data set, or find them in the cache.

    Args:
        source: the data set.
        tokenizer_path: the model's folder.
        options: lengths and masks.
        cache: folder of tokenised sets, made when missing; safe to delete.
        progress: called with a task, what is done and the total, in rows.
        splits: which are wanted; "valid" may be missing in the data set, others may not.
        name: of the model, for messages; its folder when "".

    Returns:
        The splits that exist.

    Raises:
        RowError: the first bad row.
        UserError: a file, the tokenizer or the disk is not as it must be.
    """
    preparer = _Preparer(tokenizer_path, options, cache, progress, name or str(tokenizer_path))
    wanted = [split for split in splits if split != "valid" or split in source.splits]
    files = {split: source.files(split) for split in wanted}
    return {split: preparer.split(split, files[split]) for split in wanted}


@dataclass
class _Preparer:
    tokenizer_path: Path
    options: TokeniseOptions
    cache: Path
    progress: Progress
    name: str
    _tokeniser: RowTokeniser | None = None
    _fingerprint: str = ""

    def split(self, split: Split, files: tuple[DataFile, ...]) -> TokenSet:
        if not self._fingerprint:
            self._fingerprint = _tokenizer_fingerprint(self.tokenizer_path)
        key, rows = self._key(files)
        folder = self.cache / key
        try:
            with _disk_errors(self.cache):
                found = self._open(folder) or self._build(folder, split, files, rows)
        except DamagedTokenSet as error:
            raise UserError(f"{error}; is {self.cache} on a disk that keeps what is written?") from error
        self._check(split, files, found)
        return found

    def _key(self, files: tuple[DataFile, ...]) -> tuple[str, int]:
        """Name of the tokenised set, by everything that decides what is in it; and lines of the files."""
        digest = hashlib.sha256()
        lines = 0
        for file in files:
            content, count = _content_of(file)
            lines += count
            digest.update(json.dumps([content, asdict(file.features)]).encode())
        rules = {
            "format": FORMAT_VERSION,
            "rules": RULES_VERSION,
            "options": asdict(self.options),
            "tokenizer": self._fingerprint,
        }
        digest.update(json.dumps(rules, sort_keys=True).encode())
        return digest.hexdigest()[:32], lines

    def _open(self, folder: Path) -> TokenSet | None:
        if not folder.exists():
            return None
        try:
            return TokenSet(folder)
        except DamagedTokenSet:
            shutil.rmtree(folder)
            return None

    def _build(self, folder: Path, split: Split, files: tuple[DataFile, ...], rows: int) -> TokenSet:
        make_private_folder(self.cache)
        _remove_stale(self.cache)
        partial = Path(tempfile.mkdtemp(prefix=BUILDING, dir=self.cache))
        try:
            self._write(partial, split, files, rows)
            try:
                partial.rename(folder)
            except OSError:
                # Where another process that built the same set was first, its set is as good.
                if not folder.exists():
                    raise
            sync_folder(self.cache)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return TokenSet(folder)

    def _write(self, partial: Path, split: Split, files: tuple[DataFile, ...], rows: int) -> None:
        task = f"tokenising {split}"
        done = 0
        self.progress(task, done, rows)
        writer = TokenSetWriter(partial, self.options.max_seq_length)
        try:
            for file in files:
                kind = first_kind(file)
                tokeniser = self._rows()
                tokeniser.require(chat=kind != "text")
                workers = os.cpu_count() or 1
                for chunk in tokenised_chunks(file, kind, tokeniser, self.tokenizer_path, workers):
                    writer.add(chunk)
                    done += len(chunk.lengths) + chunk.dropped
                    self.progress(task, min(done, rows), rows)
            writer.finish()
        finally:
            writer.close()
        self.progress(task, rows, rows)

    def _rows(self) -> RowTokeniser:
        if self._tokeniser is None:
            tokenizer = load_tokenizer(self.tokenizer_path, self.options.trust_remote_code)
            self._tokeniser = RowTokeniser(tokenizer, self.options, self.name)
        return self._tokeniser

    def _check(self, split: Split, files: tuple[DataFile, ...], found: TokenSet) -> None:
        names = ", ".join(file.name for file in files)
        if len(found) == 0:
            raise UserError(
                f"{names}: none of its {found.dropped} rows leaves anything to train on for {split}; "
                "rows are empty, or --max-seq-length or the mask cuts all of it away"
            )
        size = vocabulary_size(self.tokenizer_path)
        if size is not None and found.largest_token >= size:
            raise UserError(
                f"the tokenizer of {self.name} does not fit its model: it gives token {found.largest_token}, the model "
                f"knows {size} tokens; use the tokenizer files that belong to this model"
            )


def _tokenizer_fingerprint(folder: Path) -> str:
    """What the tokenizer's files and libraries are, so that another tokenizer gives another cache entry."""
    digest = hashlib.sha256(f"{version('transformers')} {version('tokenizers')}".encode())
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    for file in files:
        if file.name == "config.json":
            digest.update(_tokenizer_settings(file))
        elif not file.name.endswith(".safetensors.index.json"):
            digest.update(f"{file.name} {_content_of(DataFile(file))[0]}".encode())
    return digest.hexdigest()


def _tokenizer_settings(file: Path) -> bytes:
    config = read_json(file)
    return json.dumps({key: config.get(key) for key in TOKENIZER_SETTINGS}, sort_keys=True).encode()


def _content_of(file: DataFile) -> tuple[str, int]:
    """Digest of a file's bytes, and its number of lines."""
    digest = hashlib.sha256()
    lines = 0
    last = b"\n"
    try:
        with file.path.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
                lines += chunk.count(b"\n")
                last = chunk[-1:]
    except OSError as error:
        raise UserError(f"cannot read {file.name}: {error.strerror}") from error
    return digest.hexdigest(), lines + (last != b"\n")


def _remove_stale(cache: Path) -> None:
    """Take away what processes that were killed left behind."""
    for folder in cache.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write tokenised data to {cache}: {error.strerror or error}; free some space or set TANDEM_HOME "
            "to a folder on another disk"
        ) from error
