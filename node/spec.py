"""What a worker is asked to do: plain, immutable values that the wire carries.

Token arrays are int32. A *span* is a half-open range ``[start, end)`` of token positions whose tokens are targets
(position p is predicted from the positions before it, so a span never starts below 1).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from node.errors import TandemError
from node.info import Backend, GradientDtype

Int32 = npt.NDArray[np.int32]
FineTuneType = Literal["lora", "dora", "full"]
RoundPart = Literal["", "open", "close"]

MOST_LOCAL_STEPS = 500
"""Of a round: all of them are reported at its end."""
LONGEST_NAME_BYTES = 200
"""Of a file's name: temporary ones are a little longer."""
LARGEST_FILE_BYTES = 1 << 46
LONGEST_ROW = 1 << 24
MOST_POSITIONS = 1 << 28
"""Of one micro-batch."""
PIECE_BYTES = 1 << 20
"""Most that one ``Addend`` or ``Total`` carries."""
PIECES_IN_FLIGHT = 16
"""Pieces that a rank sends before their totals come: enough to fill the way there and back, few enough to hold."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load.

    Attributes:
        path: folder with ``config.json`` and safetensors weights, in Hugging Face or MLX form; "" on its way to a node,
            which puts the folder of ``manifest`` in its place.
        adapter_path: folder of an adapter in ``mlx_lm``'s form to apply after loading, or "" for none.
        trust_remote_code: whether the model's own Python files may run; a node's owner must agree, too.
        manifest: SHA-256 of the model's manifest in a node's store, or "" where ``path`` is the truth.
    """

    path: str
    adapter_path: str = ""
    trust_remote_code: bool = False
    manifest: str = ""


@dataclass(frozen=True)
class TuningSpec:
    """What is trained, and how the forward pass differs while training.

    Attributes:
        fine_tune_type: ``lora``, ``dora`` or ``full``.
        num_layers: blocks to train, counted from the last; -1 means all.
        rank, scale, dropout, keys: of the adapters; ``keys`` None means every linear layer of a block.
        grad_checkpoint: recompute activations in the backward pass to save memory.
        neftune_alpha: noise on the embeddings (NEFTune, arXiv 2310.05914); 0 is off.
        initial_weights: bare name of a safetensors file of adapter weights in the job's folder to start from, or "".
    """

    fine_tune_type: FineTuneType = "lora"
    num_layers: int = 16
    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None
    grad_checkpoint: bool = False
    neftune_alpha: float = 0.0
    initial_weights: str = ""


@dataclass(frozen=True)
class OptimizerSpec:
    """How gradients become updates.

    Attributes:
        name: ``adam``, ``adamw``, ``muon``, ``sgd`` or ``adafactor``.
        arguments: further arguments of that ``mlx.optimizers`` class.
        learning_rate: peak rate, used when ``schedule`` is None.
        warmup_steps: linear warm-up to the peak over so many optimizer steps.
        schedule: an ``mlx_lm`` ``lr_schedule`` mapping (name, arguments, warmup, warmup_init), or None.
        max_grad_norm: clip the global gradient norm to this; 0 is off.
        loraplus_ratio: learning rate of ``lora_b`` over that of the rest (LoRA+, arXiv 2402.12354); 1 is off.
    """

    name: str = "adam"
    arguments: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: dict[str, Any] | None = None
    max_grad_norm: float = 0.0
    loraplus_ratio: float = 1.0


