"""What the README tells people to type is what the program takes."""

from __future__ import annotations

import pytest

from coordinator.cli import COMMANDS
from tests.fixtures.commands import ROOT, assert_understood, our_commands

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("line", our_commands(README))
def test_every_example_is_understood(line: str) -> None:
    assert_understood(line)


def test_every_command_has_an_example() -> None:
    used = {tuple(line.split()[:2]) for line in our_commands(README)}
    assert {("coordinator", name) for name in COMMANDS} <= used
    assert ("node", "info") in used


def test_the_two_commands_stand_as_promised() -> None:
    assert "```\ndeploy/run coordinator demo\ndeploy/run pytest\n```" in README
    assert "deploy/run pytest -m slow" in README
