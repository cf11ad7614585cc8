"""From options to what a worker and ``mlx_lm`` understand. Pure."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from coordinator.config import TrainConfig
from node.spec import FineTuneType, JobSpec, ModelSpec, OptimizerSpec, TuningSpec

# What is done again where no worker survives, at most. Copies begin at half of it, each when the last one is whole.
MOST_REPLAYED_STEPS = 10
# Full fine-tuning writes its whole state while it waits, so it does so less often.
MOST_REPLAYED_STEPS_FULL = 100


def job_spec(
    config: TrainConfig, model: Path, run: str, folder: Path, cache_threshold: int, *, rows_return: bool = False
) -> JobSpec:
    """What the worker must know. ``config`` has its warm-up resolved.

    Args:
        config: of the run.
        model: folder of the model.
        run: its id.
        folder: the worker's.
        cache_threshold: bytes.
        rows_return: whether the run trains on rows more than once.
    """
    kind: FineTuneType = config.fine_tune_type  # type: ignore[assignment]
    return JobSpec(
        job=run,
        folder=str(folder),
        model=ModelSpec(str(model), trust_remote_code=config.trust_remote_code),
        seed=config.seed,
        tuning=TuningSpec(
            fine_tune_type=kind,
            num_layers=config.num_layers,
            rank=config.lora_rank,
            scale=config.scale,
            dropout=config.lora_dropout,
            keys=config.lora_keys,
            grad_checkpoint=config.grad_checkpoint,
            neftune_alpha=config.neftune_alpha,
            initial_weights=config.resume_adapter_file or "",
        ),
        optimizer=OptimizerSpec(
            name=config.optimizer,
            arguments=config.optimizer_config.get(config.optimizer, {}) or {},
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup or 0,
            schedule=schedule(config),
            max_grad_norm=config.max_grad_norm,
            loraplus_ratio=config.loraplus_ratio,
        ),
        copy_every=MOST_REPLAYED_STEPS_FULL if kind == "full" else MOST_REPLAYED_STEPS // 2,
        clear_cache_threshold=cache_threshold,
        reuse_prefix=_reuses_prefix(config, rows_return=rows_return),
        local_steps=config.local_steps,
    )


def _reuses_prefix(config: TrainConfig, *, rows_return: bool) -> bool:
    """Whether outputs of the frozen layers are kept: useless for rows met once, and with noise never the same."""
    if config.reuse_prefix == "auto":
        return rows_return and config.neftune_alpha == 0
    return config.reuse_prefix == "on"


def schedule(config: TrainConfig) -> dict[str, Any] | None:
    """The learning-rate schedule, with ``--warmup`` in it when that was said."""
    if config.lr_schedule is None:
        return None
    return {**config.lr_schedule, **({"warmup": config.warmup} if config.warmup else {})}


def adapter_config(config: TrainConfig) -> dict[str, Any]:
    """``adapter_config.json`` as ``mlx_lm`` writes and reads it."""
    values = dataclasses.asdict(config)
    for name in ("lora_rank", "lora_alpha", "lora_scale", "lora_dropout", "lora_keys"):
        del values[name]
    values["lora_parameters"] = None
    if config.fine_tune_type != "full":
        values["lora_parameters"] = {"rank": config.lora_rank, "scale": config.scale, "dropout": config.lora_dropout}
        if config.lora_keys is not None:
            values["lora_parameters"]["keys"] = list(config.lora_keys)
    values["train"] = True
    return dict(sorted(values.items()))
