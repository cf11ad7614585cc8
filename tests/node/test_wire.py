"""Every request and event survives the wire, and foreign bytes are refused."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import numpy as np
import pytest

from node import events, spec, wire
from node.errors import TandemError


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and np.array_equal(left, right)
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            equal(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left)
        )
    if isinstance(left, tuple):
        return isinstance(right, tuple) and len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and bool(left == right)


def example(hint: Any, seed: int) -> Any:
    """A value of this type that differs from every default."""
    inner, _ = wire._strip_optional(hint)
    origin = typing.get_origin(inner)
    if inner is spec.Rows:  # its arrays must fit together
        counts = np.arange(seed, seed + 3, dtype=np.int32)
        tokens, spans = (np.arange(factor * counts.sum(), dtype=np.int32) for factor in (1, 2))
        return spec.Rows(counts + 1, counts, tokens, counts, spans, 7 + seed)
    if isinstance(inner, type) and dataclasses.is_dataclass(inner):
        hints = typing.get_type_hints(inner)
        return inner(**{name: example(kind, seed + i) for i, (name, kind) in enumerate(hints.items())})
    if origin is tuple:
        return (example(typing.get_args(inner)[0], seed), example(typing.get_args(inner)[0], seed + 1))
    if origin is np.ndarray:
        return np.arange(seed, seed + 3, dtype=np.int32)
    if origin is dict:
        return {"name": "cosine_decay", "arguments": [0.1, seed]}
    if origin is typing.Literal:
        return typing.get_args(inner)[-1]
    return {int: 7 + seed, float: 0.5 + seed, str: f"text {seed}", bytes: bytes([seed, 0, 255]), bool: True}[inner]


REQUESTS = typing.get_args(spec.Request)
EVENTS = typing.get_args(events.WorkerEvent)


@pytest.mark.parametrize("cls", REQUESTS, ids=lambda c: c.__name__)
def test_requests_round_trip(cls: type) -> None:
    request = example(cls, 1)
    generation, back = wire.decode_request(wire.encode_request(request, 5))
    assert generation == 5
    assert equal(request, back)


@pytest.mark.parametrize("cls", EVENTS, ids=lambda c: c.__name__)
def test_events_round_trip(cls: type) -> None:
    event = example(cls, 1)
    generation, back = wire.decode_event(wire.encode_event(event, 9))
    assert generation == 9
    assert equal(event, back)


def test_none_and_empty_are_told_apart() -> None:
    job = spec.JobSpec(job="j", folder="f", model=spec.ModelSpec("m"))
    assert wire.decode_request(wire.encode_request(spec.Setup(job), 0))[1] == spec.Setup(job)
    for keys in (None, (), ("self_attn.q_proj",)):
        setup = spec.Setup(dataclasses.replace(job, tuning=spec.TuningSpec(keys=keys), optimizer=spec.OptimizerSpec()))
        assert wire.decode_request(wire.encode_request(setup, 0))[1] == setup


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"", b"\x08\x01"])
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode_request(data)
    with pytest.raises(wire.WireError):
        wire.decode_event(data)


BAD_NAMES = ["", ".", "..", "../secret", "/etc/passwd", "a/b", "a\\b", "a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_outside_the_folder_cannot_be_named(name: str) -> None:
    with pytest.raises(TandemError, match="no name of a file"):
        spec.FileRef(name, "00", 1)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_nor_can_a_message_name_one(name: str) -> None:
    from tandem.v1 import worker_pb2

    good = worker_pb2.FileRef(name="...0000001-checkpoint.weights.safetensors", sha256="00", size=1)
    bad = worker_pb2.FileRef(name=name, sha256="00", size=1)
    restore = worker_pb2.Request(restore=worker_pb2.Restore(step=1, weights=good, optimizer=bad))
    with pytest.raises(wire.WireError, match="no name of a file"):
        wire.decode_request(restore.SerializeToString())
    copied = worker_pb2.Event(copied=worker_pb2.Copied(step=1, weights=bad, optimizer=good))
    with pytest.raises(wire.WireError, match="no name of a file"):
        wire.decode_event(copied.SerializeToString())
    copied.copied.weights.CopyFrom(good)
    assert isinstance(wire.decode_event(copied.SerializeToString())[1], events.Copied)


def test_a_broken_mapping_is_refused() -> None:
    from tandem.v1 import worker_pb2

    job = worker_pb2.JobSpec(tuning=worker_pb2.TuningSpec(), optimizer=worker_pb2.OptimizerSpec(arguments_json="{"))
    with pytest.raises(wire.WireError, match="setup"):
        wire.decode_request(worker_pb2.Request(setup=worker_pb2.Setup(job=job)).SerializeToString())


def test_an_odd_array_is_refused() -> None:
    from tandem.v1 import worker_pb2

    message = worker_pb2.Request(generate=worker_pb2.Generate(prompt=b"abc"))
    with pytest.raises(wire.WireError, match="3 bytes"):
        wire.decode_request(message.SerializeToString())
