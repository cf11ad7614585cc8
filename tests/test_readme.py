"""What the README tells people to type is what the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from coordinator.cli import COMMANDS, coordinator
from coordinator.tandem import tandem
from node.cli import cli as node

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
PROGRAMS: dict[str, click.Group] = {"coordinator": coordinator, "node": node, "tandem": tandem}


def commands() -> list[str]:
    """The lines in code blocks that call one of our programs."""
    # Blocks open with or without a language; only those without hold commands.
    blocks = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S) if not language]
    lines = [line.removeprefix("deploy/run ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


@pytest.mark.parametrize("line", commands())
def test_every_example_is_understood(line: str) -> None:
    program, *arguments = shlex.split(line)
    command: click.Command = PROGRAMS[program]
    context = click.Context(command)
    # A group that is a command of its own needs no further word.
    while isinstance(command, click.Group) and (arguments or not command.invoke_without_command):
        found = command.get_command(context, arguments.pop(0))
        assert found is not None, line
        command = found
    command.make_context(program, arguments)


def test_every_command_has_an_example() -> None:
    used = {tuple(line.split()[:2]) for line in commands()}
    assert {("coordinator", name) for name in COMMANDS} <= used
    assert ("node", "info") in used


def test_the_two_commands_stand_as_promised() -> None:
    assert "```\ndeploy/run coordinator demo\ndeploy/run pytest\n```" in README
    assert "deploy/run pytest -m slow" in README
