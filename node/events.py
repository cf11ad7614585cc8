"""What a worker says: immutable values, sent up the same stream in the order they happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        grad_norm: global norm of the mean gradient, before clipping.
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


Event = (
    Ready
    | Restored
    | ComputeStarted
    | ReduceEntered
    | StepDone
    | EvalDone
    | TokensGenerated
    | Copied
    | CopyFailed
    | Fused
    | Progress
    | Heartbeat
    | Failed
)
