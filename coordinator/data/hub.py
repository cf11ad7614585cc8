"""Hugging Face data sets, through the ``datasets`` library, written out as JSONL and from there on like any other."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coordinator.data.formats import SHAREGPT_KEY
from coordinator.data.rows import Features
from coordinator.data.source import STANDARD, DataFile, DataSource, Split, local_source
from node.errors import UserError, one_line
from node.files import make_private_folder, replacing

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation", "dev"),
    "test": ("test",),
}
# What mlx_lm takes where the configuration does not say.
DEFAULT_TRAIN_SPLIT = "train[:80%]"
DEFAULT_VALID_SPLIT = "train[-10%:]"
FEATURE_KEYS = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "chat",
    "text_feature": "text",
}
KEYS = ("path", "train_split", "valid_split", "test_split", "config", *FEATURE_KEYS)
READ_ROWS = 1000
HTTP_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HubDataset:
    """One entry of ``hf_dataset``.

    Attributes:
        path: repository or local folder.
        splits: an expression of the library for each split, such as ``train[:80%]``.
        config: further arguments of ``datasets.load_dataset``.
        features: which columns hold what.
    """

    path: str
    splits: dict[Split, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    features: Features = STANDARD


def find_source(
    data: str,
    hf_dataset: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    features: Features,
    cache: Path,
    progress: Progress,
    splits: tuple[Split, ...] = ("train", "valid"),
) -> DataSource:
    """The data set that options name: ``hf_dataset``, a folder, or a repository on the Hugging Face Hub.

    Args:
        data: folder or repository, as ``--data`` gives it.
        hf_dataset: what stands under that key of an ``mlx_lm`` configuration, or None.
        features: which keys hold what in ``data``.
        cache: folder for the rows of data sets from the Hub.
        progress: called with a task, rows read and rows in all.
        splits: which are wanted; others are not read from the Hub.

    Raises:
        UserError: there is no such data set, or it cannot be reached.
    """
    if hf_dataset:
        return hub_source(read_hub_datasets(hf_dataset), cache, progress, splits)
    folder = Path(data).expanduser()
    # Data sets on the Hub are called owner/name; a bare word is a folder that is not there.
    if folder.exists() or "/" not in data or not HUB_NAME.match(data):
        return local_source(folder, features)
    return named_source(data, features, cache, progress, splits)


def read_hub_datasets(hf_dataset: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[HubDataset, ...]:
    """Check ``hf_dataset`` of a configuration: one mapping or a list of them.

    Raises:
        UserError: a key is unknown or a value is of the wrong type.
    """
    entries = [hf_dataset] if isinstance(hf_dataset, Mapping) else hf_dataset
    return tuple(_read_entry(entry) for entry in entries)


def _read_entry(entry: Any) -> HubDataset:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise UserError('hf_dataset needs a "path" in each entry: the name of a data set or a folder')
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            raise UserError(f'hf_dataset: unknown key "{key}"' + (f'; did you mean "{near[0]}"?' if near else ""))
    config = entry.get("config") or {}
    if not isinstance(config, Mapping):
        raise UserError('hf_dataset: "config" must hold arguments of datasets.load_dataset, such as name: main')
    given = {
        "train": entry.get("train_split", DEFAULT_TRAIN_SPLIT),
        "valid": entry.get("valid_split", DEFAULT_VALID_SPLIT),
        "test": entry.get("test_split"),
    }
    splits: dict[Split, str] = {split: str(given[split]) for split in SPLIT_NAMES if given[split]}
    names = {FEATURE_KEYS[key]: str(entry[key]) for key in FEATURE_KEYS if entry.get(key)}
    return HubDataset(entry["path"], splits, dict(config), Features(**names))


def named_source(
    name: str, features: Features, cache: Path, progress: Progress, splits: tuple[Split, ...] = ("train", "valid")
) -> DataSource:
    """A data set by name or path, with whatever splits it calls train, valid (or validation) and test."""
    loaded = _load(name, None, {})
    if not isinstance(loaded, Mapping):
        loaded = {"train": loaded}
    files: dict[Split, tuple[DataFile, ...]] = {}
    for split in splits:
        for theirs in SPLIT_NAMES[split]:
            if theirs in loaded and split not in files:
                files[split] = (_export(loaded[theirs], f"{name} [{theirs}]", features, cache, progress),)
    if not files:
        raise UserError(f"the data set {name} has no train, valid or test split; it has {', '.join(loaded) or 'none'}")
    return DataSource(name, files)


def hub_source(
    datasets: tuple[HubDataset, ...], cache: Path, progress: Progress, splits: tuple[Split, ...] = ("train", "valid")
) -> DataSource:
    """One or several data sets, one after the other in each split."""
    files: dict[Split, tuple[DataFile, ...]] = {}
    for split in splits:
        parts = tuple(
            _export(
                _load(dataset.path, dataset.splits[split], dataset.config),
                f"{dataset.path} [{dataset.splits[split]}]",
                dataset.features,
                cache,
                progress,
            )
            for dataset in datasets
            if split in dataset.splits
        )
        if parts:
            files[split] = parts
    return DataSource(", ".join(dataset.path for dataset in datasets), files)


def _load(path: str, split: str | None, config: dict[str, Any]) -> Any:
    """The boundary to the library, which raises errors of a dozen origins."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        if _saved_to_disk(Path(path)):
            return _load_saved(path, split)
        return datasets.load_dataset(path, split=split, **config)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{path} is neither a folder here nor a data set on the Hub that you may read") from error
    except Exception as error:
        if isinstance(error, ConnectionError | TimeoutError) or _is_network(error):
            raise UserError(
                f"cannot reach the Hugging Face Hub for the data set {path}; check the network, or give a folder"
            ) from error
        raise UserError(f"cannot load the data set {path}: {one_line(error)}") from error


