"""The folder of a run: what it leaves behind, and what of an older run must not be overwritten.

adapters.safetensors, adapter_config.json, 0000100_adapters.safetensors   as mlx_lm writes and reads them
checkpoints/0000100/           what exact resume needs
metrics.jsonl, events.jsonl    one object per step or validation; one per thing that happened
config.yaml, run.json, report.html
previous/ID/                   the files of older runs
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator.stream import (
    FleetFormed,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    Sampled,
    StepFinished,
    Tested,
    Validated,
)
from node.errors import UserError
from node.files import write_text_atomically

OURS = (
    "adapters.safetensors",
    "adapter_config.json",
    "checkpoints",
    "metrics.jsonl",
    "events.jsonl",
    "config.yaml",
    "run.json",
    "report.html",
)
STARTED_FACTS = ("name", "total_iters", "total_steps", "first_step", "facts")
"""What `events.jsonl` says of a beginning, so that a run can be shown by who reads its files."""
_NUMBERED = re.compile(r"\d{7}_adapters\.safetensors")


class RunFolder:
    """Paths and bookkeeping of one run's folder. ``lock`` it before writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step, and per validation."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object per thing that happened."""
        return self.path / "events.jsonl"

    @property
    def config(self) -> Path:
        """The resolved options."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The page with the curves."""
        return self.path / "report.html"

    def lock(self) -> None:
        """Keep other runs out of this folder until this process ends. The folder itself is locked: no file is left.

        Raises:
            UserError: another run is at work here, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"--adapter-path {self.path}: {error.strerror}; choose a folder you may write to"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise self._busy() from error
        self._lock = handle

    def check_free(self) -> None:
        """See that no other run is at work here, without writing anything.

        Raises:
            UserError: one is.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return  # no such folder yet
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._busy() from error
        finally:
            os.close(handle)

    def _busy(self) -> UserError:
        return UserError(f"--adapter-path {self.path}: another run is writing here; choose another folder")

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def run_id(self) -> str | None:
        """The id of the run whose files are here, or None."""
        return self._mark("run")

    def data_digest(self) -> str | None:
        """The digest of the training data that the run began with, or None where that is not written."""
        return self._mark("data_digest") or None

    def _mark(self, name: str) -> str | None:
        try:
            content = json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):
            return None
        return str(content[name]) if isinstance(content, dict) and name in content else None

    def begin(self, run: str, config_yaml: str, data_digest: str = "") -> None:
        """Mark the folder as this run's."""
        write_text_atomically(self.config, config_yaml)
        mark = {"run": run, "started": time.time(), "data_digest": data_digest}
        write_text_atomically(self.path / "run.json", json.dumps(mark) + "\n")

    def files(self) -> list[Path]:
        """What a run has written here; folders among it."""
        found = [self.path / name for name in OURS if (self.path / name).exists()]
        numbered = (path for path in self.path.glob("*_adapters.safetensors") if _NUMBERED.fullmatch(path.name))
        return [*found, *sorted(numbered)]

    def archive(self) -> Path | None:
        """Move the files of an older run out of the way.

        Returns:
            The folder they are in now, or None when there were none.
        """
        old = self.files()
        if not old:
            return None
        name = self.run_id() or time.strftime("before-%Y%m%d-%H%M%S")
        target, count = self.path / "previous" / name, 1
        while target.exists():
            count += 1
            target = self.path / "previous" / f"{name}-{count}"
        target.mkdir(parents=True)
        for path in old:
            shutil.move(path, target / path.name)
        return target

    def truncate_metrics(self, step: int, recovered: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
        """Drop what was written after a step, and a line that a crash cut off.

        Args:
            step: the last one that is kept.
            recovered: steps up to it that were not written.

        Returns:
            What is there then, oldest first.
        """
        kept = [entry for entry in read_json_lines(self.metrics) if entry.get("step", 0) <= step]
        if recovered:
            # A validation stands behind its step.
            kept = sorted([*kept, *recovered], key=lambda entry: (entry.get("step", 0), "val_loss" in entry))
        write_text_atomically(self.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))
        return kept


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that is cut off is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


class Recorder:
    """The reader that writes ``metrics.jsonl`` and ``events.jsonl``.

    A disk that is full stops no training: it is told once, through ``complain``, and so is that it can be written
    again. Lines that could not be written wait, and are tried again with the next one.
    """

    def __init__(self, folder: RunFolder, complain: Callable[[str], None]) -> None:
        self._folder = folder
        self._complain = complain
        self._complained = False
        self._waiting: dict[Path, list[bytes]] = {}

    def handle(self, event: RunEvent) -> None:
        """Append what belongs to one of the files."""
        if isinstance(event, StepFinished | Validated):
            self._append(self._folder.metrics, event.metrics)
            return
        entry: dict[str, Any] | None = None
        if isinstance(event, RunStarted):
            kind = "started" if event.first_step == 1 else "resumed"
            entry = {"kind": kind, "message": f"{kind} at step {event.first_step}", "level": "info", "run": event.run}
            entry |= {name: getattr(event, name) for name in STARTED_FACTS}
        elif isinstance(event, FleetFormed):
            entry = {"kind": "fleet", "message": event.lines[0] if event.lines else "", "level": "info"}
            entry |= dataclasses.asdict(event)
        elif isinstance(event, RunFinished):
            entry = {"kind": "finished", "message": event.status, "level": "info", **dataclasses.asdict(event)}
        elif isinstance(event, Noted):
            entry = {"kind": event.kind, "message": event.message, "level": event.level, **event.details}
        elif isinstance(event, Sampled):
            entry = {"kind": "sample", "message": f"sample at step {event.step}", "level": "info"}
            entry |= {"step": event.step, "prompt": event.prompt, "text": event.text}
        elif isinstance(event, Tested):
            entry = {"kind": "test", "message": f"test loss {event.loss:.4f}", "level": "info"}
            entry |= {"loss": event.loss, "tokens": event.tokens}
        if entry is not None:
            self._append(self._folder.events, {"time": time.time(), **entry})

    def close(self) -> None:
        """Nothing is held open between lines."""

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        """Write a line, after those that could not be written before."""
        waiting = self._waiting.setdefault(path, [])
        waiting.append((json.dumps(entry) + "\n").encode())
        try:
            while waiting:
                _append_whole(path, waiting[0])
                waiting.pop(0)
        except OSError as error:
            if not self._complained:
                self._complained = True
                self._complain(f"cannot write {path}: {error.strerror}; training goes on, it is tried again later")
        else:
            if self._complained and not any(self._waiting.values()):
                self._complained = False
                self._complain(f"{path.parent} can be written again; nothing is missing")


def _append_whole(path: Path, line: bytes) -> None:
    """Append a line, or nothing of it.

    Raises:
        OSError: it cannot be written, or is a link, which might lead anywhere.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        written = os.write(handle, line)
        if written < len(line):
            os.ftruncate(handle, os.fstat(handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(handle)
