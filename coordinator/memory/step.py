"""The memory of one training step.

A step peaks in one of three places: in the loss, where several copies of a part of the logits live at once; in the
backward pass of the last block, beside all the activations kept for it; or in the update, where old and new state live
side by side.
The factors below were fitted to the peaks that MLX reported for the worker's own trainer on random models (fp32 and
bf16, 1-4 rows of 64-512 tokens, vocabularies of 256-32000); the tests measure again and compare.
Attention counts with the scores of the pairs that the worker's parts of queries see, and with all of them where a model
attends in a way of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from coordinator.data.padding import positions_at_once
from coordinator.memory.architecture import Architecture, Linear, architecture
from coordinator.memory.weights import Shapes, Weights, expected_weights, read_weights
from node.logits import rows_at_once
from node.spec import FineTuneType

MIB = 1 << 20

LOGIT_COPIES, LOGIT_COPIES_IN_PARTS = 4.2, 8.2
"""Copies alive at once of the logits that are computed at a time: themselves, exponentials, probabilities and gradient;
MLX allocates the next part's before the last one's are free."""
HIDDEN_COPIES = 3
"""Hidden states that the loss holds: those it picked, and their gradient in parts and whole."""
SCORES_IN_FLIGHT, INNER_IN_FLIGHT = 2.3, 4.5
"""Temporaries in the backward pass of a block, in matrices of attention scores and in feed-forward widths."""
CHECKPOINT_RECOMPUTED = 1.55
"""What a recomputed block holds, in units of what it would have kept."""
UPDATE_IN_FLIGHT = 18
"""Temporaries of the update, in sizes of the largest trained matrix: MLX allocates some operations ahead. All else is
computed in the memory of the gradient and of the old state."""
FP32_BYTES = 4
PROCESS_BYTES = 400 * MIB
"""Python, MLX, tokenizer and the worker's own memory, which MLX's counter does not see."""
FRAGMENTATION = 0.03
"""What the allocator loses, as a part of the rest."""

# State per trained element; adafactor keeps rows and columns only.
_MOMENTS: dict[str, int] = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 0}


@dataclass(frozen=True)
class EstimateOptions:
    """What of a job decides its memory; names and defaults are those of ``coordinator train``.

    Attributes:
        fine_tune_type: ``lora``, ``dora`` or ``full``.
        num_layers: blocks to train, from the last; -1 all.
        rank: of the adapters.
        keys: linear layers of a block that get adapters; None all.
        batch_size: rows of one batch.
        max_seq_length: tokens of the longest row; the true longest where the data is known.
        optimizer: ``adam``, ``adamw``, ``muon``, ``sgd`` or ``adafactor``.
        grad_checkpoint: recompute activations.
        bits: as if the base were quantized to so many; None takes it as it is.
        micro_batch_rows: most rows computed at once; None as many as are worth it.
        gpu: whether a GPU computes it, whose loss takes more positions at a time.
        rounded: whether gradients are rounded on their way to other machines, and what that keeps back is owed.
        rounds: whether machines train by themselves for rounds of steps.
    """

    fine_tune_type: FineTuneType = "lora"
    num_layers: int = 16
    rank: int = 8
    keys: tuple[str, ...] | None = None
    batch_size: int = 4
    max_seq_length: int = 2048
    optimizer: str = "adam"
    grad_checkpoint: bool = False
    bits: int | None = None
    micro_batch_rows: int | None = None
    gpu: bool = True
    rounded: bool = False
    rounds: bool = False

    @property
    def rows_at_once(self) -> int:
        """Rows of one forward pass."""
        enough = positions_at_once(self.fine_tune_type)
        worthwhile = self.batch_size if enough is None else max(1, enough // self.max_seq_length)
        return min(self.batch_size, worthwhile, self.micro_batch_rows or self.batch_size)


@dataclass(frozen=True)
class Estimate:
    """Bytes by cause; they add up to the highest point of a step.

    Attributes:
        weights_bytes: the model.
        trainable_bytes: adapters; 0 for full fine-tuning, which trains the weights themselves.
        optimizer_bytes: moments; with other machines also what rounding keeps back, and what a round needs.
        gradient_bytes: gradients of what is trained.
        activation_bytes: kept for the backward pass, and the temporaries of one block.
        logits_bytes: what the loss holds beyond those temporaries.
        copies_bytes: what the update holds beyond all of the backward pass: old state beside the new.
        overhead_bytes: the process itself, and what the allocator loses.
        trainable_parameters, parameters: elements.
        exact_weights: whether the weights' size was read from their files.
    """

    weights_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    logits_bytes: int
    copies_bytes: int
    overhead_bytes: int
    trainable_parameters: int = field(metadata={"bytes": False})
    parameters: int = field(metadata={"bytes": False})
    exact_weights: bool = field(metadata={"bytes": False})

    @property
    def device_bytes(self) -> int:
        """The peak that MLX reports: all but the overhead."""
        state = self.weights_bytes + self.trainable_bytes + self.optimizer_bytes + self.gradient_bytes
        return state + self.activation_bytes + self.logits_bytes + self.copies_bytes

    @property
    def total(self) -> int:
        """All of it."""
        return self.device_bytes + self.overhead_bytes


def estimate(config: Mapping[str, Any], shapes: Shapes | None, options: EstimateOptions) -> Estimate:
    """Estimate the memory of a training job.

    Args:
        config: the model's ``config.json``.
        shapes: type and shape of each of its tensors, None where they are not at hand.
        options: of the job.

    Raises:
        UserError: the configuration does not say how large the model is.
    """
    model = architecture(config)
    if shapes is not None and options.bits is None:
        weights = read_weights(config, model, shapes)
    else:
        weights = expected_weights(config, model, options.bits)
    return _Step(model, weights, options).estimate()


@dataclass(frozen=True)
class _Step:
    """The parts of one step's memory, in bytes."""

    model: Architecture
    weights: Weights
    options: EstimateOptions

    @cached_property
    def trained_layers(self) -> tuple[tuple[Linear, ...], ...]:
        wanted = self.options.num_layers
        layers = self.weights.layers
        return layers if wanted < 0 or wanted >= len(layers) else layers[len(layers) - wanted :]

    @cached_property
    def adapted(self) -> list[Linear]:
        """The linear layers that get an adapter, or that are trained themselves."""
        keys = None if self.options.fine_tune_type == "full" else self.options.keys
        return [linear for layer in self.trained_layers for linear in layer if keys is None or linear.name in keys]

    @property
    def trainable_parameters(self) -> int:
        if self.options.fine_tune_type == "full":
            return sum(linear.parameters for linear in self.adapted)
        rank = self.options.rank
        found = sum(rank * (linear.inputs + linear.outputs) * linear.copies for linear in self.adapted)
        magnitudes = sum(linear.outputs for linear in self.adapted)
        return found + (magnitudes if self.options.fine_tune_type == "dora" else 0)

    @property
    def trained_bytes(self) -> int:
        """Adapters are fp32 whatever the model is."""
        full = self.options.fine_tune_type == "full"
        return self.trainable_parameters * (self.weights.compute_bytes if full else FP32_BYTES)

    @property
    def largest_trained_bytes(self) -> int:
        """The largest single array that is trained."""
        if self.options.fine_tune_type == "full":
            return self.weights.compute_bytes * max((linear.parameters for linear in self.adapted), default=0)
        sides = [max(linear.inputs, linear.outputs) * linear.copies for linear in self.adapted]
        return FP32_BYTES * self.options.rank * max(sides, default=0)

    @property
    def optimizer_bytes(self) -> int:
        if self.options.optimizer == "adafactor":
            full = self.options.fine_tune_type == "full"
            rank = self.options.rank
            return FP32_BYTES * sum(li.inputs + li.outputs + (0 if full else 2 * rank) for li in self.adapted)
        return self.trained_bytes * _MOMENTS.get(self.options.optimizer, 2)

    @property
    def between_machines_bytes(self) -> int:
        """Kept for other machines: what is owed to them, and a round's momentum and the state that it began with."""
        numbers = self.trainable_parameters * FP32_BYTES
        began = self.trained_bytes + self.optimizer_bytes
        return self.options.rounded * numbers + self.options.rounds * (numbers + began)

    @property
    def gradient_bytes(self) -> int:
        """One gradient, or a sum in fp32 and one part of it where a batch is computed in parts."""
        if self.options.rows_at_once < self.options.batch_size:
            return 2 * self.trainable_parameters * FP32_BYTES
        return self.trained_bytes

    @property
    def tokens(self) -> int:
        return self.options.rows_at_once * self.options.max_seq_length

    @property
    def kept_per_layer(self) -> int:
        """What one trained block keeps for its backward pass.

        With adapters in a half-precision model also an fp32 copy of each layer's input, and with DoRA each layer's
        output before it is scaled.
        """
        width = self.weights.compute_bytes
        kept = self.model.kept_elements(self.options.max_seq_length, gpu=self.options.gpu) * width
        per_layer = max(len(self.trained_layers), 1)
        if self.options.fine_tune_type != "full" and width < FP32_BYTES:
            kept += FP32_BYTES * sum(self._seen(linear, linear.inputs) for linear in self.adapted) // per_layer
        if self.options.fine_tune_type == "dora":
            kept += width * sum(self._seen(linear, linear.outputs) for linear in self.adapted) // per_layer
        return kept * self.tokens

    def _seen(self, linear: Linear, width: int) -> int:
        """Width per token: of experts, only those that a token goes through count."""
        if linear.copies == 1:
            return width
        share = self.model.inner / max(min(linear.inputs, linear.outputs), 1)
        return int(width * min(max(share, 1), linear.copies))

    @property
    def in_flight_bytes(self) -> int:
        """Temporaries of the block whose backward pass runs."""
        parts = self.model.attention_parts(self.options.max_seq_length, gpu=self.options.gpu)
        largest = max((end - start) * end for start, end in parts) / max(self.options.max_seq_length, 1)
        scores = SCORES_IN_FLIGHT * self.model.heads * largest
        block = (scores + INNER_IN_FLIGHT * self.model.inner) * self.tokens * self.weights.compute_bytes
        if self.options.grad_checkpoint:
            block += CHECKPOINT_RECOMPUTED * self.kept_per_layer
        if self.options.fine_tune_type == "dora":
            block += 2 * FP32_BYTES * max((linear.inputs * linear.outputs for linear in self.adapted), default=0)
        return int(block)

    @property
    def kept_bytes(self) -> int:
        """What all trained blocks keep; DoRA on a quantized base keeps its weights unquantized, too."""
        layers = len(self.trained_layers)
        if self.options.grad_checkpoint:
            return layers * self.model.hidden * self.tokens * self.weights.compute_bytes
        kept = layers * self.kept_per_layer
        if self.options.fine_tune_type == "dora" and self.weights.bits:
            kept += sum(linear.parameters for linear in self.adapted) * self.weights.compute_bytes
        return kept

    @property
    def loss_bytes(self) -> int:
        """What the loss holds: logits in parts, always fp32, and hidden states."""
        at_once = rows_at_once(self.model.vocab, gpu=self.options.gpu)
        copies = LOGIT_COPIES if self.tokens <= at_once else LOGIT_COPIES_IN_PARTS
        logits = copies * self.model.vocab * min(self.tokens, at_once) * FP32_BYTES
        return int(logits) + HIDDEN_COPIES * self.model.hidden * self.tokens * self.weights.compute_bytes

    def estimate(self) -> Estimate:
        full = self.options.fine_tune_type == "full"
        trained, moments, gradients = self.trained_bytes, self.optimizer_bytes, self.gradient_bytes
        activations = self.kept_bytes + self.in_flight_bytes
        beyond = max(0, self.loss_bytes - gradients - self.in_flight_bytes)
        old_state = 0 if full else trained + moments
        update = trained + UPDATE_IN_FLIGHT * self.largest_trained_bytes + old_state
        copies = max(0, update - gradients - activations - beyond)
        moments += self.between_machines_bytes
        state = self.weights.total_bytes + (0 if full else trained) + moments
        device = state + gradients + activations + beyond + copies
        return Estimate(
            weights_bytes=self.weights.total_bytes,
            trainable_bytes=0 if full else trained,
            optimizer_bytes=moments,
            gradient_bytes=gradients,
            activation_bytes=activations,
            logits_bytes=beyond,
            copies_bytes=copies,
            overhead_bytes=PROCESS_BYTES + int(FRAGMENTATION * device),
            trainable_parameters=self.trainable_parameters,
            parameters=self.model.parameters,
            exact_weights=self.weights.exact,
        )
