"""The live view in a terminal, at its widths: a real run on two nodes, as an emulator draws it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.nodes import ServingNode, serving
from tests.fixtures.screens import Screen

STEPS = 4000
TMUX = shutil.which("tmux")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[ServingNode]]]:
    """Two nodes, and the home that is paired with them."""
    folder = tmp_path_factory.mktemp("nodes")
    home = folder / "home"
    with serving(folder, "anna", "ben", environment={"TANDEM_BONJOUR": "off"}, friends=[home]) as found:
        yield home, found


def arguments(inputs: Path, folder: Path, nodes: list[ServingNode], iters: int = STEPS) -> list[str | Path]:
    return [
        "train", "--model", inputs / "model", "--data", inputs / "data", "--iters", str(iters), "--batch-size", "6",
        "--steps-per-eval", "20", "--learning-rate", "1e-4", "--adapter-path", folder,
        "--nodes", ",".join(node.address for node in nodes), "--no-local", "--force-all",
    ]  # fmt: skip


def at_least(step: int, text: str) -> bool:
    """Whether the screen shows so many steps, done on both machines."""
    found = re.search(r"step ([\d,]+)/", text)
    return found is not None and int(found[1].replace(",", "")) >= step and "anna  " in text and "ben  " in text


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50)])
def test_what_is_seen_while_it_trains_and_when_it_is_stopped(
    columns: int, rows: int, inputs: Path, nodes: tuple[Path, list[ServingNode]], tmp_path: Path
) -> None:
    home, found = nodes
    command = arguments(inputs, tmp_path / "adapters", found)
    with Screen(*command, columns=columns, rows=rows, environment={"TANDEM_HOME": str(home)}) as screen:
        text = screen.until(lambda text: at_least(45, text))
        (tmp_path / "during.txt").write_text(text)
        assert screen.cursor_hidden
        bars = [line for line in screen.lines if line.startswith("step ")]
        assert len(bars) == 1
        assert re.fullmatch(rf"step [\d,]+/{STEPS:,} [━╸]*─+ +\d+%  .* left", bars[0])
        assert len(bars[0]) >= columns - 2, "it takes the whole width"
        (heading,) = [line for line in screen.lines if line.startswith("node ")]
        assert heading.split() == ["node", "share", "tokens/s", "compute", "wait", "memory"]
        for name in ("anna", "ben"):
            (row,) = [line for line in screen.lines if line.startswith(f"{name}  ")]
            assert re.search(r"\d+ % .*\d.* MB +(trains|slowest|has no rows)$", row), row
        assert re.search(r"loss +\d\.\d{3}", text)
        assert re.search(r"validation +\d\.\d{3} at step \d+", text)
        assert re.search(r"speed +[\d,]+ tokens/s", text)
        assert sum("█" in line for line in screen.lines) == (3 if rows == 24 else 14), "the loss curve"
        assert re.search("form a group|shares of the rows now|the network takes", text), "the last events"
        screen.press("\x03")
        assert screen.wait() == 130
        assert not screen.cursor_hidden
        (tmp_path / "after.txt").write_text(screen.text)
        assert "coordinator train --resume --adapter-path" in screen.text.replace("\n", "")
        assert "Stopped: " in screen.text


def test_a_window_that_is_dragged_shows_one_picture(
    inputs: Path, nodes: tuple[Path, list[ServingNode]], tmp_path: Path
) -> None:
    home, found = nodes
    command = [*arguments(inputs, tmp_path / "adapters", found), "--dashboard", "--dashboard-port", "0"]
    with Screen(*command, columns=120, rows=40, environment={"TANDEM_HOME": str(home)}) as screen:
        screen.until(lambda text: at_least(10, text))
        for columns, rows in ((70, 20), (160, 50), (40, 12)):
            screen.resize(columns, rows)
            fitting = re.compile(rf"^step .{{{columns - 8},{columns - 5}}}$", re.MULTILINE)
            text = screen.until(lambda text, fitting=fitting: fitting.search(text) is not None)  # type: ignore[misc]
            assert len(re.findall(r"^step \d", text, re.MULTILINE)) == 1, text
            assert "tokens/s" in text
            assert re.search(r"^(dashboard  )?http://127\.0\.0\.1:\d+/$", text, re.MULTILINE), "to be opened now"
            assert ("wait" in text) == (columns >= 56)
        screen.press("\x03")
        assert screen.wait() == 130


@pytest.mark.slow
@pytest.mark.skipif(TMUX is None, reason="no tmux, and deploy/run could not install it (apt-get, as root)")
def test_in_tmux(inputs: Path, nodes: tuple[Path, list[ServingNode]], tmp_path: Path) -> None:
    import os
    import shlex
    import sys

    from tests.fixtures.runs import ENTRY

    home, found = nodes
    own = [str(TMUX), "-S", str(tmp_path / "socket"), "-f", os.devnull]
    program = shlex.join([sys.executable, "-P", "-c", ENTRY, *map(str, arguments(inputs, tmp_path / "a", found, 60))])
    environment = {**os.environ, "TANDEM_HOME": str(home), "LC_ALL": "C.UTF-8"}
    settings = ["set", "-g", "remain-on-exit", "on", ";"]
    start = ["new-session", "-d", "-x", "100", "-y", "30", f"{program}; tmux -S {tmp_path / 'socket'} wait-for -S over"]
    try:
        subprocess.run([*own, "start-server", ";", *settings, *start], env=environment, check=True, timeout=60)
        subprocess.run([*own, "wait-for", "over"], check=True, timeout=200)
        shown = subprocess.run([*own, "capture-pane", "-p"], capture_output=True, text=True, check=True, timeout=60)
    finally:
        subprocess.run([*own, "kill-server"], check=False, timeout=60, capture_output=True)
    assert len(re.findall(r"^step \d", shown.stdout, re.MULTILINE)) <= 1
    assert "Done: 60 steps" in shown.stdout
    assert "coordinator generate" in shown.stdout
