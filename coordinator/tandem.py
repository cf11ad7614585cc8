"""The ``tandem`` command: all of ``coordinator`` and ``node`` in one, for machines where ``node`` is Node.js."""

from __future__ import annotations

from importlib.metadata import version

import click

from coordinator.cli import COMMANDS
from node.cli import COMMANDS as NODE_COMMANDS
from node.clikit import LazyGroup, run_cli

_NODE = {f"node-{name}" if name in COMMANDS else name: command for name, command in NODE_COMMANDS.items()}
"""Both have a `pair` and a `doctor`: the node's are `tandem node-pair` and `tandem node-doctor`."""


@click.group(
    "tandem",
    cls=LazyGroup,
    lazy={**COMMANDS, **_NODE},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(version("mlx-tandem"), prog_name="mlx-tandem")
def tandem() -> None:
    """Fine-tune language models with MLX, exactly and resumably."""


def main() -> int:
    """Run the ``tandem`` script and return its exit code."""
    return run_cli(tandem, prog_name="tandem")
