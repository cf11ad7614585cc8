"""What every test gets: a data folder of its own, one thread for each test process, no hub, no leftover workers."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# Before anything loads a BLAS: the suite runs in as many processes as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# As the worker does on a CPU: compiling starts a C++ compiler.
os.environ["MLX_DISABLE_COMPILE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Also where the suite runs under nohup or in the background of a script, which what it starts would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def tandem_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TANDEM_HOME, outside the test's own ``tmp_path``."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("TANDEM_HOME", str(home))
    # No test finds the nodes of another one, nor those of the network that it runs on.
    monkeypatch.setenv("TANDEM_BONJOUR", "off")
    monkeypatch.setenv("TANDEM_FLEET", f"test-{secrets.token_hex(4)}")
    return home


@pytest.fixture(autouse=True)
def no_leftover_workers() -> Iterator[None]:
    """Fail a test that leaves a child process behind, and only that one."""
    yield
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True, check=False
    ).stdout
    left = [line for line in children.splitlines() if "node.worker" in line]
    for line in left:
        os.kill(int(line.split()[0]), signal.SIGKILL)
    assert not left, f"left behind: {left}"
