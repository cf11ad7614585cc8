"""How long the command line takes to start."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.figures import Figure


def run(folder: Path, repetitions: int) -> list[Figure]:
    """Seconds from typing ``coordinator --help`` to its end, and of an empty Python for comparison."""
    script = str(Path(sys.executable).parent / "coordinator")
    help_seconds: list[float] = []
    bare_seconds: list[float] = []
    for warm in range(repetitions + 1):
        for command, seconds in (([script, "--help"], help_seconds), ([sys.executable, "-c", ""], bare_seconds)):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if warm:
                seconds.append(time.perf_counter() - began)
    return [
        Figure("coordinator --help", "s", tuple(help_seconds), below=0.3),
        Figure("python -c '' (for comparison)", "s", tuple(bare_seconds)),
    ]
