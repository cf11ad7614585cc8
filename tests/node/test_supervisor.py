"""How a worker's end is told: by what it said, by its log, or else by how it ended."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from node import wire
from node.channel import AsyncChannel, BlockingChannel, frame
from node.errors import OutOfMemory, TandemError, UserError, WorkerError, WorkerLost, mentions_memory
from node.events import Event, Failed, Heartbeat
from node.spec import CopyState, JobSpec, ModelSpec, Setup
from node.supervisor import LOG_NAME, LocalWorker
from node.worker.inbox import PARENT_GONE, UNREADABLE

METAL = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution"
    " failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)


def run(folder: Path, work: Callable[[LocalWorker], Awaitable[None]]) -> None:
    async def conversation() -> None:
        worker = await LocalWorker.start(folder)
        try:
            await work(worker)
        finally:
            await worker.close()

    asyncio.run(conversation())


async def end_of(worker: LocalWorker) -> TandemError:
    """The error that ends the stream of events, within a minute."""
    try:
        async with asyncio.timeout(60):
            while isinstance(await worker.receive(), Heartbeat):
                pass
    except TandemError as error:
        return error
    raise AssertionError("an event came instead")


@pytest.mark.parametrize(
    ("garbage", "word"),
    [(frame(b"\xff\xff\xff"), "not a Request"), (b"\xff\xff\xff\xff", "at most"), (frame(b""), "without a body")],
    ids=["no message", "too large", "empty"],
)
def test_a_worker_that_cannot_read_its_requests_ends(tmp_path: Path, garbage: bytes, word: str) -> None:
    async def work(worker: LocalWorker) -> None:
        await asyncio.get_running_loop().sock_sendall(worker._channel._outgoing, garbage)
        error = await end_of(worker)
        assert type(error) is WorkerLost
        assert f"ended with exit code {UNREADABLE}" in str(error)
        assert word in str(error)

    run(tmp_path, work)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have this shell script run in the worker's place."""

    def replace(script: str) -> None:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return replace


def test_an_abort_for_want_of_memory_is_told_from_the_log(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    stand_in(f"echo '{METAL}' >&2\necho 'and a line after it' >&2\nkill -ABRT $$")

    async def work(worker: LocalWorker) -> None:
        error = await end_of(worker)
        assert type(error) is OutOfMemory
        assert "SIGABRT" in str(error)
        assert "Insufficient Memory" in str(error)

    run(tmp_path, work)


def test_what_an_earlier_worker_logged_does_not_count(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    (tmp_path / LOG_NAME).write_text(f"{METAL}\n")
    stand_in("kill -ABRT $$")

    async def work(worker: LocalWorker) -> None:
        error = await end_of(worker)
        assert type(error) is WorkerLost
        assert str(error) == "the worker was killed by SIGABRT"

    run(tmp_path, work)


def test_sending_to_a_worker_that_failed_raises_what_it_said(tmp_path: Path) -> None:
    async def work(worker: LocalWorker) -> None:
        await worker.send(Setup(JobSpec("job", str(tmp_path / "job"), ModelSpec(str(tmp_path / "missing")))))
        await asyncio.wait_for(worker._process.wait(), 60)
        for _ in range(2):
            with pytest.raises(UserError, match="cannot load the model"):
                await worker.send(CopyState(1))
        assert isinstance(await end_of(worker), UserError)

    run(tmp_path, work)


def test_a_wait_for_events_and_a_failing_send_may_meet(tmp_path: Path) -> None:
    async def work(worker: LocalWorker) -> None:
        errors = await asyncio.gather(end_of(worker), worker._lost())
        assert [type(error) for error in errors] == [WorkerLost, WorkerLost]
        assert f"exit code {PARENT_GONE}" in str(errors[0])

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("event", "kind", "message"),
    [
        (Failed("user", "no such model"), UserError, "no such model"),
        (Failed("memory", "it is full"), OutOfMemory, "the model's process ran out of memory: it is full"),
        (Failed("disk", "[Errno 28] No space left"), TandemError, "[Errno 28] No space left"),
        (Failed("internal", "KeyError: 3"), WorkerError, "the worker failed: KeyError: 3 (details in {log})"),
    ],
)
def test_each_kind_of_failure_has_its_error(
    tmp_path: Path, stand_in: Callable[[str], None], event: Event, kind: type[TandemError], message: str
) -> None:
    script = (
        "import socket, sys; socket.socket(fileno=int(sys.argv[1]))"
        f".sendall(bytes.fromhex('{frame(wire.encode_event(event, 0)).hex()}'))"
    )
    stand_in(f'exec {sys.executable} -c "{script}" "$5"')  # after -P -m node.worker --fd

    async def work(worker: LocalWorker) -> None:
        error = await end_of(worker)
        assert type(error) is kind
        assert str(error) == message.format(log=tmp_path / LOG_NAME)

    run(tmp_path, work)


def test_what_has_arrived_can_be_read_after_the_connection_broke() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        channel = await AsyncChannel.open(ours)
        await channel.send(b"nobody reads this, so that closing resets the connection")
        BlockingChannel(theirs).send(b"first")
        BlockingChannel(theirs).send(b"second")
        theirs.close()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            await channel.send(b"to nobody")
        assert [await channel.receive() for _ in range(3)] == [b"first", b"second", None]
        channel.close()

    asyncio.run(work())


def test_a_message_that_was_cut_short_is_followed_by_none() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        channel = await AsyncChannel.open(ours)
        with theirs:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await channel.send(bytes(16 << 20))
            with pytest.raises(ConnectionError, match="cut short"):
                await channel.send(b"would be taken for the rest of it")
            channel.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    "text",
    [
        METAL,
        "[metal::malloc] Attempting to allocate 9663676416 bytes which is greater than the maximum",
        "[malloc] Unable to allocate 18446744073709551615 bytes.",
        "Unable to allocate 1.00 TiB for an array with shape (1099511627776,)",
        "MemoryError",
        "std::bad_alloc",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_words_for_a_lack_of_memory(text: str) -> None:
    assert mentions_memory(text)


@pytest.mark.parametrize(
    "text",
    [
        "malloc(): corrupted top size",
        "python(123) malloc: *** error for object 0x1: pointer being freed was not allocated",
        "RuntimeError: [matmul] Last dimension of first input must match",
    ],
)
def test_other_ends_are_not_taken_for_it(text: str) -> None:
    assert not mentions_memory(text)
