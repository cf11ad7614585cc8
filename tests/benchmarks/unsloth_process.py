"""The MLX trainer of ``unsloth-zoo`` as it is, driven by its public functions: each iteration's figures as a JSON line.

Runs as a file in that package's own environment, where nothing of this program is. Its one argument is a JSON object
with the entries of ``tests.benchmarks.unsloth.Asked``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(asked: dict[str, Any]) -> None:
    if asked["core"] is not None:
        # Before anything starts a thread.
        os.sched_setaffinity(0, {asked["core"]})
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    model, tokenizer = FastMLXModel.from_pretrained(
        asked["model"],
        max_seq_length=asked["max_seq_length"],
        load_in_4bit=False,
        text_only=True,
        # It would take fp32 weights to bf16.
        dtype=asked["dtype"],
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=asked["rank"],
        # It multiplies by alpha / rank, the others by a scale.
        lora_alpha=asked["rank"] * asked["scale"],
        finetune_last_n_layers=asked["trained"],
        use_gradient_checkpointing="mlx" if asked["gradient_checkpointing"] else False,
    )
    folder = Path(asked["folder"])
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "first.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    rows = [json.loads(line) for line in Path(asked["rows"]).read_text().splitlines()]
    config = MLXTrainingConfig(
        per_device_train_batch_size=asked["batch"],
        gradient_accumulation_steps=1,
        max_steps=asked["iters"],
        warmup_steps=0,
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="constant",
        optim=asked["optimizer"],
        weight_decay=0.0,
        # Nobody clips here; None would.
        max_grad_leaf_norm=0.0,
        logging_steps=1,
        output_dir=str(folder / "adapters"),
        max_seq_length=asked["max_seq_length"],
        gradient_checkpointing=asked["gradient_checkpointing"],
        # It turns checkpointing on where it finds that better.
        compile_auto_tune=False,
        completion_only_loss=asked["masked"] or None,
    )
    trainer = MLXTrainer(model, tokenizer, rows, args=config)

    def report(step: int, *said: Any) -> None:
        _, loss, _, _, peak, _, tokens = said[:7]
        figures = {"at": time.monotonic(), "iteration": step, "loss": loss, "tokens": tokens, "peak_memory": peak * 1e9}
        os.write(1, f"\n{json.dumps(figures)}\n".encode())

    trainer.add_step_callback(report)
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
