"""One machine against ``mlx_lm.lora``: the same model, the same rows, one core and one thread each, in turn.

The peer draws its batches as it does, ours as we do; where all rows fit in one batch both see the same ones, and there
their losses are compared. Tokens are real targets: padding counts for nobody.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks import mlx_launch
from tests.benchmarks.figures import Figure
from tests.benchmarks.pinned import alone, cores
from tests.benchmarks.workload import WARM_UP, WORDS, Iteration, Workload, seconds_per_iteration, tokens_per_second

BATCH = 4
# Of rows of mixed lengths, in tokens.
SHORTEST, MEDIAN, LONGEST = 10, 80, 530
SMALL_VOCABULARY, LARGE_VOCABULARY = 4096, 32768
SAME_ROWS, SAME_LENGTH, SAME_STEPS = 8, 64, 6
MEMORY_LENGTH = 512
BLOCKS = 4
# Of so many the head is as much of a step as in models of 8 B parameters; of four, as in models of 1 B.
DEEP = 12
FLAT_STEPS, FLAT_FROM = 2000, 500


@dataclass(frozen=True)
class Case:
    """What is trained on, and what is measured.

    Attributes:
        name: of the case.
        rows: of one epoch.
        length: tokens of each row; 0 mixes lengths.
        vocabulary: rows of the embedding.
        masked: trained on the completion alone, a quarter of each row.
        quantize: bits of the base; 0 trains on fp32.
        trained: blocks that are trained.
        epochs: passes over the rows.
        goal: least ratio of real tokens per second.
        memory_goal: most of the ratio of peak memory above the weights, or None.
        blocks: of the model.
    """

    name: str
    rows: int
    length: int
    vocabulary: int
    masked: bool = False
    quantize: int = 0
    trained: int = BLOCKS
    epochs: int = 1
    goal: float | None = None
    memory_goal: float | None = None
    blocks: int = BLOCKS


CASES = (
    Case("mixed lengths", 192, 0, SMALL_VOCABULARY, goal=2.5),
    Case("equal lengths", 32, 160, SMALL_VOCABULARY, goal=1.0),
    Case("equal lengths, QLoRA", 8, 160, SMALL_VOCABULARY, quantize=4, goal=1.0),
    Case("equal lengths, large vocabulary", 16, MEMORY_LENGTH, LARGE_VOCABULARY, goal=1.0, memory_goal=0.3),
    Case("equal lengths, large vocabulary, prompts masked", 32, 160, LARGE_VOCABULARY, masked=True, goal=2.0),
    Case("all together", 64, 0, LARGE_VOCABULARY, masked=True, trained=BLOCKS // 2, epochs=3, goal=5.0),
)


def run(folder: Path, pairs: int) -> list[Figure]:
    """Ratios of tokens per second and of memory for each case, and how far apart the losses are."""
    figures = []
    for number, case in enumerate(CASES):
        place = folder / str(number)
        work = workload_of(place, case)
        weights = sum(file.stat().st_size for file in work.model.glob("*.safetensors"))
        rates: list[float] = []
        peaks: list[float] = []
        for pair in range(pairs):
            sides: dict[str, list[Iteration]] = {}
            for side in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
                iters = WARM_UP + case.epochs * case.rows // BATCH
                sides[side] = _train(side, work, place / f"{side}{pair}", case, iters)
            ours, theirs = sides["ours"], sides["theirs"]
            rates.append(tokens_per_second(ours) / tokens_per_second(theirs))
            peaks.append((_peak(ours) - weights) / (_peak(theirs) - weights))
        figures += [
            Figure(f"{case.name}: tokens per second", "x", tuple(rates), at_least=case.goal),
            Figure(f"{case.name}: peak memory above weights", "x", tuple(peaks), below=case.memory_goal),
        ]
    return [*figures, _second_epoch(folder / "epochs", pairs), _same_losses(folder / "same"), _growth(folder / "flat")]


def _train(
    side: str, work: Workload, folder: Path, case: Case, iters: int, *, batch: int = BATCH, more: Sequence[str] = ()
) -> list[Iteration]:
    options = ["--num-layers", str(case.trained), *(["--mask-prompt"] if case.masked else []), *more]
    if side == "ours":
        return alone(work, folder, batch=batch, iters=iters, options=options)
    return mlx_launch.train(work, folder, ranks=1, batch=batch, iters=iters, cores=cores(1), options=options)


def _peak(iterations: list[Iteration]) -> float:
    return max(iteration.peak_memory_bytes for iteration in iterations)


def _second_epoch(folder: Path, pairs: int) -> Figure:
    """Half of the blocks are frozen below: what they gave in the first epoch is read in the second."""
    case = Case("epochs", 48, 160, SMALL_VOCABULARY, trained=DEEP // 2, blocks=DEEP)
    work, epoch = workload_of(folder, case), case.rows // BATCH
    ratios = []
    for pair in range(pairs):
        run = _train("ours", work, folder / str(pair), case, 2 * epoch)
        second = (run[-1].at - run[epoch - 1].at) / epoch
        ratios.append(seconds_per_iteration(run[:epoch]) / second)
    return Figure("second epoch / first, half of the layers frozen below", "x", tuple(ratios), at_least=1.4)


def _growth(folder: Path) -> Figure:
    """Of the highest memory so far, over a long run on rows of many lengths."""
    case = Case("flat", 256, 0, SMALL_VOCABULARY)
    work = workload_of(folder, case, hidden=64)
    run = _train("ours", work, folder / "run", case, FLAT_STEPS)
    return Figure(
        f"peak memory of {FLAT_STEPS} steps / of {FLAT_FROM}", "x", (_peak(run) / _peak(run[:FLAT_FROM]),), below=1.01
    )


def _same_losses(folder: Path) -> Figure:
    """All rows in each batch, all longer than what is kept of them: the peer counts no padding then."""
    case = Case("same", SAME_ROWS, SAME_LENGTH + 16, SMALL_VOCABULARY)
    work = workload_of(folder, case)
    more = ("--max-seq-length", str(SAME_LENGTH))
    ours, theirs = (
        _train(side, work, folder / side, case, SAME_STEPS, batch=SAME_ROWS, more=more) for side in ("ours", "theirs")
    )
    apart = max(abs(one.loss - other.loss) for one, other in zip(ours, theirs, strict=True))
    return Figure("same batches: largest difference of a loss", "", (apart,), below=1e-4)


def workload_of(folder: Path, case: Case, hidden: int = 512) -> Workload:
    """A small model, and rows of about so many tokens."""
    from tests.fixtures.models import tiny_model

    model = tiny_model(
        folder / "model",
        "llama",
        vocab_size=case.vocabulary,
        layers=case.blocks,
        hidden=hidden,
        quantize=case.quantize or None,
    )
    data = folder / "data"
    data.mkdir(parents=True)
    chance = random.Random(0)
    words = _Words(model, chance)
    lengths = [case.length] * case.rows if case.length else _mixed_lengths(case.rows)
    lines = [json.dumps(_row(words, length, masked=case.masked)) for length in lengths]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return Workload(model, data)


def _mixed_lengths(rows: int) -> list[int]:
    """Half of the rows on either side of the median, every doubling of the length as often as the next."""
    spread = np.interp((np.arange(rows) + 0.5) / rows, [0, 0.5, 1], np.log([SHORTEST, MEDIAN, LONGEST]))
    return [int(length) for length in np.random.default_rng(0).permutation(np.exp(spread).round())]


class _Words:
    """Texts of a number of tokens."""

    def __init__(self, model: Path, chance: random.Random) -> None:
        from transformers import AutoTokenizer

        encode = AutoTokenizer.from_pretrained(model).encode
        # Words are parted by spaces, so that what one costs does not depend on its neighbours.
        self._costs = {word: len(encode(f"a {word}")) - len(encode("a")) for word in WORDS}
        self._one = next(word for word, cost in self._costs.items() if cost == min(self._costs.values()))
        self._chance = chance

    def text(self, tokens: int) -> str:
        found: list[str] = []
        while tokens > 0:
            word = self._chance.choice(WORDS)
            word = word if self._costs[word] <= tokens else self._one
            found.append(word)
            tokens -= self._costs[word]
        return " ".join(found)


def _row(words: _Words, length: int, *, masked: bool) -> dict[str, str]:
    if not masked:
        return {"text": words.text(length)}
    completion = max(2, length // 4)
    return {"prompt": words.text(max(1, length - completion)), "completion": words.text(completion)}
