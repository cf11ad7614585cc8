"""What a worker says, and its node: immutable values, sent up the same stream in the order they happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from node.info import Battery, MemoryLevel, ThermalLevel
from node.spec import FileRef, Int32

FailureKind = Literal["user", "memory", "disk", "internal"]


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Attributes:
        device: name of MLX's default device, for example ``gpu``.
        model_type: from the model's configuration.
        layers: blocks the model has.
        trained_layers: blocks that are trained.
        parameters, trainable_parameters: numbers of elements; quantized weights count as what they stand for.
        quantized: whether the base model is quantized.
        load_seconds: time the loading took.
        active_memory_bytes: of the device, after loading.
        notes: things a person should be told, one line each.
    """

    device: str
    model_type: str
    layers: int
    trained_layers: int
    parameters: int
    trainable_parameters: int
    quantized: bool
    load_seconds: float
    active_memory_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Restored:
    """The trainable state of this step is in place."""

    step: int


@dataclass(frozen=True)
class ComputeStarted:
    """The forward pass of this step has begun."""

    step: int


@dataclass(frozen=True)
class LocalStepDone:
    """A step of an open round is applied to this rank's own weights; its ``StepDone`` follows when the round is closed.

    Attributes:
        step: its number, from 1.
        compute_seconds, padded_tokens: as in ``StepDone``.
    """

    step: int
    compute_seconds: float
    padded_tokens: int


@dataclass(frozen=True)
class ReduceEntered:
    """This worker's gradient is summed; it now waits for the others'."""

    step: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer step is applied.

    Attributes:
        step: its number, from 1.
        loss_sum: sum of the losses over the target tokens of the whole step, before the update.
        tokens: target tokens of the whole step.
        learning_rate: used for this update; Adafactor's own is given before it scales it for each parameter.
        grad_norm: global norm of the mean gradient, before clipping; of a step of a round, that of this rank's share.
        seconds: of the whole step; ``compute_seconds`` in forward and backward, ``wait_seconds`` in the reduction.
        peak_memory_bytes: highest since the worker started.
        padded_tokens: input positions computed, padding included.
    """

    step: int
    loss_sum: float
    tokens: int
    learning_rate: float
    grad_norm: float
    seconds: float
    compute_seconds: float
    wait_seconds: float
    peak_memory_bytes: int
    padded_tokens: int


@dataclass(frozen=True)
class Joined:
    """The group has formed, and its first sum proved who is in it.

    Attributes:
        rank, size: of this worker, and of the group.
        seconds: from the request to the proof.
    """

    rank: int
    size: int
    seconds: float


@dataclass(frozen=True)
class RingFailed:
    """The group could not be formed, or a reduction ended without a sum; nothing of the step was applied.

    Attributes:
        step: whose reduction it was; 0 while forming.
        reason: one line: ``a peer was lost``, ``no sum within 12 s``, ``a newer generation``, ...
    """

    step: int
    reason: str


@dataclass(frozen=True)
class Synchronised:
    """This rank's state differed from rank 0's when a step compared them, and was put right.

    Attributes:
        step: before whose update it was found.
        difference: largest relative difference (L2) of any array; infinite where a value was not finite.
    """

    step: int
    difference: float


@dataclass(frozen=True)
class Addend:
    """A piece of what this rank adds to a reduction that goes through the coordinator. Answered by ``spec.Total``.

    Attributes:
        step: whose reduction it is; 0 while forming.
        index: counts the group's pieces from 0, through all its reductions.
        data: little-endian fp32, at most ``spec.PIECE_BYTES``; or bf16.
        place: of a gradient whose pieces are rounded, which piece of it this is, from 1; 0 for all else.
        bf16: whether it has been rounded, and its total is to be.
    """

    step: int
    index: int
    data: bytes
    place: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class Probed:
    """What a share costs here.

    Attributes:
        seconds: of each timed repeat.
        positions: input positions computed each time, padding included.
        peak_memory_bytes: highest since the worker started.
    """

    seconds: tuple[float, ...]
    positions: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Digested:
    """The trainable state after a step: SHA-256 over the names and bytes of the parameters, in order of name."""

    step: int
    sha256: str


@dataclass(frozen=True)
class Leaving:
    """The machine's owner wants it back: it works on until it is let go. Said by the node, never by a worker."""


@dataclass(frozen=True)
class EvalDone:
    """Losses of one chunk of rows."""

    chunk: int
    loss_sum: float
    tokens: int


@dataclass(frozen=True)
class TokensGenerated:
    """Some more tokens of a text.

    Attributes:
        id: of the request.
        tokens: (n,) new token ids; the stop token is not among them.
        finished: why it ended, ``stop`` or ``length``; "" while it goes on.
        tokens_per_second: of generation, on the last event.
        prompt_tokens_per_second: of reading the prompt, on the last event.
    """

    id: int
    tokens: Int32
    finished: str = ""
    tokens_per_second: float = 0.0
    prompt_tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Copied:
    """The trainable state of a step is on disk.

    Attributes:
        step: the step it follows.
        requested: False for the copies a worker makes by itself.
        weights: trainable parameters, in ``mlx_lm``'s adapter form.
        optimizer: the optimizer's state.
    """

    step: int
    requested: bool
    weights: FileRef
    optimizer: FileRef


@dataclass(frozen=True)
class CopyFailed:
    """A copy could not be written; training goes on."""

    step: int
    requested: bool
    reason: str


@dataclass(frozen=True)
class Fused:
    """The model was written.

    Attributes:
        files: paths of what was written.
        seconds: time it took.
    """

    files: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a long task is: loading, fusing, exporting."""

    task: str
    done: int
    total: int


@dataclass(frozen=True)
class Heartbeat:
    """The process is alive: its phase, the step it is at, and memory in use."""

    phase: str
    step: int
    active_memory_bytes: int


@dataclass(frozen=True)
class Failed:
    """The worker could not go on, and why; it ends after this."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Condition:
    """How a worker's machine is. Its node says so, not the worker: when a job begins and whenever it has changed.

    Attributes:
        memory: how short of memory it is: what macOS shows as green, yellow and red.
        thermal: how hot; from ``serious`` on its processors are slowed down.
        battery: whether it runs on battery power; "" unknown.
    """

    memory: MemoryLevel = "unknown"
    thermal: ThermalLevel = "unknown"
    battery: Battery = ""


WorkerEvent = (
    Ready
    | Restored
    | ComputeStarted
    | LocalStepDone
    | ReduceEntered
    | StepDone
    | Joined
    | RingFailed
    | Synchronised
    | Addend
    | Probed
    | Digested
    | EvalDone
    | TokensGenerated
    | Copied
    | CopyFailed
    | Fused
    | Progress
    | Heartbeat
    | Leaving
    | Failed
)
"""What workers say, as bytes of worker.proto."""
Event = WorkerEvent | Condition
