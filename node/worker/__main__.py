"""``python -P -m node.worker --fd N``: serve the socket that the supervisor handed over."""

from __future__ import annotations

import argparse
import signal
import socket
import sys

from node.channel import BlockingChannel
from node.in_use import hold
from node.worker.inbox import Inbox


def main() -> int:
    """Run until told to stop, or until the supervisor is gone."""
    parser = argparse.ArgumentParser(prog="node.worker")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the connected socket")
    arguments = parser.parse_args()
    hold()  # a program of somebody else's may have started us, by the API
    # Ctrl-C in a terminal reaches every process of the foreground: only the coordinator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox = Inbox(BlockingChannel(socket.socket(fileno=arguments.fd)))

    import mlx.core as mx

    from node.worker.imports import import_mlx_lm

    import_mlx_lm()
    from node.worker.loop import Worker

    if mx.default_device().type == mx.cpu:
        # There, a C++ compiler would be started for every kernel, for next to no gain.
        mx.disable_compile()
    return 0 if Worker(inbox).run() else 1


if __name__ == "__main__":
    sys.exit(main())
