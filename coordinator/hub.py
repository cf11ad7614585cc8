"""The Hugging Face Hub, for models: the one place where its errors become ours. Imports it only when it is needed."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator.stream import DOWNLOADING
from coordinator.weight_files import Shapes
from node.errors import TandemError, UserError, one_line

Progress = Callable[[str, int, int], None]
"""Is told how far a download is: task, bytes done, bytes in all."""

# What mlx_lm needs of a repository (its DEFAULT_ALLOW_PATTERNS).
ALLOW_PATTERNS = (
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)


class NotFound(UserError):
    """The Hub knows no such repository, or does not show it to us."""


def download(
    repository: str, revision: str | None, progress: Progress | None, patterns: Sequence[str] = ALLOW_PATTERNS
) -> Path:
    """Bring a repository into the Hugging Face cache and return its folder there; offline, what the cache has is used.

    Raises:
        UserError: not found, gated, offline and not cached, or no room.
    """
    snapshot_download = _quiet_hub().snapshot_download
    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), tqdm_class=_bar(progress)
        )
    except _hub_errors() as error:
        cached = cached_snapshot(repository, revision) if _is_offline(error) else None
        if cached is not None:
            return cached
        raise explained(repository, revision, error) from error
    if not (Path(path) / "config.json").is_file():
        page = f"https://huggingface.co/{repository}"
        raise UserError(f"{repository} has no config.json: it is no model in Hugging Face form; see {page}")
    return Path(path)


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository that is in the cache, whole; asks nobody."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot_download = _quiet_hub().snapshot_download

    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=list(ALLOW_PATTERNS), local_files_only=True
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    return Path(path)


def remote_shapes(repository: str, revision: str | None) -> Shapes | None:
    """Type and shape of a repository's tensors, from the headers that the Hub serves; None when it does not."""
    get_safetensors_metadata = _quiet_hub().get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    unknown: tuple[type[Exception], ...] = (*_hub_errors(), NotASafetensorsRepoError, SafetensorsParsingError)
    try:
        found = get_safetensors_metadata(repository, revision=revision)
    except unknown:
        return None
    tensors = (item for file in found.files_metadata.values() for item in file.tensors.items())
    return {name: (str(info.dtype), tuple(info.shape)) for name, info in tensors}


def revision_of(path: Path) -> str | None:
    """The commit that a folder of the cache stands for."""
    return path.name if path.parent.name == "snapshots" else None


def explained(repository: str, revision: str | None, error: Exception) -> TandemError:
    """One clear line for what went wrong with a repository."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{repository} is gated: accept its terms at {page}, then log in with: hf auth login")
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFound(
            f"no folder and no Hugging Face model is called {repository} (private ones need: hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repository} has no revision {revision}; see {page}/tree/main")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"--model {repository!r}: neither a folder nor a repository id such as org/name")
    if _is_offline(error):
        return NotFound(
            f"{repository} is no folder and not in the Hugging Face cache, and the Hub cannot be reached;"
            " connect to the internet once, or pass a folder as --model"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UserError(f"no room on the disk for {repository}; free some, or set HF_HOME to a larger one")
    return TandemError(f"downloading {repository} failed: {one_line(error)}; run the same command again")


def _is_offline(error: Exception) -> bool:
    """Whether the Hub was not reached at all."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return False
    connection = not isinstance(error, (OSError, ValueError))  # of its HTTP client
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return connection or isinstance(error, offline)


def _quiet_hub() -> Any:
    """The library, told to keep its warnings to itself: what matters reaches people as an error of ours."""
    import huggingface_hub

    library: Any = huggingface_hub
    library.logging.set_verbosity_error()
    return library


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the library raises for a bad network, an answer that is no success, or a bad name."""
    from huggingface_hub import errors

    client: Any = errors
    return OSError, ValueError, client.HTTPError


def _bar(progress: Progress | None) -> Any:
    """A progress bar class that shows nothing and tells ``progress`` of the bytes written."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            moved: bool | None = super().update(n)
            if progress is not None and self.unit == "B" and str(self.desc).startswith("Reconstruct"):
                progress(DOWNLOADING, int(self.n), int(self.total or 0))
            return moved

    return Bar
