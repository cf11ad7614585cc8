"""One file for a bug report: versions, findings, logs, and the newest run's events, figures and options.

Secrets are left out, and so is what the user has written or the model has answered: rows, prompts and samples. It is a
zip of texts that anybody can read before he sends it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from coordinator.running.known import Known
from coordinator.view.records import read_options
from node import log_file
from node.environment import SECRET_WORDS
from node.errors import UserError
from node.redact import HIDDEN, redact, redact_values

MOST_BYTES = 2 << 20
"""Of the end of one file."""
MOST_JOB_LOGS = 8
FAMILIES = ("TANDEM_", "MLX_", "METAL_", "MTL_", "HF_", "OMP_", "OPENBLAS_", "PYTHON", "LC_", "LANG", "LD_", "DYLD_")
"""Beginnings of variables that change how the program runs."""
OWN_WORDS = ("sample_prompt", "system_prompt", "prompts")
"""Options that hold the user's own text."""
NOTE = """What is in here, for whoever sends it:

  versions.json     of this program, Python and its packages, the system, and variables that change how it runs
  doctor.json       what `coordinator doctor` has found
  logs/             what the programs have done here lately, and the logs of workers that were cut off
  run/              the newest run, or the one that was named: its events, figures and options

Tokens, keys, pairing codes, rows, prompts, samples and the name of your home folder are left out. Names and addresses
of your machines, and names of your files and models are in: they are what faults are found by. Please look through it.
"""


_SAMPLE = re.compile(r"^(sample at step [\d,]+): .*$", re.MULTILINE)


def check_place(path: Path) -> None:
    """Refuse a place where no file can be made, before it takes time to find out what is to be written there.

    Args:
        path: of the file; nothing is left there.

    Raises:
        UserError: it is there already, or cannot be made.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError as error:
        raise UserError(f"{path} is there already; name another file: --out FILE") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another file: --out FILE") from error
    path.unlink()


def write_bundle(path: Path, findings: Mapping[str, Any], run: Known | None, home: Path) -> list[str]:
    """Write the file; the names in it.

    Args:
        path: of the zip; it must not be there.
        findings: of the doctor, as data.
        run: the run that it is about, or None.
        home: the ``TANDEM_HOME``.

    Raises:
        UserError: it is there already.
        OSError: it cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(f"{path} is there already; name another file") from error
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bundle:
        try:
            for name, text in _contents(findings, run, home):
                bundle.writestr(name, text)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return bundle.namelist()


def default_name() -> Path:
    """In the folder where the command runs."""
    return Path(f"mlx-tandem-debug-{time.strftime('%Y%m%d-%H%M%S')}.zip")


def _contents(findings: Mapping[str, Any], run: Known | None, home: Path) -> Iterator[tuple[str, str]]:
    yield "README.txt", NOTE
    yield "versions.json", _json(versions(os.environ))
    yield "doctor.json", _json(findings)
    for path in sorted(log_file.folder().glob("*.jsonl")):
        yield f"logs/{path.name}", redact(_end(path))
    jobs = sorted((home / "jobs").glob("*/*.log"), key=_changed)[-MOST_JOB_LOGS:]
    for path in jobs:
        yield f"logs/jobs/{path.parent.name}-{path.name}", redact(_end(path))
    if run is None:
        return
    if run.log is not None:
        yield "run/output.log", redact(_SAMPLE.sub(r"\1", _end(run.log)))
    if run.place is None:
        yield "run/missing.txt", redact(f"run {run.run}: {run.missing}\n")
        return
    yield "run/config.json", _json(_options(read_options(run.place / "config.yaml")))
    for name in ("events.jsonl", "metrics.jsonl"):
        yield f"run/{name}", "".join(_without_own_words(_end(run.place / name).splitlines()))


def versions(environment: Mapping[str, str]) -> dict[str, Any]:
    """What runs here, and what changes how."""
    packages = {found.metadata["Name"]: found.version for found in metadata.distributions() if found.metadata["Name"]}
    shown = {
        name: HIDDEN if any(word in name.upper() for word in SECRET_WORDS) else value
        for name, value in environment.items()
        if name.startswith(FAMILIES)
    }
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": dict(sorted(packages.items(), key=lambda pair: pair[0].lower())),
        "environment": dict(sorted(shown.items())),
    }


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: HIDDEN if name in OWN_WORDS and value else value for name, value in options.items()}


def _without_own_words(lines: Iterable[str]) -> Iterator[str]:
    """The entries of a file of JSON lines, without samples; a line that is none tells only that it was there."""
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = {"kind": "no JSON"}
        if isinstance(entry, dict):
            if entry.get("kind") == "sample":
                entry = {name: entry[name] for name in ("time", "kind", "step") if name in entry}
            if isinstance(entry.get("config"), dict):
                entry["config"] = _options(entry["config"])
        yield json.dumps(redact_values(entry), ensure_ascii=False) + "\n"


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(redact_values(content), indent=1, ensure_ascii=False, default=str) + "\n"


def _end(path: Path) -> str:
    """The end of a text, from the beginning of a line; why there is none, where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - MOST_BYTES, 0))
            content = file.read(MOST_BYTES)
    except OSError as error:
        return f"({path.name} cannot be read: {error.strerror})\n"
    if size > MOST_BYTES:
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