@dataclass(frozen=True)
class JobSpec:
    """Everything a worker must know before its first step.

    Attributes:
        job: the run's id; names the folder of its copies.
        folder: the worker's own folder for this job, where copies are written and given files lie; "" on its way to a
            node, which chooses it.
        seed: of the initial adapter weights, and part of every key of row randomness.
        tuning, optimizer: None when the job only evaluates, generates or fuses.
        copy_every: steps between copies of the trainable state to disk; each is whole before the next begins.
        clear_cache_threshold: bytes of MLX's cache above which it is cleared between steps; 0 leaves it alone.
        reuse_prefix: whether rows are met again, so that what the frozen blocks make of them is worth keeping.
        local_steps: most steps of a round (see ``Share``); 1 where there are none.
    """

    job: str
    folder: str
    model: ModelSpec
    seed: int = 0
    tuning: TuningSpec | None = None
    optimizer: OptimizerSpec | None = None
    copy_every: int = 10
    clear_cache_threshold: int = 0
    reuse_prefix: bool = False
    local_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.local_steps <= MOST_LOCAL_STEPS:
            raise TandemError(f"rounds of {self.local_steps} local steps; at most {MOST_LOCAL_STEPS}")


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch, flat.

    Attributes:
        ids: (rows,) position of each row in the global batch of its step; keys its randomness.
        lengths: (rows,) number of tokens of each row.
        tokens: (sum of lengths,) token ids, row after row.
        span_counts: (rows,) number of target spans of each row.
        spans: (2 * sum of span_counts,) start and end of each span, relative to its row.
        padded_length: input positions that each row is padded to: at least the longest row minus one.
    """

    ids: Int32
    lengths: Int32
    tokens: Int32
    span_counts: Int32
    spans: Int32
    padded_length: int

    def __post_init__(self) -> None:
        counts = len(self.ids), len(self.lengths), len(self.span_counts)
        if len(set(counts)) > 1:
            raise TandemError("rows whose arrays do not belong together")
        if counts[0] and (self.lengths.min() < 1 or self.span_counts.min() < 0 or self.tokens.min(initial=0) < 0):
            raise TandemError("rows with negative numbers where there are none")
        if self.lengths.sum() != len(self.tokens) or 2 * self.span_counts.sum() != len(self.spans):
            raise TandemError("rows that are shorter or longer than they say")
        if not 0 <= self.padded_length <= LONGEST_ROW or counts[0] * self.padded_length > MOST_POSITIONS:
            raise TandemError(f"{counts[0]} rows of {self.padded_length} positions are more than anybody computes")

    @property
    def target_tokens(self) -> int:
        """Number of target tokens in all rows."""
        return int(self.spans[1::2].sum() - self.spans[0::2].sum())

    def take(self, picked: list[int], padded_length: int) -> Rows:
        """The rows at these indices, in this order, padded to another length."""
        token_starts = np.concatenate([[0], np.cumsum(self.lengths)])
        span_starts = np.concatenate([[0], np.cumsum(self.span_counts)])
        tokens = [self.tokens[token_starts[i] : token_starts[i + 1]] for i in picked]
        spans = [self.spans[2 * span_starts[i] : 2 * span_starts[i + 1]] for i in picked]
        empty = np.zeros(0, np.int32)
        return dataclasses.replace(
            self,
            ids=self.ids[picked],
            lengths=self.lengths[picked],
            tokens=np.concatenate(tokens) if tokens else empty,
            span_counts=self.span_counts[picked],
            spans=np.concatenate(spans) if spans else empty,
            padded_length=padded_length,
        )


@dataclass(frozen=True)
class Share:
    """One worker's part of one optimizer step: micro-batches whose gradients are summed. May be empty.

    Attributes:
        step: number of the step, from 1.
        micro_batches: the rows.
        check: whether the ranks compare their states before this step is applied; the same on every rank.
        wait_seconds: longest wait for the other ranks; 0 takes the ring's own limit.
        settle: whether gradients that are rounded on their way are not this time, and what was kept back of earlier
            ones is added: nothing is owed after it. Where a round ends, the ranks' moments become their average, too.
            The same on every rank.
        round: of a step that each rank of a group applies by itself, to its own weights: ``open``, or ``close`` where
            the average of what the ranks' weights have changed by is applied to all after it. What is between two
            closing steps is a round; a state is one at the end of a round. "" for steps that are summed, or of a
            machine alone.
    """

    step: int
    micro_batches: tuple[Rows, ...]
    check: bool = False
    wait_seconds: float = 0.0
    settle: bool = False
    round: RoundPart = ""

    def __post_init__(self) -> None:
        if self.round not in ("", "open", "close"):
            raise TandemError(f"{str(self.round)[:80]!r} is no part of a round")

    @property
    def positions(self) -> int:
        """Input positions to compute, padding included."""
        return sum(len(rows.ids) * rows.padded_length for rows in self.micro_batches)


@dataclass(frozen=True)
class RingSpec:
    """One rank's view of a generation's group.

    Attributes:
        rank, size: of this worker, and of the group; ``size`` is at least 2.
        backend: how it adds up.
        listen: for ``ring``: own addresses, ``ip:port`` each, one for each connection to a neighbour.
        connect: for ``ring``: where the next rank is reached, as many.
        token: a number below 2**20; the first sum must hold ``token + rank`` of every rank.
        form_seconds: limit for forming the group, its first sum included.
        wait_seconds: limit for one reduction.
        devices: for ``jaccl``: name of the RDMA device from rank i to rank j, row after row, "" on the diagonal.
        leader: for ``jaccl``: ``ip:port`` of rank 0.
        gradient_dtype: as what gradients are sent; losses and counts always go as fp32.
    """

    rank: int
    size: int
    backend: Backend
    listen: tuple[str, ...]
    connect: tuple[str, ...]
    token: int
    form_seconds: float
    wait_seconds: float
    devices: tuple[str, ...] = ()
    leader: str = ""
    gradient_dtype: GradientDtype = "fp32"


@dataclass(frozen=True)
class FileRef:
    """A file in the job's folder, named by what is in it.

    Attributes:
        name: its bare name in the job's folder. References come from other machines: no name leads out of it.
        sha256: hex digest of its content.
        size: bytes.

    Raises:
        TandemError: the name is no bare file name.
    """

    name: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        bare = self.name.isprintable() and not any(character in self.name for character in "/\\")
        if self.name in {"", ".", ".."} or not bare or len(self.name.encode()) > LONGEST_NAME_BYTES:
            raise TandemError(f"{self.name[:80]!r} is no name of a file in the job's folder")
        if not 0 <= self.size <= LARGEST_FILE_BYTES:
            raise TandemError(f"{self.name}: a size of {self.size} bytes")


# --- requests: what goes down to a worker, in order ---------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Load the model and make it ready. Answered by ``Ready``."""

    job: JobSpec


