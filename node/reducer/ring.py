"""Form a group of ``mlx.distributed`` as a generation's plan has it, prove who is in it, add numbers up.

The ring back end has no handshake: whoever connects first is the left neighbour. So the first sum is of known numbers
(see ``proof``), and only with all of them right the group is used.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from node.reducer.proof import proof, refutation

NOBODY = "127.0.0.1:9"
"""Stands for ranks that are no neighbours: the ring never looks at them."""


class NotFormed(Exception):
    """The group could not be formed; the message says why, on one line."""


def environment(spec: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Environment variables that ``mlx.distributed.init`` reads, with the files that they name written to a folder.

    Args:
        spec: fields of ``node.spec.RingSpec``.
        folder: for the files.
    """
    rank, size = spec["rank"], spec["size"]
    if spec["backend"] == "jaccl":
        names = list(spec["devices"])
        matrix = [[names[row * size + column] or None for column in range(size)] for row in range(size)]
        file = folder / "devices.json"
        file.write_text(json.dumps(matrix))
        return {"MLX_RANK": str(rank), "MLX_IBV_DEVICES": str(file), "MLX_JACCL_COORDINATOR": spec["leader"]}
    hosts = [[NOBODY] * len(spec["listen"]) for _ in range(size)]
    hosts[rank] = list(spec["listen"])
    hosts[(rank + 1) % size] = list(spec["connect"])
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)}


def form(spec: Mapping[str, Any], layout: int) -> Any:
    """The group, proven.

    The process dies of a timer when the group has not formed in time: while MLX waits for the others no thread of
    Python runs, so nothing else could end it.

    Args:
        spec: fields of ``node.spec.RingSpec``.
        layout: a number below 2**24 that stands for the names, shapes and types of what will be added up.

    Raises:
        NotFormed: it could not be, somebody else is in it, or the ranks do not train the same arrays.
    """
    rank, size, token = spec["rank"], spec["size"], spec["token"]
    signal.setitimer(signal.ITIMER_REAL, spec["form_seconds"])
    with tempfile.TemporaryDirectory(prefix="tandem-ring-") as folder:
        os.environ.update(environment(spec, Path(folder)))
        try:
            group = mx.distributed.init(strict=True, backend=spec["backend"])
        except RuntimeError as error:
            raise NotFormed(" ".join(str(error).split())) from error
    if group.size() != size or group.rank() != rank:
        raise NotFormed(f"rank {group.rank()} of {group.size()} instead of {rank} of {size}")
    mine = mx.array(proof(rank, size, token, layout))
    try:
        total: Any = mx.distributed.all_sum(mine, group=group, stream=mx.cpu)
        mx.eval(total)
    except RuntimeError as error:
        raise NotFormed(" ".join(str(error).split())) from error
    if why := refutation(total.tolist(), size, token, layout):
        raise NotFormed(why)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return group


def add_up(group: Any, buffer: Any) -> None:
    """Replace the fp32 numbers in a buffer (a memoryview of floats) by their sums over all ranks.

    Raises:
        RuntimeError: a neighbour is gone.
    """
    total: Any = mx.distributed.all_sum(mx.array(buffer), group=group, stream=mx.cpu)
    mx.eval(total)
    buffer[:] = memoryview(total)
