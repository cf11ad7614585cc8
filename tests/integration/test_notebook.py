"""A notebook in a real Jupyter kernel: it trains, is told, stops, is interrupted, and lists machines."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.nodes import loopback, serving
from tests.fixtures.processes import descendants
from tests.fixtures.runs import losses, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

CELL_SECONDS = 200.0


class Notebook:
    """A kernel, and its cells.

    Args:
        folder: where it works.
        environment: over that of this process.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        from jupyter_client.manager import KernelManager

        # No port is taken, and a socket's path must be short.
        self._sockets = tempfile.TemporaryDirectory()
        own = {name: str(folder / name.lower()) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
        connection = str(folder / "kernel.json")
        self.manager = KernelManager(transport="ipc", ip=f"{self._sockets.name}/k", connection_file=connection)
        self.manager.shutdown_wait_time = CELL_SECONDS
        self.manager.start_kernel(cwd=str(folder), env={**os.environ, **environment, **own})
        self._client = self.manager.client()
        self._client.start_channels()
        try:
            self._client.wait_for_ready(timeout=CELL_SECONDS)
        except BaseException:
            self.close()
            raise

    def run(self, code: str, shown: Callable[[str], None] = lambda _: None) -> tuple[str, dict[str, Any]]:
        """Run a cell.

        Args:
            code: of the cell.
            shown: takes all that it has printed so far, each time that there is more.

        Returns:
            What it printed, and the kernel's reply.
        """
        printed: list[str] = []
        ends = time.monotonic() + CELL_SECONDS
        cell = self._client.execute(code)
        while True:
            message = self._client.get_iopub_msg(timeout=max(0.0, ends - time.monotonic()))
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])
                shown("".join(printed))
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
        while True:
            reply = self._client.get_shell_msg(timeout=max(0.0, ends - time.monotonic()))
            if reply["parent_header"].get("msg_id") == cell:
                return "".join(printed), reply["content"]

    def interrupt_at(self, text: str) -> Callable[[str], None]:
        """Presses the stop button once the cell has printed this."""
        pressed: list[str] = []

        def look(printed: str) -> None:
            if text in printed and not pressed:
                pressed.append(text)
                self.manager.interrupt_kernel()

        return look

    def close(self) -> None:
        """Shut the kernel down; fails when something that it started outlives it."""
        assert self.manager.provisioner is not None
        pid: int = self.manager.provisioner.pid  # type: ignore[attr-defined]
        below = descendants(pid)
        self._client.stop_channels()
        self.manager.shutdown_kernel()
        self._sockets.cleanup()
        for one in below:
            wait_for_end(one)


@pytest.fixture
def notebook(inputs: Path, tmp_path: Path) -> Iterator[Notebook]:
    """A kernel in whose folder lie a model and data, and that finds nodes on this machine."""
    for name in ("model", "data"):
        os.symlink(inputs / name, tmp_path / name)
    with contextlib.closing(Notebook(tmp_path, FLEET)) as found:
        said, reply = found.run(HEAD)
        assert reply["status"] == "ok", said
        yield found


FLEET = loopback()
HEAD = """
from coordinator import *
from coordinator.stream import StepFinished
def config(name, iters=100_000, **more):
    return TrainConfig(
        model="model", data="data", adapter_path=name, iters=iters, save_every=100_000, val_batches=0,
        **{"nodes": "local", **more},
    )
told = Callbacks(on_step=lambda step: print(f"step {step.step};"))
"""


def test_a_cell_trains_and_is_told(notebook: Notebook, tmp_path: Path) -> None:
    said, reply = notebook.run("result = train(config('whole', iters=4), callbacks=told); print(result.status)")
    assert reply["status"] == "ok"
    assert said.split() == ["step", "1;", "step", "2;", "step", "3;", "step", "4;", "done"]
    said, reply = notebook.run("import sys, warnings; print('tqdm.auto' in sys.modules, warnings.filters)")
    assert reply["status"] == "ok"
    assert said.startswith("True ")
    assert "IProgress" not in said, "the notebook's own warnings are left alone"
    said, reply = notebook.run(
        "async with start_training(config('whole', iters=6), resume=True) as training:\n"
        "    print([event.step async for event in training if isinstance(event, StepFinished)])\n"
        "(await training).status"
    )
    assert reply["status"] == "ok"
    assert said == "[5, 6]\n"
    assert len(losses(tmp_path / "whole")) == 6


