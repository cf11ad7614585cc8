"""Between the dataclasses of ``node.spec`` and ``node.events`` and the protobuf messages of ``tandem.v1``.

Fields correspond by name. Arrays and tuples of integers become little-endian int32 bytes, mappings become JSON in a
field ``<name>_json``. None is told from empty by absence (messages), by "" (mappings) or by ``has_<name>`` (tuples).
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from node import events, spec
from node.errors import TandemError
from tandem.v1 import worker_pb2

_INT32 = np.dtype("<i4")
_known_hints: dict[type, dict[str, Any]] = {}
_M = TypeVar("_M", bound=Message)


class WireError(TandemError):
    """Bytes that are no message of ours."""


def encode_request(request: spec.Request, generation: int) -> bytes:
    """The bytes of one request."""
    message = worker_pb2.Request(generation=generation)
    fill(request, getattr(message, _field_name(type(request))))
    return message.SerializeToString()


def decode_request(data: bytes) -> tuple[int, spec.Request]:
    """The generation and the request in these bytes.

    Raises:
        WireError: they are no request.
    """
    message = _parse(worker_pb2.Request(), data)
    return message.generation, _read_body(message, typing.get_args(spec.Request))


def encode_event(event: events.Event, generation: int) -> bytes:
    """The bytes of one event of a worker; a ``Condition``, which nodes say, has none."""
    message = worker_pb2.Event(generation=generation)
    fill(event, getattr(message, _field_name(type(event))))
    return message.SerializeToString()


def decode_event(data: bytes) -> tuple[int, events.WorkerEvent]:
    """The generation and the event in these bytes.

    Raises:
        WireError: they are no event.
    """
    message = _parse(worker_pb2.Event(), data)
    return message.generation, _read_body(message, typing.get_args(events.WorkerEvent))


def event_kind(data: bytes) -> str:
    """Which event these bytes hold, as its field is called: ``step_done``; cheaper than decoding it.

    Raises:
        WireError: they are no event.
    """
    return _parse(worker_pb2.Event(), data).WhichOneof("body") or ""


def _parse(message: _M, data: bytes) -> _M:
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"not a {type(message).__name__} of tandem.v1: {error}") from error
    return message


def _read_body(message: Any, candidates: tuple[type, ...]) -> Any:
    name = message.WhichOneof("body")
    for candidate in candidates:
        if _field_name(candidate) == name:
            try:
                return read(candidate, getattr(message, name))
            except (TandemError, ValueError) as error:  # a field's text or array, or a dataclass that refuses a value
                raise WireError(f"a {name} of tandem.v1 with a value that is refused: {error}") from error
    raise WireError(f"a {type(message).__name__} without a body that this version knows")


def _field_name(cls: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


def _hints(cls: type) -> dict[str, Any]:
    """Resolved annotations; resolving them anew for every message would cost more than the message."""
    if cls not in _known_hints:
        _known_hints[cls] = typing.get_type_hints(cls)
    return _known_hints[cls]


def fill(value: Any, message: Any) -> None:
    """Copy a dataclass into the message that corresponds to it."""
    message.SetInParent()
    hints = _hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        hint, optional = _strip_optional(hints[field.name])
        origin = typing.get_origin(hint)
        if origin is dict:
            setattr(message, f"{field.name}_json", "" if item is None else json.dumps(item))
        elif origin is tuple:
            _fill_tuple(item, typing.get_args(hint)[0], message, field.name, optional)
        elif dataclasses.is_dataclass(hint):
            if item is not None:
                fill(item, getattr(message, field.name))
        elif origin is np.ndarray:
            setattr(message, field.name, item.astype(_INT32, copy=False).tobytes())
        else:
            setattr(message, field.name, item)


def _fill_tuple(items: tuple[Any, ...] | None, element: Any, message: Any, name: str, optional: bool) -> None:
    if optional:
        setattr(message, f"has_{name}", items is not None)
    if element is int:
        setattr(message, name, np.array(items or (), _INT32).tobytes())
    elif dataclasses.is_dataclass(element):
        for item in items or ():
            fill(item, getattr(message, name).add())
    else:
        getattr(message, name).extend(items or ())


def read(cls: Any, message: Any) -> Any:
    """A dataclass from the message that corresponds to it."""
    values: dict[str, Any] = {}
    for name, full_hint in _hints(cls).items():
        hint, optional = _strip_optional(full_hint)
        origin = typing.get_origin(hint)
        if origin is dict:
            text = getattr(message, f"{name}_json")
            values[name] = json.loads(text) if text else None
        elif origin is tuple:
            missing = optional and not getattr(message, f"has_{name}")
            values[name] = None if missing else _read_tuple(typing.get_args(hint)[0], getattr(message, name))
        elif dataclasses.is_dataclass(hint):
            values[name] = None if optional and not message.HasField(name) else read(hint, getattr(message, name))
        elif origin is np.ndarray:
            values[name] = _read_array(getattr(message, name))
        else:
            values[name] = getattr(message, name)
    return cls(**values)


def _read_tuple(element: Any, items: Any) -> tuple[Any, ...]:
    if element is int:
        return tuple(int(item) for item in _read_array(items))
    if dataclasses.is_dataclass(element):
        return tuple(read(element, item) for item in items)
    return tuple(items)


def _read_array(data: bytes) -> spec.Int32:
    if len(data) % _INT32.itemsize:
        raise WireError(f"an int32 array of {len(data)} bytes")
    return np.frombuffer(data, _INT32)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (inner,) = (item for item in typing.get_args(hint) if item is not type(None))
        return inner, True
    return hint, False
