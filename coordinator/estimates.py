"""How much memory a training takes by each method, on this machine or another one, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from coordinator.config import TrainConfig
from coordinator.memory import Advice, Estimate, EstimateOptions, advise
from coordinator.memory import estimate as estimate_step
from coordinator.memory.architecture import has_experts
from coordinator.memory.weights import quantization
from coordinator.models import Peek, peek
from coordinator.preflight import memory_limit
from node.hardware import GIB, Facts, default_gpu_memory, facts
from node.sizes import parse_size

COMFORTABLE = 0.8
"""Part of the limit up to which a job leaves the system room."""
Verdict = Literal["fits", "tight", "too much", "unknown"]


@dataclass(frozen=True)
class MethodMemory:
    """What one method needs.

    Attributes:
        method: its name: ``lora 4-bit``, ``full``.
        options: the job by it.
        needed: bytes by cause; ``needed.total`` is all.
        verdict: ``fits``; ``tight``, which slows down; ``too much``; or ``unknown``.
    """

    method: str
    options: EstimateOptions
    needed: Estimate
    verdict: Verdict


@dataclass(frozen=True)
class JobMemory:
    """What a job needs.

    Attributes:
        seen: the model: its name, configuration and the shapes of its tensors.
        machine: that it was judged for.
        limit_bytes: most that a training may use there; None unknown.
        chosen: the job as it was asked for.
        methods: the same job by each method that the model can be trained by.
        advice: how it could need less; None where it fits well, or nobody knows.
    """

    seen: Peek
    machine: Facts
    limit_bytes: int | None
    chosen: MethodMemory
    methods: tuple[MethodMemory, ...]
    advice: Advice | None

    @property
    def total_bytes(self) -> int:
        """Of the job as it was asked for."""
        return self.chosen.needed.total

    @property
    def fits(self) -> bool | None:
        """Whether it does, as asked for and computed in whole batches; None where the machine's memory is unknown."""
        return None if self.chosen.verdict == "unknown" else self.chosen.verdict != "too much"


def estimate(
    model: str,
    *,
    fine_tune_type: str = TrainConfig.fine_tune_type,
    batch_size: int = TrainConfig.batch_size,
    max_seq_length: int = TrainConfig.max_seq_length,
    num_layers: int = TrainConfig.num_layers,
    lora_rank: int = TrainConfig.lora_rank,
    optimizer: str = TrainConfig.optimizer,
    grad_checkpoint: bool = TrainConfig.grad_checkpoint,
    memory: str | int | None = None,
) -> JobMemory:
    """How much memory a training would take. Loads no weights, and downloads none.

    Args:
        model: a Hugging Face repo or a local folder.
        fine_tune_type: as in ``TrainConfig``, like those below.
        batch_size: rows.
        max_seq_length: tokens of the longest row.
        num_layers: that are trained.
        lora_rank: of the adapter.
        optimizer: its name.
        grad_checkpoint: whether activations are computed twice instead of kept.
        memory: of another Mac, as ``16GB`` or in bytes, instead of this machine's.

    Raises:
        UserError: there is no such model, or an option cannot be.
    """
    checked = TrainConfig(
        model=model,
        fine_tune_type=fine_tune_type,
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        num_layers=num_layers,
        lora_rank=lora_rank,
        optimizer=optimizer,
        grad_checkpoint=grad_checkpoint,
    )
    kind: Any = checked.fine_tune_type
    options = EstimateOptions(
        fine_tune_type=kind,
        num_layers=num_layers,
        rank=lora_rank,
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        optimizer=optimizer,
        grad_checkpoint=grad_checkpoint,
    )
    seen = peek(model)
    machine = _machine(memory)
    limit = memory_limit(machine)
    chosen = _judge(seen, "chosen", options, limit)
    advice = None
    if limit is not None and chosen.verdict in {"tight", "too much"}:
        advice = advise(seen.config, seen.shapes, options, int(limit * COMFORTABLE), model)
    methods = tuple(_judge(seen, name, changed, limit) for name, changed in _methods(seen, options))
    return JobMemory(seen, machine, limit, chosen, methods, advice)


def _methods(seen: Peek, options: EstimateOptions) -> list[tuple[str, EstimateOptions]]:
    """The methods that this model can be trained by, by name."""
    bits, _ = quantization(seen.config)
    found = [
        ("lora 4-bit", replace(options, fine_tune_type="lora", bits=4)),
        ("lora", replace(options, fine_tune_type="lora")),
        ("dora", replace(options, fine_tune_type="dora")),
        ("full", replace(options, fine_tune_type="full")),
    ]
    if bits:
        found = [
            (f"lora {bits}-bit", replace(options, fine_tune_type="lora")),
            (f"dora {bits}-bit", replace(options, fine_tune_type="dora")),
        ]
    # Experts have no DoRA in mlx_lm.
    return [(name, chosen) for name, chosen in found if not (name.startswith("dora") and has_experts(seen.config))]


def _machine(memory: str | int | None) -> Facts:
    """This machine, or a Mac with so much memory of which nothing is known but that."""
    if memory is None:
        return facts()
    total = parse_size(memory, "--memory")
    return replace(
        facts(),
        name=f"a Mac with {total / GIB:.0f} GB",
        chip=None,
        total_memory_bytes=total,
        free_memory_bytes=None,
        gpu_memory_bytes=default_gpu_memory(total),
        os=None,
    )


def _judge(seen: Peek, method: str, options: EstimateOptions, limit: int | None) -> MethodMemory:
    needed = estimate_step(seen.config, seen.shapes, options)
    if limit is None:
        return MethodMemory(method, options, needed, "unknown")
    room: Verdict = "tight" if needed.total > limit * COMFORTABLE else "fits"
    return MethodMemory(method, options, needed, "too much" if needed.total > limit else room)
