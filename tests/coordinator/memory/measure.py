"""Measure the peak memory of real training steps; run as a program, in a process of its own.

Reads a JSON list of jobs from stdin, each with ``config`` (of a model), ``dtype``, ``bits`` (0 for none),
``fine_tune_type``, ``num_layers``, ``rank``, ``batch_size``, ``length`` (input positions of each row),
``grad_checkpoint`` and ``optimizer``. Prints the list of the highest numbers of bytes that MLX held during two steps of
the worker's own trainer.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import _get_classes, quantize_model

from coordinator.data.padding import micro_batches, positions_at_once
from node.spec import OptimizerSpec, Rows, Share, TuningSpec
from node.worker.randomness import RowContext
from node.worker.trainer import Trainer
from node.worker.tuning import make_trainable


def build(config: dict[str, Any], dtype: str, bits: int) -> nn.Module:
    """A random model, quantized where bits are given."""
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    if bits:
        model, _ = quantize_model(model, config, 64, bits)
    return model


def rows(count: int, length: int, vocab_size: int) -> Rows:
    """Full rows of random tokens, every token a target."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, count * (length + 1)).astype(np.int32)
    each = np.ones(count, np.int32)
    spans = np.tile(np.array([1, length + 1], np.int32), count)
    return Rows(np.arange(count, dtype=np.int32), each * (length + 1), tokens, each, spans, length)


def measure(job: dict[str, Any]) -> int:
    """Peak bytes of two whole steps: loss, gradient, gradient norm, update."""
    gc.collect()
    model = build(job["config"], job["dtype"], job["bits"])
    context = RowContext()
    tuning = TuningSpec(
        fine_tune_type=job["fine_tune_type"],
        num_layers=job["num_layers"],
        rank=job["rank"],
        grad_checkpoint=job["grad_checkpoint"],
    )
    make_trainable(model, tuning, 0, context)
    trainer = Trainer(model, OptimizerSpec(job["optimizer"]), 0, context, emit=lambda event: None)
    batch = rows(job["batch_size"], job["length"], job["config"]["vocab_size"])
    parts = micro_batches(batch, positions_at_once(job["fine_tune_type"]))
    mx.eval(model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    kept = None
    for step in (1, 2):
        trainer.run(Share(step, parts))
        if job["fine_tune_type"] != "full":
            kept = trainer.published()  # as the worker keeps the last state until the next is there
    del kept
    return int(mx.get_peak_memory())


if __name__ == "__main__":
    sys.stdout.write(f"\n{json.dumps([measure(job) for job in json.load(sys.stdin)])}\n")
