"""What the coordinator, the socket, the events and the copies cost, against a bare loop of the same step."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.figures import Figure

STEPS = 44
# The first steps allocate; they count for neither side.
WARM_UP = 4


def run(folder: Path, pairs: int) -> list[Figure]:
    """Ratio of seconds per step: the whole program over the bare loop."""
    from tests.fixtures.models import tiny_model

    model = tiny_model(folder / "model", "llama", vocab_size=4096, layers=4, hidden=256)
    data = folder / "data"
    data.mkdir()
    text = "a row of ordinary words that is neither short nor long " * 4
    (data / "train.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(64)))
    # Once for the cache of tokens, which the bare loop reads too.
    whole(model, data, folder / "warm")
    ratios, seconds = [], []
    for pair in range(pairs):
        sides = {}
        order = ("bare", "whole") if pair % 2 else ("whole", "bare")
        for side in order:
            sides[side] = bare(model, data) if side == "bare" else whole(model, data, folder / f"run{pair}")
        ratios.append(sides["whole"] / sides["bare"])
        seconds.append(sides["bare"])
    return [
        Figure("whole program / bare loop, time per step", "x", tuple(ratios), below=1.01),
        Figure("bare step", "s", tuple(seconds)),
    ]


def whole(model: Path, data: Path, adapters: Path) -> float:
    """Seconds per step of ``coordinator train``, between its events."""
    command = [
        str(Path(sys.executable).parent / "coordinator"), "train", "--json", "--model", str(model), "--data", str(data),
        "--adapter-path", str(adapters), "--iters", str(STEPS), "--num-layers", "-1", "--steps-per-report", "1",
        "--save-every", "1000",
    ]  # fmt: skip
    first = last = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                last = time.perf_counter()
                if event["step"] == WARM_UP:
                    first = last
    if process.returncode:
        raise RuntimeError(f"coordinator train ended with {process.returncode}")
    return (last - first) / (STEPS - WARM_UP)


def bare(model: Path, data: Path) -> float:
    """Seconds per step of a process that does nothing but the steps."""
    command = [sys.executable, "-m", "tests.benchmarks.bare_loop", str(model), str(data), str(STEPS), str(WARM_UP)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