def _is_network(error: BaseException) -> bool:
    """Whether an HTTP library's error, or being offline, is behind this one; the classes differ between versions."""
    seen: BaseException | None = error
    while seen is not None:
        kind = type(seen)
        if "Offline" in kind.__name__ or kind.__module__.split(".")[0] in HTTP_LIBRARIES:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _load_saved(path: str, split: str | None) -> Any:
    """A folder that ``save_to_disk`` wrote; its splits can be named but not sliced."""
    import datasets

    loaded = datasets.load_from_disk(path)
    if split is None:
        return loaded
    named, _, part = split.partition("[")
    chosen = loaded[named] if isinstance(loaded, Mapping) else loaded
    return chosen.select(_sliced(part, len(chosen))) if part else chosen


def _sliced(part: str, count: int) -> range:
    """Row numbers of ``:80%]``, ``-10%:]``, ``100:200]``, rounded as the library rounds."""
    match = re.fullmatch(r"(-?\d*)(%?):(-?\d*)(%?)\]", part.strip())
    if not match:
        raise ValueError(f"cannot read the slice [{part}")

    def edge(number: str, percent: str, default: int) -> int:
        if not number:
            return default
        value = round(int(number) * count / 100) if percent else int(number)
        return max(0, value + count if value < 0 else min(value, count))

    return range(edge(match[1], match[2], 0), edge(match[3], match[4], count))


def _export(dataset: Any, label: str, features: Features, cache: Path, progress: Progress) -> DataFile:
    """Write the wanted columns of a data set as JSONL, once for each content."""
    wanted = [*asdict(features).values(), SHAREGPT_KEY, "tools", "system"]
    columns = [name for name in dataset.column_names if name in wanted]
    if not set(columns) - {"tools", "system"}:
        raise UserError(
            f"{label} has the columns {', '.join(dataset.column_names)}, none of which is known; "
            "say which to use with text_feature, chat_feature, or prompt_feature and completion_feature"
        )
    key = hashlib.sha256(json.dumps([dataset._fingerprint, len(dataset), columns]).encode()).hexdigest()[:32]
    file = cache / "hub" / f"{key}.jsonl"
    if not file.exists():
        try:
            _write_rows(dataset.select_columns(columns), file, f"reading {label}", progress)
        except OSError as error:
            raise UserError(f"cannot write the rows of {label} to {cache}: {error.strerror or error}") from error
    return DataFile(file, features, label)


def _write_rows(dataset: Any, file: Path, task: str, progress: Progress) -> None:
    total = len(dataset)
    progress(task, 0, total)
    make_private_folder(file.parent)
    with replacing(file) as partial, partial.open("w", encoding="utf-8") as out:
        for start in range(0, total, READ_ROWS):
            for row in dataset.select(range(start, min(start + READ_ROWS, total))):
                out.write(json.dumps(_without_null(row), ensure_ascii=False, default=str) + "\n")
            progress(task, min(start + READ_ROWS, total), total)


def _without_null(value: Any) -> Any:
    """Columns give every row every key of any row, null where it had none."""
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_null(inner) for inner in value]
    return value
