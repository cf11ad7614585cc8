"""What is checked before anything expensive starts: memory, disk and folders."""

from __future__ import annotations

import bisect
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from coordinator.config import TrainConfig
from coordinator.memory import EstimateOptions, advise, estimate
from coordinator.memory.weights import quantization
from coordinator.models import ResolvedModel, weight_shapes
from node.errors import UserError
from node.hardware import Facts, facts
from node.sizes import show_size

SHORT_ROW = 128
"""Tokens of the longest row that are assumed while the data is not read yet."""
SYSTEM_SHARE = 0.1
"""Part of the memory that is left to the system where no limit of the GPU says so."""
SPARE_DISK_BYTES = 64 << 20


def memory_limit(found: Facts) -> int | None:
    """Most bytes that a job may need on this machine; None when its memory is unknown."""
    if found.gpu_memory_bytes is not None:
        return found.gpu_memory_bytes
    return None if found.total_memory_bytes is None else int(found.total_memory_bytes * (1 - SYSTEM_SHARE))


def estimate_options(
    config: TrainConfig, longest: int | None = None, rows_at_once: int | None = None
) -> EstimateOptions:
    """What of a run's options decides its memory.

    Args:
        config: of the run.
        longest: tokens of the longest row; None where the data is not read yet.
        rows_at_once: most rows in one forward pass; None the whole batch.
    """
    kind: Any = config.fine_tune_type
    return EstimateOptions(
        fine_tune_type=kind,
        num_layers=config.num_layers,
        rank=config.lora_rank,
        keys=config.lora_keys,
        batch_size=config.batch_size * config.grad_accumulation_steps,
        max_seq_length=min(longest or config.max_seq_length, config.max_seq_length),
        optimizer=config.optimizer,
        grad_checkpoint=config.grad_checkpoint,
        rounded=config.gradient_dtype != "fp32",
        rounds=config.local_steps > 1,
        micro_batch_rows=min(rows_at_once or config.batch_size, config.batch_size),
    )


def check_before_loading(
    config: TrainConfig, model: ResolvedModel, found: Facts | None = None, *, memory: bool = True
) -> list[str]:
    """Check all that can be known before the data is read.

    Memory is judged by the least that any data needs, single short rows; ``check_memory`` knows more once it is read.

    Args:
        config: of the run.
        model: that is trained.
        found: the machine; None looks at this one.
        memory: whether this machine's memory must suffice.

    Returns:
        Warnings, one line each.

    Raises:
        UserError: the job cannot fit, a folder cannot be written, or the disk is too full.
    """
    if config.fine_tune_type == "full" and quantization(model.config)[0]:
        raise UserError("--fine-tune-type full: a quantized model cannot be trained in full; use lora or dora")
    check_writable(Path(config.adapter_path))
    if config.fuse:
        check_writable(Path(config.save_path))
    check_disk(Path(config.adapter_path), disk_bytes(config, model))
    if not memory:
        return []
    return check_memory(config, model, min(SHORT_ROW, config.max_seq_length), rows_at_once=1, found=found)


def check_memory(
    config: TrainConfig,
    model: ResolvedModel,
    longest: int,
    rows_at_once: int | None = None,
    found: Facts | None = None,
) -> list[str]:
    """Check that a job fits into this machine's memory, if need be row by row.

    Args:
        config: of the run; ``force`` turns the refusal into a warning.
        model: that is trained.
        longest: tokens of the longest row.
        rows_at_once: most rows in one forward pass; None the whole batch.
        found: the machine; None looks at this one.

    Returns:
        Warnings, one line each.

    Raises:
        UserError: it cannot fit; the message says what would.
    """
    found = found or facts()
    limit = memory_limit(found)
    if limit is None:
        return []
    shapes = weight_shapes(model.path)
    options = estimate_options(config, longest, rows_at_once)
    needed = estimate(model.config, shapes, options).total
    least = estimate(model.config, shapes, estimate_options(config, longest, 1)).total
    free = found.free_memory_bytes
    if least > limit:
        best = advise(model.config, shapes, estimate_options(config, longest, 1), limit, model.name).best
        way = f"this would fit: {best.command}" if best is not None else "nothing makes it fit; take a smaller model"
        message = (
            f"{model.name} needs about {show_size(least)} to train, this machine has {show_size(limit)} for it; {way}"
        )
        if not config.force:
            raise UserError(f"{message} (--force tries anyway)")
        return [message]
    if needed > limit:
        whole, here = show_size(needed), show_size(limit)
        warning = f"a whole batch of rows of {longest} tokens needs about {whole}, there are {here}"
        return [f"{warning}; it is computed in parts, with the same result"]
    if free is not None and needed > free:
        return [f"about {show_size(needed)} needed, only {show_size(free)} free now: close other programs"]
    return []


def fitting_tokens(config: TrainConfig, model: ResolvedModel, longest: int, found: Facts | None = None) -> int | None:
    """Most input positions of one micro-batch that fit; None when whole batches of the longest rows do."""
    limit = memory_limit(found or facts())
    if limit is None:
        return None
    shapes = weight_shapes(model.path)

    def fits(rows: int) -> bool:
        return estimate(model.config, shapes, estimate_options(config, longest, rows)).total <= limit

    if fits(config.batch_size):
        return None
    # More rows never need less: the largest number that fits lies where the answer changes.
    return max(1, bisect.bisect_left(range(1, config.batch_size), x=True, key=lambda rows: not fits(rows))) * longest


def least_bytes(config: TrainConfig, model: ResolvedModel, longest: int) -> int:
    """What a machine needs at least to take part: memory of a training row by row."""
    return estimate(model.config, weight_shapes(model.path), estimate_options(config, longest, 1)).total


def disk_bytes(config: TrainConfig, model: ResolvedModel) -> int:
    """About how much a run writes: checkpoints, copies, and the fused and exported models."""
    shapes = weight_shapes(model.path)
    size = estimate(model.config, shapes, estimate_options(config, SHORT_ROW, 1))
    trained = size.trainable_bytes or size.gradient_bytes
    iters = config.total_iters(1) if config.epochs is None else config.save_every
    kept = -(-iters // config.save_every)
    kept = kept if config.keep_last is None else min(kept, config.keep_last + 1)
    written = (kept + 2) * (trained + size.optimizer_bytes) + 2 * trained
    if config.fuse:
        half_precision = 2 * size.parameters
        written += half_precision if config.dequantize else size.weights_bytes
        written += half_precision if config.export_gguf else 0
    return written


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Check that a folder's disk has room.

    Raises:
        UserError: it has too little.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed_bytes + SPARE_DISK_BYTES:
        raise UserError(
            f"{folder}: the disk has {show_size(free)} free, this run needs about"
            f" {show_size(needed_bytes + SPARE_DISK_BYTES)}; free some, keep fewer checkpoints (--keep-last 1), or"
            " choose another folder"
        )


def check_writable(folder: Path) -> None:
    """Check that a folder can be made or written to; leaves nothing behind.

    Raises:
        UserError: it cannot.
    """
    folder = folder.expanduser()
    there = _existing(folder)
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is a file; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from error


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = Path(os.path.abspath(folder.expanduser()))
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
