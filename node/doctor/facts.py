"""All that the verdicts on one machine rest on."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from node.doctor.finding import Reached
from node.doctor.lan import Heard
from node.doctor.readings import Readings
from node.info import NodeInfo
from node.peers import Peers

DEVICE_SECONDS = 30.0
"""For MLX to be loaded by a process of its own, on a busy machine."""


@dataclass(frozen=True)
class Device:
    """What MLX computes on.

    Attributes:
        trouble: why it does not, or "".
        metal: whether it is a GPU under Metal.
        working_set_bytes: of memory that macOS lets the GPU use at once; 0 unknown.
    """

    trouble: str = ""
    metal: bool = False
    working_set_bytes: int = 0


@dataclass(frozen=True)
class Disk:
    """Where the program keeps its data.

    Attributes:
        folder: the ``TANDEM_HOME``.
        free_bytes, total_bytes: of its disk; None unknown.
        store_bytes: of kept models.
        trouble: why nothing can be written there, or "".
    """

    folder: str
    free_bytes: int | None
    total_bytes: int | None
    store_bytes: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class Serving:
    """How this node is served.

    Attributes:
        port: of its service; 0 when no node serves here.
        relay_port: likewise.
        advertised: whether others can find it.
        remark: why it serves on another port than usual, or "".
        usual_port_taken_by: who has it, "" nobody or not seen.
        connected: whether a connection to ``port`` was made; None not tried.
    """

    port: int = 0
    relay_port: int = 0
    advertised: bool = False
    remark: str = ""
    usual_port_taken_by: str = ""
    connected: bool | None = None


@dataclass(frozen=True)
class MachineFacts:
    """One machine.

    Attributes:
        info: the node.
        readings: of the system.
        device: of MLX.
        disk: of the ``TANDEM_HOME``.
        serving: of the node.
        heard: by Bonjour.
        reached: of others on the network, and the router.
        peers: names of the machines that it is paired with; None unknown.
        needs: versions that this program asks for, by package; ``python`` among them.
        networks: that it is on, loopback aside: ``192.168.1.0/24``.
    """

    info: NodeInfo
    readings: Readings
    device: Device
    disk: Disk
    serving: Serving = Serving()
    heard: Heard = field(default_factory=Heard)
    reached: tuple[Reached, ...] = ()
    peers: tuple[str, ...] | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    networks: tuple[str, ...] = ()


def needed_versions(distribution: str = "mlx-tandem") -> dict[str, str]:
    """What this program asks of Python, mlx and mlx-lm here, as in its own package: ``{"mlx-lm": "==0.32.2"}``."""
    from packaging.requirements import Requirement

    found = {"python": metadata.metadata(distribution)["Requires-Python"] or ""}
    for text in metadata.requires(distribution) or ():
        wanted = Requirement(text)
        if wanted.name in ("mlx", "mlx-lm") and (wanted.marker is None or wanted.marker.evaluate()):
            found[wanted.name] = str(wanted.specifier)
    return found


def disk(home: Path, store_bytes: int) -> Disk:
    """The disk of a ``TANDEM_HOME``, or of the nearest folder above one that is not there yet."""
    folder = next((part for part in (home, *home.parents) if part.exists()), home)
    try:
        usage = shutil.disk_usage(folder)
        free, total = usage.free, usage.total
    except OSError as error:
        return Disk(str(home), None, None, store_bytes, error.strerror or "it cannot be looked at")
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"\0" * 4096)
    except OSError as error:
        return Disk(str(home), free, total, store_bytes, error.strerror or "it cannot be written to")
    return Disk(str(home), free, total, store_bytes)


def peer_names(home: Path) -> tuple[str, ...] | None:
    """Of all machines that this home is paired with; None where that cannot be read."""
    peers = Peers(home)
    names = tuple(peer.name for peer in peers.all())
    return None if peers.trouble else names


async def device() -> Device:
    """What MLX computes on, as a process of its own finds it: a broken MLX may end the one that loads it."""
    from node.supervisor import worker_environment

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "node.worker.device"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=worker_environment(),
    )
    try:
        async with asyncio.timeout(DEVICE_SECONDS):
            out, errors = await process.communicate()
    except TimeoutError:
        return Device(f"it was not loaded within {DEVICE_SECONDS:.0f} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        said = json.loads(out)
        if said["works"]:
            return Device("", bool(said["metal"]), int(said["working_set_bytes"]))
    except (ValueError, KeyError, TypeError):
        lines = errors.decode(errors="replace").strip().splitlines()
        return Device(" ".join(lines[-1].split()) if lines else f"it ended with status {process.returncode}")
    return Device("it computes wrong numbers")
