"""Two hosts at 200 Mbit/s with 10 ms each way: what rounding gradients gains, and adding them up in runs.

Adapters of about 10 MB, and ranks that compute for about as long as those take to cross the link plainly: as fp32, all
at once, after all of them are computed. A rank waits while it would compute, as where a GPU does that: the network,
which is made of this machine's processors, has them to itself.

And what rounds of local steps leave, on that link, of the speed that the same ranks have on one which costs next to
nothing; their last validation loss against that of ranks which add up every gradient.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure
from tests.benchmarks.hosted import Lab, serving
from tests.benchmarks.workload import WARM_UP, WORDS, Workload, workload
from tests.faults.harness import Fault, injected
from tests.fixtures.hosts import Host, hosts, switch_available
from tests.fixtures.switch import Switch

MBIT, DELAY_SECONDS = 200, 0.01
RANKS = 2
BATCH = 2
ROW_WORDS = 6
COMPUTE_SECONDS = 0.5
ITERS = WARM_UP + 8
LORA_RANK = 80
AT_ONCE, IN_RUNS = "at once", "in runs"
ROUNDED = ("--gradient-dtype", "bf16")
# Rounds of steps of more than half a second; the first warms up.
ROUND, ROUNDS, ROUND_BATCH = 16, 10, 8
KINDS = 6  # of words: each is followed by one of the next kind
LOCAL = ("--local-steps", str(ROUND), *ROUNDED)
VALIDATED = ("--val-batches", "-1", "--steps-per-eval", str(ROUND * ROUNDS), "--learning-rate", "2e-4")


def run(folder: Path, pairs: int) -> list[Figure]:
    """How many times as fast a step is.

    Raises:
        RuntimeError: there can be no such hosts here.
    """
    if missing := switch_available():
        raise RuntimeError(f"slow-link needs hosts of its own: {missing}")
    for name in ("steps", "rounds"):
        (folder / name).mkdir()
    work = workload(folder / "steps", 64, (ROW_WORDS, ROW_WORDS), hidden=512)
    learnt = _language(workload(folder / "rounds", 1, (ROW_WORDS, ROW_WORDS), hidden=256))
    plain: list[dict[str, float]] = []
    steps: dict[str, list[float]] = {"bf16, at once": [], "fp32, in runs": [], "bf16, in runs": []}
    kept, round_steps, losses = [], [], []
    with ExitStack() as stack:
        switch = Switch()
        connected = stack.enter_context(hosts(RANKS, switch=switch))
        _link(switch, connected, slow=True)
        labs = {}
        device: Fault = {"do": "device", "seconds": COMPUTE_SECONDS}
        ways: dict[str, list[Fault]] = {AT_ONCE: [device, {"do": "one run"}], IN_RUNS: [device]}
        for name, faults in ways.items():
            place = folder / name.replace(" ", "-")
            place.mkdir()
            labs[name] = stack.enter_context(serving(place, connected, injected(place, faults)))
        for pair in range(pairs):
            plain.append(_step(labs[AT_ONCE], folder / f"plain-{pair}", work))
            for name, seconds in steps.items():
                dtype, way = name.split(", ")
                options = ROUNDED if dtype == "bf16" else ()
                seconds.append(_step(labs[way], folder / f"{name.replace(' ', '-')}-{pair}", work, options)["seconds"])
            slow = _rounds(labs[AT_ONCE], folder / f"rounds-{pair}", learnt, LOCAL)
            _link(switch, connected, slow=False)
            fast = _rounds(labs[AT_ONCE], folder / f"rounds-without-{pair}", learnt, LOCAL)
            exact = _rounds(labs[AT_ONCE], folder / f"steps-without-{pair}", learnt)
            _link(switch, connected, slow=True)
            kept.append(fast[0] / slow[0])
            round_steps.append(slow[0])
            losses.append(slow[1] / exact[1])
    goals = {"bf16, in runs": 1.6}
    return [
        Figure("fp32, at once: step", "s", tuple(step["seconds"] for step in plain)),
        Figure("its computing / its sum", "x", tuple(step["compute_seconds"] / step["wait_seconds"] for step in plain)),
        *(
            Figure(
                f"{name}: steps per second, to fp32 at once",
                "x",
                tuple(one["seconds"] / other for one, other in zip(plain, seconds, strict=True)),
                at_least=goals.get(name),
            )
            for name, seconds in steps.items()
        ),
        Figure(f"{ROUND} local steps: of the speed without a network", "x", tuple(kept), at_least=0.95),
        Figure("their step", "s", tuple(round_steps)),
        Figure("their last validation loss / that of summed gradients", "x", tuple(losses), below=1.02),
    ]


def _link(switch: Switch, connected: Sequence[Host], *, slow: bool) -> None:
    """Between the hosts: the slow one, or one that costs next to nothing."""
    switch.conditions(delay_seconds=DELAY_SECONDS if slow else 0.0)
    for host in connected:
        host.shape(MBIT if slow else None)


def _step(lab: Lab, folder: Path, work: Workload, options: tuple[str, ...] = ()) -> dict[str, float]:
    """Medians of a step's seconds."""
    steps: list[dict[str, Any]] = []
    more = ("--lora-rank", str(LORA_RANK), *options)
    lab.train(work, folder, batch=BATCH, iters=ITERS, ranks=RANKS, options=more, follow=steps.append)
    names = ("seconds", "compute_seconds", "wait_seconds")
    return {name: statistics.median(step[name] for step in steps[WARM_UP:]) for name in names}


def _language(work: Workload) -> Workload:
    """Rows with something to learn that holds for others, too: which words may follow which; some are kept back."""
    chance = random.Random(0)
    kinds = [WORDS[kind::KINDS] for kind in range(KINDS)]
    for name, rows in (("train", ROUND * ROUNDS * ROUND_BATCH), ("valid", 64)):
        texts = [" ".join(chance.choice(kinds[word % KINDS]) for word in range(2 * KINDS)) for _ in range(rows)]
        (work.data / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return work


def _rounds(lab: Lab, folder: Path, work: Workload, options: tuple[str, ...] = ()) -> tuple[float, float]:
    """Seconds of a step, and the last validation loss."""
    more = ("--lora-rank", str(2 * LORA_RANK), *VALIDATED, *options)
    done = lab.train(work, folder, batch=ROUND_BATCH, iters=ROUND * ROUNDS, ranks=RANKS, options=more)
    # A round's steps are told at its end.
    seconds = (done[-1].at - done[ROUND - 1].at) / (len(done) - ROUND)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return seconds, [entry["val_loss"] for entry in entries if "val_loss" in entry][-1]
