"""``python -P -m node.reducer --fd N --memory M --bytes B --owed O``: serve the worker that started us.

Commands come and answers go as lines of JSON: first ``{"form": …, "layout": …}``, then ``{"sum": count, "first":
place}`` for each run of numbers, of which several may wait; with ``exact`` and ``place`` in it the numbers after the
first so many are rounded to bf16 on their way, and what that keeps back of them stands at the memory's end, from that
place on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading

from node.reducer import shared

WORKER_GONE = 3


def main() -> int:
    """Run until the worker is gone, says so, or a sum fails."""
    parser = argparse.ArgumentParser(prog="node.reducer")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the connected socket")
    parser.add_argument("--memory", type=int, required=True, help="descriptor of the shared memory")
    parser.add_argument("--bytes", type=int, required=True, help="its size")
    parser.add_argument("--owed", type=int, default=0, help="numbers at its end: what rounding keeps back")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=arguments.fd)
    memory = shared.attach(arguments.memory, arguments.bytes)
    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # In a thread: so the process ends with its worker even from within a sum that hangs.
    threading.Thread(target=_listen, args=(connection, commands), name="commands", daemon=True).start()

    from node.reducer.ring import NotFormed, add_up, form
    from node.reducer.rounded import RoundedSums

    try:
        command = json.loads(commands.get())
        group = form(command["form"], command["layout"])
    except NotFormed as error:
        return _say(connection, {"error": str(error)}, 1)
    _say(connection, {"formed": True}, 0)
    floats = memoryview(memory).cast("f")
    numbers, owed = floats[: len(floats) - arguments.owed], floats[len(floats) - arguments.owed :]
    rounded = RoundedSums(group)
    while True:
        command = json.loads(commands.get())
        first, count, exact = command["first"], command["sum"], command.get("exact")
        try:
            if exact is None:
                add_up(group, numbers[first : first + count])
            else:
                place = command["place"]
                rounded.add_up(numbers[first : first + count], owed[place : place + count], exact)
        except RuntimeError as error:
            return _say(connection, {"error": " ".join(str(error).split())}, 1)
        _say(connection, {"summed": count}, 0)


def _listen(connection: socket.socket, commands: queue.SimpleQueue[bytes]) -> None:
    # A worker that is killed with answers of ours unread breaks the connection, or leaves half a command.
    with contextlib.suppress(OSError), connection.makefile("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                commands.put(line)
    os._exit(WORKER_GONE)


def _say(connection: socket.socket, answer: dict[str, object], code: int) -> int:
    try:
        connection.sendall(json.dumps(answer).encode() + b"\n")
    except OSError:
        os._exit(WORKER_GONE)
    if code:
        # Not by returning from main: a dead group's threads may keep the interpreter from ending.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
