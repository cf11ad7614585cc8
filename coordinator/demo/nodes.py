"""Two nodes on this machine: real ``node serve`` processes that are found by Bonjour on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from node.errors import TandemError

READY_SECONDS = 60.0
LEAVING_SECONDS = 20.0
_SERVE = "import sys; from node.cli import main; sys.exit(main())"


def surroundings() -> dict[str, str]:
    """Environment in which nodes and coordinator of one demo find each other, and nobody else finds them."""
    return {"TANDEM_BONJOUR": "127.0.0.1", "TANDEM_FLEET": f"demo-{secrets.token_hex(4)}"}


@contextlib.contextmanager
def serving(names: Sequence[str]) -> Iterator[list[str]]:
    """Nodes of these names, until the block ends; their addresses.

    Raises:
        TandemError: one does not start.
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process(name)) for name in names]
        yield [_ready(process, name) for process, name in zip(processes, names, strict=True)]


@contextlib.contextmanager
def _process(name: str) -> Iterator[subprocess.Popen[str]]:
    options = ["--name", name, "--port", "0", "--host", "127.0.0.1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _SERVE, "serve", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # Ctrl-C in the terminal is the demo's to deal with.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=LEAVING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _ready(process: subprocess.Popen[str], name: str) -> str:
    """Wait for a node to say that it serves; its address."""
    said: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    output = process.stdout
    threading.Thread(target=lambda: said.put(output.readline()), daemon=True).start()
    try:
        line = said.get(timeout=READY_SECONDS)
    except queue.Empty:
        raise TandemError(f"node {name} did not start within {READY_SECONDS:.0f} s") from None
    if not line:
        _, errors = process.communicate()
        raise TandemError(f"node {name} did not start: {' '.join(errors.split()[-40:])}")
    return f"127.0.0.1:{json.loads(line)['port']}"
