"""What is known of a run, from the index, its process and its files; and which run a person means."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.runfolder import RunFolder, read_json_lines
from coordinator.running import index, presence
from coordinator.running.figures import Figures, last_figures
from coordinator.running.presence import Presence
from coordinator.view.format import finite, number
from node.errors import UserError

LAST = "last"
ENDED = ("done", "stopped_early", "interrupted", "failed")
STATES = {
    "preparing": "preparing",
    "running": "running",
    "done": "done",
    "stopped_early": "stopped early",
    "interrupted": "stopped",
    "failed": "failed",
    "broken_off": "broken off",
    "unknown": "unknown",
}
"""States as people read them. Broken off is a run whose process is gone without having said how it ended."""


@dataclass(frozen=True)
class Known:
    """A run.

    Attributes:
        run: its id.
        folder: that it wrote to, absolute.
        place: where its files are now, or None.
        missing: why they are nowhere, or "".
        unreadable: whether they may be there, and cannot be looked at.
        model, data: as they were given, or "".
        state: one of ``STATES``.
        figures: its last ones.
        total_steps: planned, or None.
        began, ended: seconds since 1970, or None.
        since: when the last process that trained it, or is at work on it now, began with that; or None.
        message: why it ended before its end, or "".
        opened: whether it began to write to its folder.
        exit_code: that it ended with, where it did not; None is unknown.
        holder: the process that is at work on it, or None.
        log: what it said, when it had no terminal, or None.
        indexed: whether it stands in the index.
    """

    run: str
    folder: Path
    place: Path | None
    missing: str
    unreadable: bool
    model: str
    data: str
    state: str
    figures: Figures
    total_steps: int | None
    began: float | None
    ended: float | None
    since: float | None
    message: str
    opened: bool
    exit_code: int | None
    holder: Presence | None
    log: Path | None
    indexed: bool

    @property
    def resumable(self) -> bool:
        """Whether ``--resume`` could go on with it where it is."""
        return self.state in ("interrupted", "failed", "broken_off") and self.place == self.folder


def known_runs() -> tuple[list[Known], tuple[Path, ...]]:
    """All runs, and the files of the index that cannot be read; last the run that was begun or resumed last."""
    found = index.read_all()
    working = {holder.run: holder for holder in presence.find_all()}
    runs = [_known(entry, working.pop(entry["run"], None)) for entry in found.entries]
    runs += [_known({"run": holder.run}, holder) for holder in working.values()]  # they prepare, or cannot write it
    return sorted(runs, key=lambda run: (run.since or 0.0, run.run)), found.broken


def resolve(wanted: str) -> Known:
    """The run that a person means.

    Args:
        wanted: ``last``, an id, its beginning, or a folder.

    Raises:
        UserError: there is none, or there are several.
    """
    runs, broken = known_runs()
    if wanted == LAST:
        if not runs:
            raise UserError("there is no run yet; coordinator train begins one")
        return runs[-1]
    for run in runs:
        if run.run == wanted:
            return run
    for path in broken:
        if path.stem == wanted:
            raise UserError(f"run {wanted}: {path} cannot be read; coordinator runs rm {wanted} removes it")
    try:
        here = _of_folder(Path(wanted).expanduser().resolve(), runs)
    except (OSError, RuntimeError, ValueError):  # a ring of links, somebody who has no home, a zero byte
        here = None
    if here is not None:
        return here
    fitting = [run for run in runs if run.run.startswith(wanted)] if wanted else []
    if len(fitting) > 1:
        raise UserError(f"{wanted} may be {_some([run.run for run in fitting])}; write more of the id")
    if not fitting:
        raise UserError(f"{wanted or repr(wanted)}: no such run, and no folder of one; coordinator runs lists them")
    return fitting[0]


def find_place(run: str, folder: Path) -> Path | None:
    """Where a run's files are: in its folder, or where a later run there moved them; None: nowhere that can be read."""
    if RunFolder(folder).run_id() == run:
        return folder
    try:
        moved = sorted((folder / "previous").glob(f"{run}*"))
    except OSError:
        return None
    return next((path for path in moved if RunFolder(path).run_id() == run), None)


