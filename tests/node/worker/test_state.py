from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from node.copies import RECORD_SUFFIX, newest_copy
from node.errors import UserError
from node.events import Copied, CopyFailed, Event
from node.files import sha256_of
from node.spec import Restore
from node.worker.state import KEPT_COPIES, Copier, load_copy, save_arrays
from node.worker.trainer import Published


def state(step: int) -> Published:
    parameters = {"layers.0.lora_a": mx.full((8, 4), step), "layers.0.lora_b": mx.zeros((4, 8), mx.bfloat16)}
    published = Published(step, parameters, {"step": mx.array(step, mx.uint64), "states.0.m": mx.arange(32.0)})
    mx.eval(published.parameters, published.moments)
    return published


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[tuple[Copier, list[Event]]]:
    events: list[Event] = []
    copier = Copier(tmp_path, lambda event, _: events.append(event))
    yield copier, events
    copier.close()


def test_a_copy_is_two_files_that_load_again(tmp_path: Path, copied: tuple[Copier, list[Event]]) -> None:
    copier, events = copied
    copier.copy(state(3), requested=True)
    copier.wait()
    [event] = events
    assert isinstance(event, Copied)
    assert (event.step, event.requested) == (3, True)
    record = f"0000003-checkpoint{RECORD_SUFFIX}"
    assert {path.name for path in tmp_path.iterdir()} == {event.weights.name, event.optimizer.name, record}
    for ref in (event.weights, event.optimizer):
        path = tmp_path / ref.name
        assert (path.stat().st_size, sha256_of(path)) == (ref.size, ref.sha256)
    loaded = load_copy(tmp_path, Restore(3, event.weights, event.optimizer))
    assert loaded.step == 3
    for ours, theirs in ((loaded.parameters, state(3).parameters), (loaded.moments, state(3).moments)):
        assert set(ours) == set(theirs)
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
        assert [ours[name].dtype for name in ours] == [theirs[name].dtype for name in ours]


def test_a_copy_says_what_it_is_to_whoever_finds_it(tmp_path: Path, copied: tuple[Copier, list[Event]]) -> None:
    copier, events = copied
    copier.copy(state(3), requested=False, steps=(b"two", b"three"))
    copier.copy(state(4), requested=True, steps=(b"three", b"four"))
    copier.wait()
    third, fourth = events
    assert isinstance(third, Copied)
    assert isinstance(fourth, Copied)
    found = newest_copy(tmp_path)
    assert found is not None
    assert (found.step, found.steps) == (4, (b"three", b"four"))
    assert [(file.name, file.sha256, file.size) for file in found.files] == [
        (ref.name, ref.sha256, ref.size) for ref in (fourth.weights, fourth.optimizer)
    ]
    # As when a checkpoint has been made of it: without both of its files it is none.
    (tmp_path / fourth.weights.name).unlink()
    found = newest_copy(tmp_path)
    assert found is not None
    assert (found.step, found.steps, found.weights.name) == (3, (b"two", b"three"), third.weights.name)
    (tmp_path / third.optimizer.name).write_bytes(b"cut short")
    assert newest_copy(tmp_path) is None


def test_a_copy_waits_for_the_one_before_unless_it_is_asked_for(tmp_path: Path) -> None:
    disk, began = threading.Event(), threading.Event()
    events: list[Event] = []

    def emit(event: Event, _: int) -> None:
        began.set()
        assert disk.wait(20)
        events.append(event)

    copier = Copier(tmp_path, emit)
    copier.copy(state(5), requested=False)
    assert began.wait(20)
    copier.copy(state(7), requested=True)
    beyond = threading.Thread(target=copier.copy, args=(state(10),), kwargs={"requested": False})
    beyond.start()
    beyond.join(0.2)
    assert beyond.is_alive(), "steps would be trained beyond two intervals of what is written"
    disk.set()
    beyond.join(20)
    assert not beyond.is_alive()
    copier.close()
    assert [event.step for event in events if isinstance(event, Copied)] == [5, 7, 10]