def test_a_handle_lives_over_cells_and_is_stopped(notebook: Notebook, tmp_path: Path) -> None:
    said, reply = notebook.run("training = start_training(config('stopped')); print(training.done)")
    assert (said, reply["status"]) == ("False\n", "ok")
    said, reply = notebook.run(
        "for event in training:\n    if isinstance(event, StepFinished) and event.step >= 3:\n        break\n"
        "training.stop(); result = training.result(); print(result.status, result.steps)"
    )
    assert reply["status"] == "ok"
    status, steps = said.split()
    assert status == "interrupted"
    assert len(losses(tmp_path / "stopped")) == int(steps) >= 3


@pytest.mark.parametrize(
    ("cell", "error"),
    [
        ("train(config('broken'), callbacks=told)", "Stopped"),
        ("training = start_training(config('broken'), callbacks=told); training.result()", "KeyboardInterrupt"),
        ("training = start_training(config('broken'), callbacks=told); await training", "CancelledError"),
        (
            (
                "with start_training(config('broken')) as training:\n"
                "    for event in training:\n"
                "        if isinstance(event, StepFinished): print(f'step {event.step};')"
            ),
            "KeyboardInterrupt",
        ),
    ],
    ids=["train", "result", "await", "with"],
)
def test_the_stop_button_saves_and_stops(notebook: Notebook, tmp_path: Path, cell: str, error: str) -> None:
    _, reply = notebook.run(cell, notebook.interrupt_at("step 3;"))
    assert (reply["status"], reply["ename"]) == ("error", error)
    if error == "Stopped":
        assert "everything is saved" in reply["evalue"]
    else:
        said, reply = notebook.run("print(training.result().status, training.stopped)")
        assert reply["status"] == "ok"
        assert said.startswith("interrupted stopped at step ")
    done = len(losses(tmp_path / "broken"))
    assert done >= 3
    said, reply = notebook.run(f"print(train(config('broken', iters={done + 2}), resume=True).steps)")
    assert (said, reply["status"]) == (f"{done + 2}\n", "ok")
    assert [step for step, _ in losses(tmp_path / "broken")] == list(range(1, done + 3))


def test_a_kernel_that_is_shut_down_saves_its_run(inputs: Path, tmp_path: Path) -> None:
    for name in ("model", "data"):
        os.symlink(inputs / name, tmp_path / name)
    with contextlib.closing(Notebook(tmp_path, FLEET)) as notebook:
        notebook.run(HEAD)
        _, reply = notebook.run(
            "training = start_training(config('left'))\n"
            "for event in training:\n    if isinstance(event, StepFinished) and event.step >= 3:\n        break\n"
        )
        assert reply["status"] == "ok"
    done = len(losses(tmp_path / "left"))
    assert [folder.name for folder in (tmp_path / "left" / "checkpoints").iterdir()] == [f"{done:07}"]


def test_a_fleet_is_listed_planned_and_trained_on(notebook: Notebook, tmp_path: Path) -> None:
    with serving(tmp_path, "anna", environment=FLEET):
        said, reply = notebook.run("fleet = Fleet.find(); print([(node.name, node.state) for node in fleet])")
        assert (said, reply["status"]) == ("[('anna', 'free')]\n", "ok")
        said, reply = notebook.run(
            "print(fleet.plan(config('fleet', iters=4, force_all=True)))\n"
            "print(fleet.train(config('fleet', iters=4, force_all=True)).status)"
        )
        assert reply["status"] == "ok", reply
        assert "anna" in said
        assert said.endswith("done\n")