def _of_folder(folder: Path, runs: Sequence[Known]) -> Known | None:
    """The run whose files a folder holds; where it holds none, the last that was to write there."""
    run = RunFolder(folder).run_id()
    if run is None:
        return next((one for one in reversed(runs) if one.folder == folder), None)
    for one in runs:
        if one.run == run and folder in (one.folder, one.place):
            return one
    # Of another TANDEM_HOME, or copied here.
    return _known({"run": run, "folder": str(folder)}, None, indexed=False)


def _known(entry: dict[str, Any], holder: Presence | None, *, indexed: bool = True) -> Known:
    run = entry["run"]
    folder = Path(holder.folder if holder is not None else str(entry.get("folder", "")))
    place = find_place(run, folder)
    figures = _figures(entry)
    if place is not None and (figures.steps is None or holder is not None or entry.get("status") not in ENDED):
        figures = last_figures(RunFolder(place))
    opened = entry.get("status") is not None and entry.get("opened") is not False
    trouble = "" if place is not None else _trouble(folder)
    log = index.log_path(run)
    began = finite(entry.get("began")) or (holder.since if holder is not None else _began(place))
    return Known(
        run=run,
        folder=folder,
        place=place,
        missing="" if place is not None else _why_missing(folder, opened=opened, trouble=trouble),
        unreadable=bool(trouble),
        model=str(entry.get("model") or (holder.model if holder is not None else "")),
        data=str(entry.get("data") or ""),
        state=_state(entry, holder, place),
        figures=figures,
        total_steps=_whole(entry.get("total_steps")),
        began=began,
        ended=finite(entry.get("ended")) if holder is None else None,
        since=holder.since if holder is not None else finite(entry.get("resumed")) or began,
        message=str(entry.get("message") or "") if holder is None else "",
        opened=opened,
        exit_code=_whole(entry.get("exit_code")) if holder is None else None,
        holder=holder,
        log=log if log.exists() else None,
        indexed=indexed,
    )


def _state(entry: dict[str, Any], holder: Presence | None, place: Path | None) -> str:
    status = entry.get("status")
    if holder is not None:
        return "running" if status == "running" and entry.get("pid") == holder.pid else "preparing"
    if status is None:  # not in the index: its files may tell
        return _last_word(place) if place is not None else "unknown"
    return status if status in ENDED else "broken_off"


def _last_word(place: Path) -> str:
    """How a run ended by its own events."""
    try:
        events = read_json_lines(RunFolder(place).events)
    except OSError:
        return "unknown"
    for event in reversed(events):
        if event.get("kind") == "finished":
            return str(event.get("status")) if event.get("status") in ENDED else "unknown"
        if event.get("kind") in ("started", "resumed"):
            return "broken_off"
    return "unknown"


def _why_missing(folder: Path, *, opened: bool, trouble: str) -> str:
    if not opened:
        return "nothing was written yet"
    if trouble:
        return f"{folder} cannot be read: {trouble}"
    if not folder.exists():
        return f"{folder} was deleted or moved"
    return f"{folder} no longer holds its files"


def _trouble(folder: Path) -> str:
    """What the system says where it does not let us see whose files a folder holds; "" where they are not there."""
    for path in (folder / "run.json", folder / "previous"):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return error.strerror or type(error).__name__
    return ""


def _figures(entry: dict[str, Any]) -> Figures:
    return Figures(_whole(entry.get("steps")), number(entry.get("final_loss")), number(entry.get("final_val_loss")))


def _began(place: Path | None) -> float | None:
    if place is None:
        return None
    try:
        content = json.loads((place / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return finite(content.get("started")) if isinstance(content, dict) else None


def _whole(value: object) -> int | None:
    found = finite(value)
    return None if found is None else int(found)


def _some(words: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(words[:most])
    return shown if len(words) <= most else f"{shown} and {len(words) - most} more"
