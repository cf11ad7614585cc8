"""One machine against the MLX trainer of ``unsloth-zoo``: the same model, the same rows, one core each, in turn.

It lives in an environment of its own, which is made on first use; where that cannot be, the benchmark says so and is
left out. The peer draws its batches as it does, sorted by length; where all rows fit in one batch both see the same
ones, and there their losses are compared, from the same adapter.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.figures import Figure
from tests.benchmarks.one_machine import (
    BATCH,
    LARGE_VOCABULARY,
    MEMORY_LENGTH,
    SAME_LENGTH,
    SAME_ROWS,
    SAME_STEPS,
    SMALL_VOCABULARY,
    Case,
    workload_of,
)
from tests.benchmarks.pinned import alone, cores
from tests.benchmarks.workload import WARM_UP, Iteration, Workload, tokens_per_second

PACKAGE, VERSION = "unsloth-zoo", "2026.10.9"
PROCESS = Path(__file__).with_name("unsloth_process.py")
INSTALL_SECONDS, RUN_SECONDS = 600, 1200
# What its MLX side imports. Its other requirements on Linux, PyTorch with CUDA among them, are gigabytes.
NEEDED = ("transformers==5.17.0", "filelock", "msgspec", "packaging", "pillow", "psutil", "regex", "requests", "tqdm")
LORA_RANK, LORA_SCALE = 8, 20.0


@dataclass(frozen=True)
class Compared:
    """A case, and how it is trained on both sides.

    Attributes:
        case: what is trained on; its goals are of ours over theirs.
        checkpointing: whether activations are computed again on the way back.
    """

    case: Case
    checkpointing: bool = False


CASES = (
    Compared(Case("mixed lengths", 64, 0, SMALL_VOCABULARY, goal=1.3)),
    Compared(Case("equal lengths", 32, 160, SMALL_VOCABULARY, goal=1.0)),
    Compared(Case("equal lengths, large vocabulary, prompts masked", 32, 160, LARGE_VOCABULARY, masked=True)),
    Compared(
        Case("large vocabulary, gradient checkpointing", 16, MEMORY_LENGTH, LARGE_VOCABULARY, memory_goal=1.0),
        checkpointing=True,
    ),
)


@dataclass(frozen=True)
class Asked:
    """A run of theirs, as ``unsloth_process`` is told of it.

    Attributes:
        model: folder of the model.
        rows: file of the rows.
        folder: made for the adapters; ``first.safetensors`` in it are those before the first iteration.
        batch: rows of an iteration.
        iters: iterations.
        trained: blocks that get adapters, from the last.
        masked: trained on completions alone.
        gradient_checkpointing: activations are computed again on the way back.
        max_seq_length: tokens after which a row is cut off.
        optimizer: ``adam`` or ``sgd``, without decay of weights.
        learning_rate: the same for all iterations.
        core: that the process is pinned to, or None.
        dtype: of weights that are not quantized.
        rank: of the adapters.
        scale: that their output is multiplied by.
    """

    model: str
    rows: str
    folder: str
    batch: int
    iters: int
    trained: int
    masked: bool = False
    gradient_checkpointing: bool = False
    max_seq_length: int = 2048
    optimizer: str = "adam"
    learning_rate: float = 1e-5
    core: int | None = None
    dtype: str = "float32"
    rank: int = LORA_RANK
    scale: float = LORA_SCALE


def run(folder: Path, pairs: int) -> list[Figure]:
    """Ratios of real tokens per second and of memory for each case, and how far apart the losses are."""
    try:
        python = interpreter()
    except subprocess.SubprocessError as error:
        print(f"unsloth: left out, {PACKAGE} {VERSION} does not install here: {_last_line(error)}")
        return []
    figures = []
    for number, compared in enumerate(CASES):
        case, place = compared.case, folder / str(number)
        work = workload_of(place, case)
        weights = sum(file.stat().st_size for file in work.model.glob("*.safetensors"))
        iters = WARM_UP + case.rows // BATCH
        rates: list[float] = []
        peaks: list[float] = []
        for pair in range(pairs):
            sides: dict[str, list[Iteration]] = {}
            for side in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
                target = place / f"{side}{pair}"
                if side == "ours":
                    sides[side] = _ours(work, target, compared, iters)
                else:
                    sides[side] = train(python, _asked(work, target, compared, iters))
            rates.append(tokens_per_second(sides["ours"]) / tokens_per_second(sides["theirs"]))
            ours, theirs = (sides[side][-1].peak_memory_bytes - weights for side in ("ours", "theirs"))
            peaks.append(ours / theirs)
        figures += [
            Figure(f"{PACKAGE}, {case.name}: tokens per second", "x", tuple(rates), at_least=case.goal),
            Figure(f"{PACKAGE}, {case.name}: peak memory above weights", "x", tuple(peaks), below=case.memory_goal),
        ]
    return [*figures, _same_losses(folder / "same", python)]


def _ours(work: Workload, folder: Path, compared: Compared, iters: int) -> list[Iteration]:
    options = ["--num-layers", str(compared.case.trained)]
    options += ["--mask-prompt"] if compared.case.masked else []
    options += ["--grad-checkpoint"] if compared.checkpointing else []
    return alone(work, folder, batch=BATCH, iters=iters, options=options)


def _asked(work: Workload, folder: Path, compared: Compared, iters: int) -> Asked:
    return Asked(
        str(work.model),
        str(work.data / "train.jsonl"),
        str(folder),
        BATCH,
        iters,
        compared.case.trained,
        masked=compared.case.masked,
        gradient_checkpointing=compared.checkpointing,
        core=cores(1)[0],
    )


def _same_losses(folder: Path, python: Path) -> Figure:
    """All rows in each batch, from the same adapter, without moments, whose first steps the two correct differently."""
    case = Case("same", SAME_ROWS, SAME_LENGTH + 16, SMALL_VOCABULARY)
    work = workload_of(folder, case)
    theirs = train(
        python,
        Asked(
            str(work.model),
            str(work.data / "train.jsonl"),
            str(folder / "theirs"),
            SAME_ROWS,
            SAME_STEPS,
            case.trained,
            max_seq_length=SAME_LENGTH,
            optimizer="sgd",
            learning_rate=0.01,
            core=cores(1)[0],
        ),
    )
    options = ("--max-seq-length", str(SAME_LENGTH), "--optimizer", "sgd", "--learning-rate", "0.01")
    first = ("--resume-adapter-file", str(folder / "theirs" / "first.safetensors"))
    ours = alone(work, folder / "ours", batch=SAME_ROWS, iters=SAME_STEPS, options=(*options, *first))
    apart = max(abs(one.loss - other.loss) for one, other in zip(ours, theirs, strict=True))
    return Figure(f"{PACKAGE}, same batches: largest difference of a loss", "", (apart,), below=1e-4)


def train(python: Path, asked: Asked) -> list[Iteration]:
    """Train with theirs, and say how each iteration went.

    Args:
        python: of the environment that it is in.
        asked: what to train.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, "UNSLOTH_ZOO_DISABLE_GPU_INIT": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("VIRTUAL_ENV", None)
    if platform.system() == "Linux":
        # There it starts a compiler for each shape; Macs compile, as ours do there.
        environment["MLX_DISABLE_COMPILE"] = "1"
    done = subprocess.run(
        [str(python), "-P", str(PROCESS), json.dumps(asdict(asked))],
        capture_output=True, text=True, env=environment, timeout=RUN_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{PACKAGE} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: list[Iteration] = []
    before = 0
    for line in done.stdout.splitlines():
        if line.startswith('{"at"'):
            said = json.loads(line)
            tokens = said["tokens"] - before
            before = said["tokens"]
            found.append(Iteration(said["iteration"], said["at"], said["loss"], tokens, said["peak_memory"]))
    if len(found) != asked.iters:
        raise RuntimeError(f"{PACKAGE} reported {len(found)} of {asked.iters} iterations: {done.stdout[-2000:]}")
    return found


def interpreter() -> Path:
    """The Python of their environment, which is made on first use, inside of ours.

    Raises:
        subprocess.SubprocessError: it cannot be made: no network, no package for this machine.
    """
    folder = Path(sys.prefix) / "peers" / f"{PACKAGE}-{VERSION}"
    made = folder / ".made.stamp"
    with _one_at_a_time(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            _install(folder)
            made.write_text("")
    return folder / "bin" / "python"


def _install(folder: Path) -> None:
    uv = str(Path(sys.executable).parent / "uv")
    into = [uv, "pip", "install", "--python", str(folder / "bin" / "python")]
    same = [f"mlx-lm=={version('mlx-lm')}", f"numpy=={version('numpy')}"]
    commands = [[uv, "venv", "--python", sys.executable, str(folder)]]
    if platform.system() == "Linux":
        commands += [[*into, f"mlx[cpu]=={version('mlx')}", *same, *NEEDED]]
        commands += [[*into, "--no-deps", f"{PACKAGE}=={VERSION}"]]
    else:
        commands += [[*into, f"mlx=={version('mlx')}", *same, f"{PACKAGE}=={VERSION}"]]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)


def _last_line(error: subprocess.SubprocessError) -> str:
    said = str(getattr(error, "stderr", None) or error).strip()
    return said.splitlines()[-1]


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
