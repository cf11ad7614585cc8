"""What a node says about itself, to coordinators and to people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from node.hardware import Facts

PROTOCOL = 2
"""Of node.proto. Raised when an older program could misunderstand a newer one."""
DEFAULT_PORT = 21617
"""Of ``node serve``: assigned to nobody, and below the ports that systems hand out, so that an address stays right."""
PAIRING_PORT = DEFAULT_PORT + 1
"""Of the same, while it can be paired."""
InterfaceKind = Literal["thunderbolt", "ethernet", "wifi", "loopback", "other"]
# From unknown over good to bad.
MemoryLevel = Literal["unknown", "normal", "warn", "critical"]
ThermalLevel = Literal["unknown", "nominal", "fair", "serious", "critical"]
Battery = Literal["", "no", "yes"]
Backend = Literal["ring", "jaccl", "grpc"]
"""How a group's numbers are added up: by ``mlx.distributed`` over TCP or RDMA, or through the coordinator."""
GradientDtype = Literal["fp32", "bf16"]
"""As what gradients cross the wire; see ``node.bf16``."""


@dataclass(frozen=True)
class Interface:
    """One IPv4 address of a machine.

    Attributes:
        name: of the interface: ``en0``, ``bridge0``.
        kind: what it is made of.
        address: IPv4 address.
    """

    name: str
    kind: InterfaceKind
    address: str


@dataclass(frozen=True)
class RdmaDevice:
    """An RDMA device (Thunderbolt 5): its name and the network interface of the same port."""

    name: str
    interface: str


@dataclass(frozen=True)
class Busy:
    """Who has a node.

    Attributes:
        run: id of the run.
        owner: whose it is, for people: ``anna on Studio``.
        since: seconds since 1970.
    """

    run: str
    owner: str
    since: float


@dataclass(frozen=True)
class NodeInfo:
    """A node as it is now.

    Attributes:
        id: stable across restarts.
        home: the same for all programs of one ``TANDEM_HOME``.
        name: what people call it.
        protocol: of the messages; another one cannot be talked to.
        version: of mlx-tandem.
        facts: chip, memory, system, versions; None is unknown.
        interfaces: where it can be reached, fastest kind first.
        relay_port: TCP port of its relay; 0 none.
        busy: who has it; None when it is free.
        paused: its owner has said ``node pause``.
        waits_for: why it takes no job just now although it is not paused, or "".
        max_memory_bytes: its owner's limit, or 0.
        load: runnable processes per core over the last minute; negative when unknown.
        store_bytes: size of its model store.
        takes_jobs: False for a program that only gives files.
        rdma: its RDMA devices.
        on_battery: whether it runs on battery power; "" unknown.
        memory_pressure, thermal_pressure: the worst of the last half minute.
        since: when it began to serve, by its own clock: whole seconds since 1970; 0 unknown.
    """

    id: str
    home: str
    name: str
    protocol: int
    version: str
    facts: Facts
    interfaces: tuple[Interface, ...] = ()
    relay_port: int = 0
    busy: Busy | None = None
    paused: bool = False
    waits_for: str = ""
    max_memory_bytes: int = 0
    load: float = -1.0
    store_bytes: int = 0
    takes_jobs: bool = True
    rdma: tuple[RdmaDevice, ...] = ()
    on_battery: Battery = ""
    memory_pressure: MemoryLevel = "unknown"
    thermal_pressure: ThermalLevel = "unknown"
    since: int = 0


@dataclass(frozen=True)
class Measured:
    """How fast one node reaches an address of another.

    Attributes:
        address: ``ip:port`` of the other's relay.
        bits_per_second: 0 when it was not reached.
        latency_seconds: of a small message there and back.
        interface: that the packets left by, "" when unknown.
        error: why it was not reached, or "".
    """

    address: str
    bits_per_second: float
    latency_seconds: float
    interface: str = ""
    error: str = ""


@dataclass(frozen=True)
class RingPart:
    """One node's part of a generation's group, as the coordinator plans it.

    Attributes:
        rank, size: of the node, and of the group.
        backend: how it adds up.
        route, next_route: 16 random bytes that name this rank's end, and the next rank's, at their relays; empty where
            none are used.
        next: ``ip:port`` of the next rank's relay, one for each connection; the number is the same on all ranks.
        token, form_seconds, wait_seconds, devices, leader: as in ``spec.RingSpec``.
        next_certificate, previous_certificate: by which the machines of the next and the previous rank are known, in
            PEM; empty where there is no ring.
        next_in_clear, previous_in_clear: whether what is sent between it and us is not encrypted.
        gradient_dtype: as in ``spec.RingSpec``.
    """

    rank: int
    size: int
    backend: Backend
    route: bytes
    next_route: bytes
    next: tuple[str, ...]
    token: int
    form_seconds: float
    wait_seconds: float
    devices: tuple[str, ...] = ()
    leader: str = ""
    next_certificate: bytes = b""
    previous_certificate: bytes = b""
    next_in_clear: bool = False
    previous_in_clear: bool = False
    gradient_dtype: GradientDtype = "fp32"


@dataclass(frozen=True)
class StoredFile:
    """A file by what is in it.

    Attributes:
        name: bare name.
        sha256: hex digest.
        size: bytes.
        folder: in a job ``""``, ``fused`` or ``peft``; in a store "".
    """

    name: str
    sha256: str
    size: int
    folder: str = ""


@dataclass(frozen=True)
class Manifest:
    """The files of a model.

    Attributes:
        name: what people call it.
        revision: commit on the Hub, or "".
        files: all of them, sorted by name.
    """

    name: str
    revision: str
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)