@pytest.mark.parametrize("damage", ["one bit", "cut short", "gone"])
@pytest.mark.parametrize("which", ["weights", "optimizer"])
def test_a_damaged_copy_is_refused(tmp_path: Path, damage: str, which: str) -> None:
    weights = save_arrays(tmp_path / "w.safetensors", state(1).parameters)
    moments = save_arrays(tmp_path / "o.safetensors", state(1).moments)
    path = tmp_path / (weights if which == "weights" else moments).name
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"step 1 is damaged: {path.name}"):
        load_copy(tmp_path, Restore(1, weights, moments))


def test_only_the_newest_own_copies_are_kept(tmp_path: Path, copied: tuple[Copier, list[Event]]) -> None:
    copier, events = copied
    copier.copy(state(1), requested=True)
    for step in range(2, 6):
        copier.copy(state(step), requested=False)
        copier.wait()  # as full fine-tuning does after each copy
    assert [event.step for event in events if isinstance(event, Copied)] == [1, 2, 3, 4, 5]
    kept = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert kept == {"0000001-checkpoint", "0000004", "0000005"}
    assert KEPT_COPIES == 2


def test_copying_waits_when_the_disk_is_slower_than_the_steps(tmp_path: Path) -> None:
    """Two states may wait for the disk, a third would hold memory without bound."""
    go_on, writing = threading.Event(), threading.Event()
    events: list[Event] = []

    def emit(event: Event, _: int) -> None:
        writing.set()
        go_on.wait(30)
        events.append(event)

    copier = Copier(tmp_path, emit)
    copier.copy(state(1), requested=True)
    assert writing.wait(30)
    copier.copy(state(2), requested=True)
    copier.copy(state(3), requested=True)
    fourth = threading.Thread(target=copier.copy, args=(state(4),), kwargs={"requested": True})
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive()
    go_on.set()
    fourth.join(30)
    copier.close()
    assert [event.step for event in events if isinstance(event, Copied)] == [1, 2, 3, 4]


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets no file grow beyond a size, as a full disk does: Python ignores the signal, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("limit", "weights", "moments"),
    [(65536, 100_000, 10), (65536, 10, 100_000), (20, 100, 100), (65536, 16_380, 16_380)],
    ids=["weights too large", "optimizer too large", "no room for a header", "a few bytes too many"],
)
def test_a_full_disk_leaves_no_broken_file(
    tmp_path: Path, small_files: Callable[[int], None], limit: int, weights: int, moments: int
) -> None:
    events: list[Event] = []
    copier = Copier(tmp_path, lambda event, _: events.append(event))
    large = Published(7, {"w": mx.ones(weights)}, {"m": mx.ones(moments)})
    mx.eval(large.parameters, large.moments)
    small_files(limit)
    copier.copy(large, requested=True)
    copier.wait()
    assert list(tmp_path.iterdir()) == []
    small_files(1 << 20)
    copier.copy(large, requested=True)
    copier.close()
    [failed, copied] = events
    assert isinstance(failed, CopyFailed)
    assert (failed.step, failed.requested) == (7, True)
    assert failed.reason.startswith("cannot write")
    # Once there is room the next copy is written.
    assert isinstance(copied, Copied)


def test_whatever_goes_wrong_the_copier_goes_on(tmp_path: Path) -> None:
    """A thread that died would let the training wait for ever once two more states are handed over."""
    events: list[tuple[Event, int]] = []
    copier = Copier(tmp_path, lambda event, generation: events.append((event, generation)))
    broken: Any = "no arrays"
    for step in range(1, 5):
        copier.copy(Published(step, state(step).parameters, broken), requested=False, generation=step)
    copier.copy(state(5), requested=True, generation=6)
    copier.close()
    *failed, (copied, generation) = events
    for n, (event, stamp) in enumerate(failed, 1):
        assert isinstance(event, CopyFailed)
        assert (event.step, stamp) == (n, n)
        assert "TypeError" in event.reason
    assert len(failed) == 4
    assert isinstance(copied, Copied)
    assert generation == 6
    # Nothing is left of the copies that failed in their second half.
    record = f"0000005-checkpoint{RECORD_SUFFIX}"
    assert {path.name for path in tmp_path.iterdir()} == {copied.weights.name, copied.optimizer.name, record}
