"""The ``node`` command: one machine of a fleet."""

from __future__ import annotations

from importlib.metadata import version

import click

from node.clikit import LazyCommand, LazyGroup, run_cli

COMMANDS = {
    "serve": LazyCommand("node.commands.serve:serve", "Take part: be found, take jobs, give models."),
    "pair": LazyCommand("node.commands.pair:pair", "Show a new code, to be paired with another machine."),
    "forget": LazyCommand("node.commands.forget:forget", "Trust a paired machine no more."),
    "pause": LazyCommand("node.commands.wishes:pause", "Take no further jobs."),
    "resume": LazyCommand("node.commands.wishes:resume", "Take jobs again."),
    "store": LazyCommand("node.commands.store:store", "List and prune the models that are kept here."),
    "doctor": LazyCommand("node.commands.doctor:doctor", "What is wrong with this machine, and what mends it."),
    "info": LazyCommand("node.commands.info:info", "What this machine is: chip, memory, versions."),
}


@click.group("node", cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("mlx-tandem"), message="%(prog)s %(version)s")
def cli() -> None:
    """One machine of a fleet that trains together."""


def main() -> int:
    """Run the ``node`` script and return its exit code."""
    return run_cli(cli, prog_name="node")
