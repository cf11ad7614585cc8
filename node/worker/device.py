"""What MLX computes on here: ``python -m node.worker.device`` writes one JSON object. A process that MLX can end."""

from __future__ import annotations

import json
import sys

import mlx.core as mx


def main() -> int:
    """Load MLX and compute something, which is what shows that it works."""
    total = mx.sum(mx.arange(8)).item()
    said = {
        "metal": mx.metal.is_available(),
        "works": total == 28,
        "working_set_bytes": int(mx.device_info().get("max_recommended_working_set_size", 0)),
    }
    json.dump(said, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
