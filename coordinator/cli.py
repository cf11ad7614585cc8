"""The ``coordinator`` command. Starts in a moment: commands are imported when they are called."""

from __future__ import annotations

from importlib.metadata import version

import click

from node.clikit import LazyCommand, LazyGroup, run_cli

COMMANDS = {
    "train": LazyCommand("coordinator.commands.train:train", "Fine-tune a model."),
    "watch": LazyCommand("coordinator.commands.watch:watch", "Show a run that is at work elsewhere, as train does."),
    "stop": LazyCommand("coordinator.commands.stop:stop", "Stop a run: it saves and ends."),
    "status": LazyCommand("coordinator.commands.status:status", "What runs now, here."),
    "runs": LazyCommand("coordinator.commands.runs:runs", "Runs that are and were: list, show, compare, rm."),
    "test": LazyCommand("coordinator.commands.test:test", "Loss and perplexity of a test set."),
    "generate": LazyCommand("coordinator.commands.generate:generate", "Text from a model, with or without an adapter."),
    "fuse": LazyCommand("coordinator.commands.fuse:fuse", "Merge an adapter; export GGUF or PEFT; upload."),
    "nodes": LazyCommand("coordinator.commands.nodes:nodes", "Who is there: machines that can take part."),
    "doctor": LazyCommand("coordinator.commands.doctor:doctor", "What is wrong with the machines and their links."),
    "pair": LazyCommand("coordinator.commands.pair:pair", "Have a node and this machine trust each other."),
    "unpair": LazyCommand("coordinator.commands.pair:unpair", "Trust a machine no more."),
    "invite": LazyCommand("coordinator.commands.pair:invite", "A token for a node to join by itself."),
    "dashboard": LazyCommand("coordinator.commands.dashboard:dashboard", "Past and running runs in the browser."),
    "estimate": LazyCommand("coordinator.commands.estimate:estimate", "Memory a training would take, by method."),
    "simulate": LazyCommand("coordinator.commands.simulate:simulate", "Step time of a fleet, before there is one."),
    "data": LazyCommand("coordinator.commands.data:data", "Check, split and convert data."),
    "demo": LazyCommand("coordinator.commands.demo:demo", "The whole story on this machine, with two nodes, offline."),
}


@click.group("coordinator", cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("mlx-tandem"), prog_name="mlx-tandem")
def coordinator() -> None:
    """Fine-tune language models with MLX on all your Macs, exactly and resumably."""


def main() -> int:
    """Run the ``coordinator`` script and return its exit code."""
    return run_cli(coordinator, prog_name="coordinator")
