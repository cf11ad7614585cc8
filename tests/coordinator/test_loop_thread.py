"""Work in a thread with a loop of its own: its result, its failure, its end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading

import pytest

from coordinator.interrupts import SIGNALS, Interrupts
from coordinator.loop_thread import LoopThread, run_to_end
from node.errors import Interrupted, UserError


async def answer() -> int:
    return 42


async def fail() -> int:
    raise UserError("no such thing")


async def forever() -> int:
    await asyncio.Event().wait()
    return 0


def test_the_result_comes_with_and_without_a_loop_around() -> None:
    async def cell() -> int:
        return run_to_end(answer)

    assert run_to_end(answer) == 42
    assert asyncio.run(cell()) == 42
    with pytest.raises(UserError, match="no such thing"):
        run_to_end(fail)


@pytest.mark.parametrize("started", [True, False])
def test_what_is_cancelled_is_interrupted(started: bool) -> None:
    begun = threading.Event()

    async def work() -> int:
        begun.set()
        return await forever()

    thread = LoopThread(work, "counting")
    if not started:
        thread.cancel()
    thread.start()
    assert not started or begun.wait(30)
    thread.cancel()
    with pytest.raises(Interrupted, match="counting: left at once"):
        thread.outcome.result(30)
    assert begun.is_set() == started


def test_what_a_program_leaves_running_is_stopped_at_its_end() -> None:
    program = (
        "import asyncio, threading\n"
        "from coordinator.loop_thread import LoopThread\n"
        "begun, stop, saved = threading.Event(), asyncio.Event(), []\n"
        "async def work():\n"
        "    begun.set()\n"
        "    await stop.wait()\n"
        "    saved.append(await asyncio.to_thread(lambda: 'saved'))\n"
        "thread = LoopThread(work, 'counting', lambda: thread.call(stop.set), lambda: ''.join(saved))\n"
        "thread.start()\n"
        "assert begun.wait(30)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "counting: the program ended first; saved\n"


def test_signals_stop_first_and_abort_then_and_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    said: list[str] = []

    def signalled() -> None:
        with Interrupts(lambda: said.append("stop"), lambda: said.append("abort")) as interrupts:
            assert not interrupts.pressed
            signal.raise_signal(signal.SIGTERM)
            assert (said, interrupts.pressed) == (["stop"], True)
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        signalled()
    assert said == ["stop", "abort"]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[object] = []

    def run() -> None:
        with Interrupts(pytest.fail, pytest.fail):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert found == [before]


def test_who_outlives_a_terminal_does_so_here_too() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts(pytest.fail, pytest.fail) as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts.pressed
    finally:
        signal.signal(signal.SIGHUP, before)
