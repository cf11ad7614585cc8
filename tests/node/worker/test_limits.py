"""Limits of memory; the GPU is a stand-in, and what MLX is told is noted."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest

from node.owner import MEMORY_LIMIT
from node.worker import limits

GIB = 1 << 30


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in ("set_memory_limit", "set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda size, name=name: found.update({name: size}))
    return found


def has_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GIB})


def test_a_cpu_has_neither_wired_memory_nor_a_cache(told: dict[str, int]) -> None:
    limits.bound_memory()
    assert told == {}


def test_a_gpu_wires_what_is_recommended_and_keeps_little_of_what_it_frees(
    told: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpu(monkeypatch)
    limits.bound_memory()
    assert told == {"set_wired_limit": 12 * GIB, "set_cache_limit": 3 * GIB}


@pytest.mark.parametrize(("allowed", "room"), [(8 * GIB, 8 * GIB), (64 * GIB, 12 * GIB)])
def test_its_owner_may_allow_less(
    told: dict[str, int], monkeypatch: pytest.MonkeyPatch, allowed: int, room: int
) -> None:
    has_gpu(monkeypatch)
    monkeypatch.setenv(MEMORY_LIMIT, str(allowed))
    limits.bound_memory()
    assert told == {"set_memory_limit": allowed, "set_wired_limit": room, "set_cache_limit": room // 4}
