"""Safetensors files that were made to do harm: each is refused with its name and a word, before MLX sees it."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from coordinator.adapters import read_adapter
from coordinator.checkpoint import Checkpoints, Progress
from coordinator.models import check_folder
from coordinator.runfolder import RunFolder
from node.adapter_files import MOST_RANK
from node.errors import TandemError, UserError
from node.events import Copied, Ready, Restored
from node.files import sha256_of
from node.jsons import MOST_CONFIG_BYTES
from node.spec import CopyState, FileRef, JobSpec, ModelSpec, OptimizerSpec, Restore, Setup, TuningSpec
from node.supervisor import LocalWorker
from node.tensors import HEADER_LIMIT_BYTES, check_numbers, read_tensors
from node.worker import tuning
from node.worker.state import save_arrays
from node.worker.trainer import Trainer
from tests.fixtures.adapters import random_adapter
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess


def entry(begin: Any, end: Any, shape: Any = (2, 2), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def write(path: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a header longer than the file": ({"header": {}, "length": 1 << 40}, "not a whole safetensors file"),
    "a header as long as a number can be": ({"header": {}, "length": (1 << 64) - 1}, "not a whole safetensors file"),
    "a header that is nested a million times": ({"header": b'{"a":' * 1_000_000}, "header is damaged"),
    "a header that is a list": ({"header": [1]}, "header is damaged"),
    "a header that is no JSON": ({"header": b"\xff\xfe"}, "header is damaged"),
    "a tensor that is no object": ({"header": {"a": 3}}, "damaged at a"),
    "no offsets": ({"header": {"a": {"dtype": "F32", "shape": [2, 2]}}}, "damaged at a"),
    "three offsets": ({"header": {"a": entry(0, 16) | {"data_offsets": [0, 8, 16]}}}, "damaged at a"),
    "offsets behind the end": ({"header": {"a": entry(1 << 40, (1 << 40) + 16)}}, "cut off at"),
    "a negative offset": ({"header": {"a": entry(-16, 0)}}, "damaged at a"),
    "an offset with a point": ({"header": {"a": entry(0.0, 16.0)}}, "damaged at a"),
    "an end before its begin": ({"header": {"a": entry(16, 0)}}, "as many bytes"),
    "two tensors in one place": ({"header": {"a": entry(0, 16), "b": entry(0, 16)}}, "a overlaps what follows"),
    "tensors that overlap": ({"header": {"a": entry(0, 16), "b": entry(8, 16, (2,))}}, "a overlaps what follows"),
    "a gap": ({"header": {"a": entry(8, 16, (2,))}}, "the header is followed by bytes of no tensor"),
    "bytes behind the last": ({"header": {"a": entry(0, 8, (2,))}}, "a is followed by bytes of no tensor"),
    "a shape of another size": ({"header": {"a": entry(0, 16, (2, 3))}}, "as many bytes"),
    "an enormous shape": ({"header": {"a": entry(0, 16, (1 << 62, 1 << 62))}}, "a shape that no tensor has"),
    "an enormous shape of nothing": ({"header": {"a": entry(0, 0, (1 << 62, 0))}, "data": b""}, "no tensor has"),
    "a negative shape": ({"header": {"a": entry(0, 16, (-2, -2))}}, "damaged at a"),
    "a shape of words": ({"header": {"a": entry(0, 16, ("2", "2"))}}, "damaged at a"),
    "a shape that is a number": ({"header": {"a": entry(0, 16, 4)}}, "damaged at a"),
    "a shape of truths": ({"header": {"a": entry(0, 4, (True,))}, "data": bytes(4)}, "damaged at a"),
    "a type that is none": ({"header": {"a": entry(0, 16, dtype="F31")}}, "unknown type 'F31'"),
    "a type that is a list": ({"header": {"a": entry(0, 16, dtype=["F32"])}}, "unknown type"),
    "a file cut off": ({"header": {"a": entry(0, 16)}, "data": bytes(15)}, "cut off at"),
}


@pytest.mark.parametrize("name", BAD)
def test_headers_that_cannot_be_meant(name: str, tmp_path: Path) -> None:
    made, words = BAD[name]
    path = write(tmp_path / "a.safetensors", **made)
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("copy or download it again")


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # with a hole: it takes no room
        file.write(struct.pack("<Q", HEADER_LIMIT_BYTES + 1))
        file.truncate(HEADER_LIMIT_BYTES + 64)
    with pytest.raises(UserError, match=r"a header of .*; the format allows"):
        read_tensors(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no ordinary file"):
        read_tensors(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no ordinary file"):
        read_tensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_is_no_number_is_found(dtype: mx.Dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    largest = 65504.0 if dtype == mx.float16 else 3e38
    fine = mx.array([0.0, -0.0, 1.0, -largest, largest, 1e-7]).astype(dtype)
    mx.save_safetensors(str(path), {"a": fine, "count": mx.array([-1, 7], mx.int32)})
    assert check_numbers(path)["a"].shape == (6,)
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = mx.concatenate([mx.zeros((100_000,)), mx.array([value])]).astype(dtype)
        mx.save_safetensors(str(path), {"a": fine, "b": bad})
        with pytest.raises(UserError, match=r"b holds what is no number \(NaN or infinite\)"):
            check_numbers(path)


def test_numbers_are_looked_at_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.tensors.CHUNK_BYTES", 64)
    path = tmp_path / "a.safetensors"
    for place in range(0, 100, 9):
        values = np.zeros(100, np.float32)
        values[place] = np.nan
        mx.save_safetensors(str(path), {"a": mx.array(values)})
        with pytest.raises(UserError, match="no number"):
            check_numbers(path)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    return random_adapter(tmp_path / "adapter", model, num_layers=-1)


Change = Callable[[dict[str, mx.array], str], None]


def _set(value: Callable[[mx.array], mx.array]) -> Change:
    def change(weights: dict[str, mx.array], name: str) -> None:
        weights[name] = value(weights[name])

    return change


def _rename(weights: dict[str, mx.array], name: str) -> None:
    weights["model.layers.0.nothing.lora_a"] = weights.pop(name)


def _drop(weights: dict[str, mx.array], name: str) -> None:
    del weights[name]


WEIGHTS: dict[str, tuple[Change, str]] = {
    "not a number": (_set(lambda a: a * float("nan")), "NaN or infinite"),
    "infinite": (_set(lambda a: mx.full(a.shape, float("inf"))), "NaN or infinite"),
    "whole numbers": (_set(lambda a: a.astype(mx.int32)), "is of type I32; weights are BF16, F16 or F32"),
    "turned": (_set(lambda a: mx.contiguous(a.T)), "does not"),
    "too wide": (_set(lambda a: mx.zeros((a.shape[0], 99))), "does not"),
    "another name": (_rename, "adapter"),
    "one missing": (_drop, "it has no"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_adapters_with_bad_weights(name: str, adapter: Path, model: Path) -> None:
    change, words = WEIGHTS[name]
    file = adapter / "adapters.safetensors"
    weights: Any = mx.load(str(file))
    change(weights, sorted(weights)[0])
    mx.save_safetensors(str(file), weights)
    with pytest.raises(UserError) as caught:
        tuning.load(ModelSpec(str(model), str(adapter)))
    assert words in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "type" in words or "NaN" in words:
        with pytest.raises(UserError, match=r"adapters.safetensors"):  # before a worker is started
            read_adapter(str(adapter))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 10**9), ("rank", -1), ("rank", 0), ("rank", "8"), ("rank", True), ("rank", 4.0), ("rank", None),
        ("scale", float("nan")), ("scale", float("inf")), ("scale", 1e300), ("scale", "2"), ("scale", [2]),
        ("dropout", -0.5), ("dropout", 2), ("dropout", "no"), ("keys", 7), ("keys", [7]), ("keys", {"a": 1}),
    ],
)  # fmt: skip
def test_adapters_with_absurd_parameters(name: str, value: object, adapter: Path, model: Path) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"][name] = value
    file.write_text(json.dumps(config))
    for read in (lambda: read_adapter(str(adapter)), lambda: tuning.load(ModelSpec(str(model), str(adapter)))):
        with pytest.raises(UserError, match=rf"adapter_config\.json: {name} is .*; it must be .*; copy it again"):
            read()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", 10**9), ("num_layers", -7), ("num_layers", "all"), ("fine_tune_type", "qlora"),
     ("fine_tune_type", ["lora"]), ("lora_parameters", [1]), ("lora_parameters", "none")],
)  # fmt: skip
def test_adapters_with_absurd_settings(name: str, value: object, adapter: Path, model: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    for read in (lambda: read_adapter(str(adapter)), lambda: tuning.load(ModelSpec(str(model), str(adapter)))):
        with pytest.raises(UserError, match=rf"adapter_config\.json: {name} is .*; it must be "):
            read()


def test_the_largest_rank_costs_nothing_before_it_is_refused(adapter: Path, model: Path) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["rank"] = MOST_RANK
    file.write_text(json.dumps(config))
    before = mx.get_peak_memory()
    with pytest.raises(UserError, match="does not belong to this model"):
        tuning.load(ModelSpec(str(model), str(adapter)))
    assert mx.get_peak_memory() - before < 64 << 20


def test_settings_that_are_no_settings(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    for content, words in (
        ('{"a":' * 1_000_000, "nested too deeply"),
        ("[1, 2]", "must hold a JSON object"),
        ("{", "not readable as JSON"),
        (" " * (MOST_CONFIG_BYTES + 1), "more than such a file has"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=f"adapter_config.json: .*{words}"):
            read_adapter(str(adapter))


@pytest.mark.parametrize(("change", "words"), [(WEIGHTS[n][0], w) for n, w in (
    ("not a number", "NaN"), ("whole numbers", "type I32"), ("one missing", "it has no"), ("too wide", "has shape"),
    ("another name", "is not trained here"),
)])  # fmt: skip
def test_weights_to_begin_with(change: Change, words: str, adapter: Path, model: Path) -> None:
    file = adapter / "adapters.safetensors"
    weights: Any = mx.load(str(file))
    change(weights, sorted(weights)[0])
    mx.save_safetensors(str(file), weights)
    with pytest.raises(UserError, match=rf"--resume-adapter-file .*adapters\.safetensors: .*{words}"):
        InProcess(model, TuningSpec(num_layers=-1, rank=4, initial_weights=str(file)))


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_with_bad_headers(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    (weights,) = folder.glob("model*.safetensors")
    write(weights, BAD["tensors that overlap"][0]["header"])
    for read in (lambda: check_folder(folder), lambda: tuning.load(ModelSpec(str(folder)))):
        with pytest.raises(UserError, match="overlaps what follows; copy or download it again"):
            read()


def test_an_index_that_leads_elsewhere(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama")
    index = folder / "model.safetensors.index.json"
    for name in ("../../../etc/passwd", "/etc/passwd", "a\0b"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="cannot be read as an index"):
            check_folder(folder)


# --- checkpoints and copies -------------------------------------------------------------------------------------------


def ref(path: Path) -> FileRef:
    return FileRef(path.name, sha256_of(path), path.stat().st_size)


def poisoned(source: Path, target: Path, change: Change) -> FileRef:
    """A copy of a file with one float tensor changed, and a reference with the right checksum."""
    arrays: Any = mx.load(str(source))
    name = next(name for name in sorted(arrays) if arrays[name].dtype == mx.float32 and arrays[name].ndim == 2)
    change(arrays, name)
    mx.save_safetensors(str(target), arrays)
    return ref(target)


@pytest.mark.slow
def test_a_worker_refuses_states_that_cannot_be_trained_on(tmp_path: Path, model: Path) -> None:
    job = JobSpec(
        "job", str(tmp_path), ModelSpec(str(model)), 0, TuningSpec(num_layers=1, rank=4), OptimizerSpec("adam")
    )

    async def restored(weights: FileRef, optimizer: FileRef) -> None:
        worker = await LocalWorker.start(tmp_path)
        try:
            await worker.send(Setup(job))
            await worker.send(Restore(0, weights, optimizer))
            while not isinstance(await worker.receive(), Restored):
                pass
        finally:
            await worker.close()

    async def copied() -> Copied:
        worker = await LocalWorker.start(tmp_path)
        try:
            await worker.send(Setup(job))
            await worker.send(CopyState(0))
            while not isinstance(event := await worker.receive(), Copied):
                assert not isinstance(event, Ready) or event.trainable_parameters
            return event
        finally:
            await worker.close()

    good = asyncio.run(copied())
    weights, optimizer = tmp_path / good.weights.name, tmp_path / good.optimizer.name
    asyncio.run(restored(good.weights, good.optimizer))
    nan, whole = WEIGHTS["not a number"][0], WEIGHTS["whole numbers"][0]
    for bad_weights, bad_optimizer, words in (
        (poisoned(weights, tmp_path / "1.safetensors", nan), good.optimizer, "1.safetensors: .*NaN"),
        (good.weights, poisoned(optimizer, tmp_path / "2.safetensors", nan), "2.safetensors: .*NaN"),
        (poisoned(weights, tmp_path / "3.safetensors", whole), good.optimizer, "do not fit: .*int32"),
        (good.weights, poisoned(optimizer, tmp_path / "4.safetensors", whole), "does not fit: .*int32"),
        (replace(good.weights, sha256="0" * 64), good.optimizer, "does not match its checksum"),
    ):
        with pytest.raises(UserError, match=words):
            asyncio.run(restored(bad_weights, bad_optimizer))
    for name in ("../x", "/etc/passwd", "..", ""):
        with pytest.raises(TandemError, match="no name of a file"):
            FileRef(name, "0" * 64, 1)


def test_a_state_with_other_keys_or_shapes_is_refused(model: Path) -> None:
    trained: Trainer = InProcess(model, TuningSpec(num_layers=1, rank=4)).trainer
    state = trained.published()
    name = sorted(state.parameters)[0]
    for parameters in (
        {key: value for key, value in state.parameters.items() if key != name},
        {**state.parameters, "extra": mx.zeros((1,))},
        {**state.parameters, name: mx.zeros((1, 1))},
    ):
        with pytest.raises(UserError, match="do not fit"):
            trained.restore(replace(state, parameters=parameters))
    with pytest.raises(UserError, match="does not fit"):
        trained.restore(replace(state, moments={**state.moments, "extra": mx.zeros((1,))}))


def test_resuming_passes_over_checkpoints_that_hold_no_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoints = Checkpoints(folder, keep_last=None)
    copies = tmp_path / "copies"
    copies.mkdir()
    folder.metrics.touch()
    for step, where in ((1, ""), (2, "weights"), (3, "optimizer")):
        saved = {
            kind: save_arrays(copies / f"{kind}.safetensors", {"a": mx.array([float("nan") if kind == where else 1.0])})
            for kind in ("weights", "optimizer")
        }
        checkpoints.save(Copied(step, requested=True, **saved), copies, Progress(step, step), scheduled=True)
    notes: list[str] = []
    found = checkpoints.newest_intact(notes.append)
    assert found is not None
    assert found.progress.step == 1
    assert len(notes) == 2
    assert "checkpoint 0000003 is damaged: " in notes[0]
    assert notes[0].endswith(
        "optimizer.safetensors: a holds what is no number (NaN or infinite); trying the one before"
    )


def test_descriptions_that_lead_elsewhere_are_no_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number, content in enumerate(
        (
            {"weights": {"name": "../../../etc/passwd", "sha256": "0" * 64, "size": 1}},
            {"progress": {"step": 1, "iteration": 1, "nonsense": 1}},
            {"progress": [1]},
            [],
        )
    ):
        place = folder.checkpoints / f"{number:07d}"
        place.mkdir(parents=True)
        file = {"name": "weights.safetensors", "sha256": "0" * 64, "size": 1}
        whole = {"progress": {"step": 1, "iteration": 1}, "weights": file, "optimizer": file, "scheduled": True}
        (place / "checkpoint.json").write_text(json.dumps(whole | content if isinstance(content, dict) else content))
    deep = folder.checkpoints / "0000009"
    deep.mkdir()
    (deep / "checkpoint.json").write_text("[" * 1_000_000)
    notes: list[str] = []
    assert Checkpoints(folder, keep_last=None).newest_intact(notes.append) is None
    assert len(notes) == 5
