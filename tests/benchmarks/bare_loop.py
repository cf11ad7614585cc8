"""The steps of a run and nothing else: prints seconds per step. Started by ``overhead``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import mlx.core as mx

from coordinator.config import TrainConfig
from coordinator.data.batches import Batches
from coordinator.data.prepare import prepare
from coordinator.data.source import local_source
from coordinator.data.tokenise import TokeniseOptions
from coordinator.home import token_cache
from coordinator.program import Program
from coordinator.shares import StepSource
from coordinator.specs import job_spec
from node.worker import tuning
from node.worker.randomness import RowContext
from node.worker.trainer import Trainer


def main(model_path: Path, data: Path, steps: int, warm_up: int) -> None:
    if mx.default_device().type == mx.cpu:
        mx.disable_compile()
    config = TrainConfig(model=str(model_path), data=str(data), num_layers=-1, warmup=steps // 10)
    tokens = prepare(local_source(data), model_path, TokeniseOptions(), token_cache(), lambda *_: None, ("train",))
    program = Program(steps, 1, 1000, 1000, 1, validates=False)
    source = StepSource(tokens["train"], Batches(tokens["train"].lengths, config.batch_size, 0), program)
    shares = [source.share(step) for step in range(1, steps + 1)]
    job = job_spec(config, model_path, "bare", Path(), 0)
    assert job.tuning is not None
    assert job.optimizer is not None
    model, _ = tuning.load(job.model)
    context = RowContext()
    tuning.make_trainable(model, job.tuning, job.seed, context)
    trainer = Trainer(model, job.optimizer, job.seed, context, emit=lambda _: None)
    began = 0.0
    for share in shares:
        trainer.run(share)
        if share.step == warm_up:
            began = time.perf_counter()
    print((time.perf_counter() - began) / (steps - warm_up))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
