"""A run as the simulator knows it: its settled steps, links and sizes, from the files that it left."""

from __future__ import annotations

import math
from pathlib import Path

from coordinator.config import TrainConfig
from coordinator.config_file import read_yaml
from coordinator.ring_order import Link
from coordinator.runfolder import RunFolder, read_json_lines
from coordinator.running.retell import links_of
from coordinator.simulation.calibration import ALONE, measured_steps
from coordinator.simulation.past import PastRun
from node.errors import UserError
from node.tensors import read_tensors


def past_run(folder: Path, alone: str = ALONE) -> PastRun:
    """Read what a run has measured.

    Args:
        folder: of the run.
        alone: name of the machine of steps that name none.

    Raises:
        UserError: there is no run, or a file of it cannot be used.
    """
    files = RunFolder(folder)
    if not files.metrics.exists():
        raise UserError(f"{folder} has no {files.metrics.name}: no run has trained there")
    options = {**_defaults(), **read_yaml(files.config)}
    if int(options["local_steps"]) > 1:
        raise UserError(
            f"{folder}: with --local-steps {options['local_steps']} its machines trained by themselves for rounds of"
            " steps, of which nothing is predicted; give a run without"
        )
    fleets = [entry for entry in read_json_lines(files.events) if entry.get("kind") == "fleet"]
    links = links_of(fleets[-1].get("links")) if fleets else ()
    return PastRun(
        folder=folder,
        steps=tuple(measured_steps(read_json_lines(files.metrics), alone)),
        links={
            (link.one, link.other): Link(link.bits_per_second, link.latency_seconds, link.text)
            for link in links
            if link.one and link.other
        },
        gradient_bytes=_gradient_bytes(folder),
        batch_size=int(options["batch_size"]),
        accumulation=int(options["grad_accumulation_steps"]),
        max_seq_length=int(options["max_seq_length"]),
        streams=options["reduce"] == "grpc",
    )


def _defaults() -> dict[str, object]:
    config = TrainConfig(model="", data="")
    return {
        name: getattr(config, name)
        for name in ("batch_size", "grad_accumulation_steps", "max_seq_length", "reduce", "local_steps")
    }


def _gradient_bytes(folder: Path) -> int | None:
    """What is trained is what is saved; sums are of four bytes a number."""
    weights = folder / "adapters.safetensors"
    if not weights.is_file():
        return None
    return sum(4 * math.prod(tensor.shape) for tensor in read_tensors(weights).values())
