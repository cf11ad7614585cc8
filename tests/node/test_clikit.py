from __future__ import annotations

import subprocess
import sys

import click
import pytest

from node.clikit import LazyCommand, LazyGroup, run_cli
from node.errors import Interrupted, RowError, TandemError


def group_of(*commands: click.Command) -> LazyGroup:
    group = LazyGroup(
        "tool",
        lazy={
            "absent": LazyCommand("no_such_module_anywhere:main", "Is never imported."),
            "secret": LazyCommand("no_such_module_anywhere:other", "Is not shown.", hidden=True),
        },
    )
    for command in commands:
        group.add_command(command)
    return group


def raising(error: BaseException) -> click.Command:
    @click.command("fail")
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (TandemError("the worker\nfell over"), 1, "error: the worker fell over\n"),
        (RowError("a.jsonl", 3, "no text"), 2, "error: a.jsonl:3: no text\n"),
        (Interrupted("stopped; go on with --resume"), 130, "stopped; go on with --resume\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (PermissionError(13, "Permission denied", "adapters"), 1, "error: adapters: Permission denied\n"),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(group_of(raising(error)), ["fail"]) == code
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(group_of(raising(ZeroDivisionError())), ["fail"])
    with pytest.raises(OSError, match="nobody"):
        run_cli(group_of(raising(OSError("nobody"))), ["fail"])


def test_debug_raises_our_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_DEBUG", "1")
    with pytest.raises(TandemError, match="why"):
        run_cli(group_of(raising(TandemError("why"))), ["fail"])


def test_help_lists_lazy_commands_without_importing_them(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command("plain", help="An ordinary one.")
    def plain() -> None:
        pass

    assert run_cli(group_of(plain), ["--help"], prog_name="tool") == 0
    shown = capsys.readouterr().out
    assert "Is never imported." in shown
    assert "An ordinary one." in shown
    assert "secret" not in shown


def test_a_lazy_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    group = LazyGroup("tool", lazy={"info": LazyCommand("node.commands.info:info", "Facts.")})
    assert run_cli(group, ["info", "--help"], prog_name="tool") == 0
    assert "tool info" in capsys.readouterr().out


def test_usage_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command("train")
    @click.option("--iters", type=int)
    def train(iters: int) -> None:
        click.echo(iters)

    group = group_of(train)
    assert run_cli(group, ["train", "--iters", "many"], prog_name="tool") == 2
    assert capsys.readouterr().err == (
        "error: Invalid value for '--iters': 'many' is not a valid integer. (options: tool train --help)\n"
    )
    assert run_cli(group, ["train", "--itres", "1"], prog_name="tool") == 2
    assert "--iters" in capsys.readouterr().err
    assert run_cli(group, ["trian"], prog_name="tool") == 2
    said = capsys.readouterr().err
    assert "train" in said.replace("trian", "")
    assert said.count("\n") == 1
    assert run_cli(group, ["absnet"], prog_name="tool") == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TandemError("broken"), PermissionError(13, "Permission denied", "runs")])
def test_nothing_is_said_where_somebody_is_typing(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        raise error

    command = click.Command("show", params=[click.Argument(["name"], shell_complete=names)])
    for variable, value in (("_TOOL_COMPLETE", "zsh_complete"), ("COMP_WORDS", "tool show "), ("COMP_CWORD", "2")):
        monkeypatch.setenv(variable, value)
    assert run_cli(group_of(command), [], prog_name="tool") == 1
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    program = (
        "import click, sys\nfrom node.clikit import run_cli\n"
        "@click.command()\ndef main():\n    while True: click.echo('x' * 1000)\n"
        "sys.exit(run_cli(main, []))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 141
