"""Made-up runs for the views' tests."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.stream import (
    FAILED,
    Advanced,
    FleetFormed,
    FleetMember,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    Sampled,
    StepFinished,
    Tested,
    Validated,
)

FACTS = (
    ("model", "mlx-community/Mistral-7B-v0.3-4bit · 7.2 B parameters"),
    ("machine", "Studio · M2 Max · 64 GB (51 free) · macOS 26.2 · mlx 0.32.4"),
    ("method", "QLoRA rank 8 on 16 of 32 layers · 1.7 M trained (0.02 %)"),
    ("data", "data/wikisql · 1,000 train, 100 valid, 100 test"),
)


def started(total: int = 100, **changes: Any) -> RunStarted:
    values: dict[str, Any] = {
        "run": "20260712-4f2a",
        "name": "adapters",
        "config": {"steps_per_eval": 20, "steps_per_report": 10},
        "total_iters": total,
        "total_steps": total,
        "first_step": 1,
        "facts": FACTS,
    }
    return RunStarted(**{**values, **changes})


def step_metrics(step: int, total: int = 100, seed: int = 0, **changes: Any) -> dict[str, Any]:
    noise = random.Random(f"{seed}:{step}")
    compute = 0.8 + 0.2 * noise.random()
    wait = 0.05 + 0.1 * noise.random()
    values = {
        "step": step,
        "iter": step,
        "loss": 1.3 + 1.9 * math.exp(-6 * step / total) + 0.25 * noise.gauss(0, 1) * math.exp(-step / total),
        "tokens": noise.randint(600, 1400),
        "learning_rate": 1e-5 * min(step / (total * 0.1), 1) * (0.5 + 0.5 * math.cos(math.pi * step / total)),
        "grad_norm": abs(0.8 + 0.3 * noise.gauss(0, 1)) + 2 * math.exp(-20 * step / total),
        "seconds": compute + wait + 0.01,
        "compute_seconds": compute,
        "wait_seconds": wait,
        "nodes": 1,
        "peak_memory_bytes": int((9.5 + 2 * min(step / (total * 0.3), 1)) * 2**30),
        "padded_tokens": 2000,
    }
    return {**values, **changes}


FLEET = FleetFormed(
    (FleetMember("Studio", "Apple M2 Max", 64 << 30, 6), FleetMember("Air", "Apple M1", 16 << 30, 2)),
    8,
    (
        "2 machines: about 1.3 times Studio alone",
        "Studio 6/8 of the rows, computes 0.80 s",
        "Air 2/8 of the rows, computes 0.81 s",
        "Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)",
        "Mini is left out: a step would take 1.40 s with it and 0.90 s without",
    ),
)


def fleet_metrics(step: int, names: tuple[str, ...] = ("Studio", "Air"), **changes: Any) -> dict[str, Any]:
    """A step of several machines: the first has three quarters of the rows, the last is the slowest."""
    last = len(names) - 1
    per_node = {
        name: {
            "rows": 6 if index == 0 else 2,
            "positions": 1500 if index == 0 else 500,
            "compute_seconds": 1.0 if index == last else 0.75,
            "wait_seconds": 0.1 if index == last else 0.35,
            "peak_memory_bytes": (48 if index == 0 else 15) << 30,
        }
        for index, name in enumerate(names)
    }
    parts = {"seconds": 1.15, "compute_seconds": 1.0, "wait_seconds": 0.1, "nodes": len(names), "per_node": per_node}
    return step_metrics(step, **{**parts, **changes})


def validation_metrics(step: int, total: int = 100, **changes: Any) -> dict[str, Any]:
    loss = 1.45 + 1.85 * math.exp(-6 * step / total) + 0.08 * (step / total) ** 2
    return {"step": step, "val_loss": loss, "val_tokens": 20_000, "seconds": 4.2, **changes}


def whole_run(total: int = 100, report: int = 10, evaluate: int = 20, finish: bool = True) -> Iterator[RunEvent]:
    for done in (0, 40, 100):
        yield Advanced("tokenising train", done, 100)
    yield started(total)
    yield Validated(validation_metrics(0, total), best=True)
    for step in range(1, total + 1):
        yield StepFinished(step_metrics(step, total), report=step % report == 0)
        if step % evaluate == 0:
            yield Advanced("validating", 10, 25)
            yield Validated(validation_metrics(step, total), best=True)
            yield Sampled(step, "List the tables", "SELECT name FROM tables\nWHERE kind = 'user'")
            yield Noted("checkpoint", f"saved adapters/{step:07d}_adapters.safetensors")
        if step == total // 2:
            yield Noted("worker_lost", "worker ended by signal 9; goes on from step 50", "warning", {"step": step})
    yield Tested(1.5, 20_000)
    if finish:
        yield RunFinished(
            "done",
            (("adapter", "adapters/adapters.safetensors"), ("report", "adapters/report.html")),
            (
                (
                    "try it",
                    "coordinator generate --model mlx-community/Mistral-7B-v0.3-4bit --adapter-path adapters -p Hi",
                ),
            ),
        )


def write_run(folder: Path, total: int = 400, evaluate: int = 40) -> None:
    """A run folder as training leaves it behind."""
    folder.mkdir(parents=True, exist_ok=True)
    began = 1_780_000_000.0
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "events.jsonl").open("w") as events:

        def note(seconds: float, kind: str, message: str, level: str = "info", **details: Any) -> None:
            line = {"time": began + seconds, "kind": kind, "message": message, "level": level, **details}
            events.write(json.dumps(line) + "\n")

        note(0, "started", "run 20260712-4f2a: 400 steps on Studio")
        metrics.write(json.dumps(validation_metrics(0, total)) + "\n")
        for step in range(1, total + 1):
            metrics.write(json.dumps(step_metrics(step, total)) + "\n")
            if step % evaluate == 0:
                metrics.write(json.dumps(validation_metrics(step, total)) + "\n")
                text = f"SELECT count(*) FROM players\nWHERE team = 'step {step}'"
                note(step, "sample", f"sample at step {step}", step=step, prompt="How many players?", text=text)
                note(step + 0.1, "checkpoint", f"saved {step:07d}_adapters.safetensors", step=step)
            if step == total * 5 // 8:
                message = f"worker ended by signal 9; goes on from step {step}, 1.2 s lost"
                note(step, "worker_lost", message, "warning", step=step)
        note(total, "finished", "done")
    (folder / "config.yaml").write_text(
        "model: mlx-community/Mistral-7B-v0.3-4bit\ndata: data/wikisql\nadapter_path: adapters\nfine_tune_type: lora\n"
        f"iters: {total}\nbatch_size: 4\nlearning_rate: 1.0e-05\noptimizer: adam\n"
        "lora_parameters:\n  rank: 8\n  scale: 2.0\n"
        "  dropout: 0.0\n  keys: null\nlr_schedule: null\nseed: 0\n"
    )


def failing_run(why: str) -> list[RunEvent]:
    """The end of a run that fails, as ``job`` tells it."""
    summary = ((FAILED, why), ("saved", "checkpoint of step 40 in adapters"))
    return [
        Noted("worker_lost", "Air is silent", "warning"),
        Noted(FAILED, why, "error"),
        RunFinished("failed", summary, (("go on", "coordinator train --resume --adapter-path adapters"),)),
    ]