@dataclass(frozen=True)
class Restore:
    """Put back the trainable state of ``step``. Answered by ``Restored``."""

    step: int
    weights: FileRef
    optimizer: FileRef


@dataclass(frozen=True)
class TrainStep:
    """Do one optimizer step. Answered by ``ComputeStarted``, ``ReduceEntered``, ``StepDone`` or ``RingFailed``.

    In an open round ``LocalStepDone`` is all that follows ``ComputeStarted``; ``StepDone`` of all its steps comes when
    it is closed.

    With ``Joined`` the gradients are summed over the group. After ``RingFailed`` nothing is trained, and steps are
    passed over, until the next ``Join`` or ``Leave``.
    """

    share: Share


@dataclass(frozen=True)
class Evaluate:
    """Sum the losses of some rows, without gradients. Answered by ``EvalDone``."""

    chunk: int
    rows: Rows


@dataclass(frozen=True)
class Generate:
    """Continue a prompt. Answered by ``TokensGenerated`` events, the last with ``finished``.

    Attributes:
        id: names the answer.
        prompt: (n,) token ids.
        stop: token ids that end the text.
        max_tokens: at most so many new tokens.
        temperature, top_p, top_k, min_p: of the sampler; temperature 0 is greedy.
        repetition_penalty, repetition_context: penalty on tokens seen in the last so many; 0 is off.
        seed: of the sampler.
    """

    id: int
    prompt: Int32
    stop: tuple[int, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    repetition_context: int = 20
    seed: int = 0


@dataclass(frozen=True)
class CopyState:
    """Write the trainable state as it stands after the steps before this request. Answered by ``Copied``."""

    step: int


@dataclass(frozen=True)
class Fuse:
    """Merge the adapter into the model and write it out; needs no ``Setup``. Answered by ``Fused``.

    Attributes:
        model: the base model and the adapter to merge.
        save_path: folder to write, created by this request.
        dequantize: write full-precision weights from a quantized base.
        gguf_path: GGUF file to write beside the model, or "".
        gguf_type: ``f16``, ``f32``, ``bf16`` or ``q8_0``.
        source: name of the base model, for the model card and the Modelfile.
        fused_model: whether to write the fused safetensors model at all.
        peft_path: folder for the adapter in PEFT's layout, or "".
    """

    model: ModelSpec
    save_path: str
    dequantize: bool = False
    gguf_path: str = ""
    gguf_type: str = "f16"
    source: str = ""
    fused_model: bool = True
    peft_path: str = ""


@dataclass(frozen=True)
class Join:
    """Leave the group of before and form a new one with the other ranks. Answered by ``Joined`` or ``RingFailed``."""

    ring: RingSpec


@dataclass(frozen=True)
class Leave:
    """Train alone from here on: the group of before is left. Not answered."""


@dataclass(frozen=True)
class Probe:
    """Compute a share's gradient, apply nothing. Answered by ``Probed``.

    Attributes:
        share: rows like those to come; its step keys their randomness only.
        repeats: how often it is timed at least, after one time that is not.
        seconds: for how long it is timed, where the times do not agree sooner.
    """

    share: Share
    repeats: int = 1
    seconds: float = 0.0


@dataclass(frozen=True)
class Digest:
    """Say what the trainable state is. Answered by ``Digested``.

    Attributes:
        weights: whether the digest of the weights is wanted, or only the step.
    """

    weights: bool = True


@dataclass(frozen=True)
class Total:
    """The sum of all ranks' addends, for the reduction that waits for it: it overtakes the requests before it.

    Attributes:
        step, index: of the ``events.Addend`` that it belongs to.
        data: little-endian, of the addend's type and as long.
    """

    step: int
    index: int
    data: bytes


@dataclass(frozen=True)
class Stop:
    """End the process after what was asked before."""


Request = (
    Setup | Restore | TrainStep | Evaluate | Generate | CopyState | Fuse | Join | Leave | Probe | Digest | Total | Stop
)
