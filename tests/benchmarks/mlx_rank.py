"""One rank of ``mlx_lm lora`` as it is: pinned to the core of its rank, and each iteration's figures as a JSON line.

Started by ``mlx.launch``; the arguments are those of ``mlx_lm lora``, after a comma-separated list of cores.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from typing import Any


def main(cores: list[int], arguments: list[str]) -> None:
    rank = int(os.environ.get("MLX_RANK", "0"))
    if cores:
        # Before anything starts a thread.
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    from mlx_lm import lora
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Printed(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            if rank == 0:
                keys = ("iteration", "train_loss", "trained_tokens", "peak_memory")
                # By the wall, as every program sees it; past the progress bar, which has taken sys.stdout.
                line = {"at": time.monotonic()} | {key: train_info[key] for key in keys}
                os.write(1, f"\n{json.dumps(line)}\n".encode())

    # `run` has a parameter for it and does not use it.
    lora.get_reporting_callbacks = lambda *_, **__: Printed()
    given = vars(lora.build_parser().parse_args(arguments))
    options = lora.CONFIG_DEFAULTS | {name: value for name, value in given.items() if value is not None}
    lora.run(types.SimpleNamespace(**options))


if __name__ == "__main__":
    main([int(core) for core in sys.argv[1].split(",") if core], sys.argv[2:])
