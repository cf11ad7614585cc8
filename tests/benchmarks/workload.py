"""What is trained in the benchmarks of fleets, and how fast a run was."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = ("seven", "quick", "brown", "foxes", "jump", "over", "a", "lazy", "dog", "while", "the", "cats", "watch", "it")
# Iterations that count for nobody: the first ones allocate, and shares find their size.
WARM_UP = 4


@dataclass(frozen=True)
class Workload:
    """A model and rows.

    Attributes:
        model: folder of the model.
        data: folder of the data.
    """

    model: Path
    data: Path


@dataclass(frozen=True)
class Iteration:
    """One iteration of a run, as it was reported.

    Attributes:
        number: from 1.
        at: when it was reported, by ``time.monotonic``.
        loss: mean over its target tokens, as the program counts them.
        tokens: real target tokens of it.
        peak_memory_bytes: of MLX, so far.
    """

    number: int
    at: float
    loss: float
    tokens: float
    peak_memory_bytes: float


def reported(step: dict[str, Any]) -> Iteration:
    """An iteration, as our program reports its step."""
    return Iteration(step["iter"], time.monotonic(), step["loss"], step["tokens"], step["peak_memory_bytes"])


def workload(folder: Path, rows: int, words: tuple[int, int], *, hidden: int = 512, layers: int = 4) -> Workload:
    """A small model and rows of between so many words; of one length exactly where both are the same."""
    from tests.fixtures.models import tiny_model

    model = tiny_model(folder / "model", "llama", vocab_size=4096, layers=layers, hidden=hidden)
    data = folder / "data"
    data.mkdir()
    chance = random.Random(0)
    fewest, most = words
    if fewest == most:
        # The same words in another order: all rows have the same number of tokens.
        same = chance.choices(WORDS, k=most)
        texts = [" ".join(chance.sample(same, k=most)) for _ in range(rows)]
    else:
        texts = [" ".join(chance.choices(WORDS, k=chance.randint(fewest, most))) for _ in range(rows)]
    lines = [json.dumps({"text": text}) for text in texts]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return Workload(model, data)


def tokens_per_second(run: Sequence[Iteration], warm_up: int = WARM_UP) -> float:
    """Real target tokens in a second of the wall, after the first iterations."""
    counted = run[warm_up:]
    return sum(iteration.tokens for iteration in counted) / (counted[-1].at - run[warm_up - 1].at)


def seconds_per_iteration(run: Sequence[Iteration], warm_up: int = WARM_UP) -> float:
    """Seconds of the wall that an iteration took, after the first ones."""
    return (run[-1].at - run[warm_up - 1].at) / (len(run) - warm_up)
