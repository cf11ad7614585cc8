"""This machine's ways to others: its addresses, and how fast they reach another node's relay.

A measurement is one connection under TLS to the relay's public port. After the preamble the caller sends frames: some
pings, which come back, then one that says for how long data follows. The other side counts what arrives and answers at
the end of that time, so that a slow link is not waited for until it has carried all that its buffers took.
"""

from __future__ import annotations

import contextlib
import platform
import re
import socket
import ssl
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import ifaddr

from node.errors import UserError, one_line
from node.hardware import Read, Run, read_text, run_text
from node.info import Interface, InterfaceKind, Measured, RdmaDevice
from node.peers import fingerprint, home_of
from node.relay import KIND_MEASURE, preamble
from node.secure import SecureStream
from node.trust import Trust

KIND_ORDER: tuple[InterfaceKind, ...] = ("thunderbolt", "ethernet", "wifi", "other", "loopback")
CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 2.0
MOST_SECONDS = 2.0
SERVED_SECONDS = MOST_SECONDS + 3 * ANSWER_SECONDS
"""For all of a measurement, on the side that serves it: pings, data, answer and end."""
MOST_BYTES = 1 << 30
MOST_PINGS = 32
MOST_AT_ONCE = 4
PINGS = 5
CHUNK_BYTES = 256 << 10
ETHERNET_TYPE = "1"  # ARPHRD_ETHER, in Linux's files
# Of containers, virtual machines, tunnels, and Apple's own peer-to-peer links: no way to another node.
NOISE = re.compile(
    r"(utun|awdl|llw|anpi|ap\d|gif|stf|ipsec|feth|vmenet|vmnet|docker|veth[0-9a-f]{6,}|br-|virbr|cni|flannel|tun|tap)"
)

# The first part of the time is left out: TCP begins slowly, and shaped links let a burst pass.
_WARM_UP = 0.25
_PING, _DATA = 1, 2
_FRAME = struct.Struct("!BI")  # kind; of a ping its number, of data its time in milliseconds
_RESULT = struct.Struct("!Qd")  # bytes counted, seconds that they took
_places = threading.BoundedSemaphore(MOST_AT_ONCE)


@dataclass(frozen=True)
class Address:
    """An IPv4 address as the system tells it: the interface's name, the address, and how many bits are its network."""

    name: str
    address: str
    prefix: int = 32


def system_addresses() -> list[Address]:
    """Every IPv4 address of this machine."""
    return [
        Address(adapter.name.partition(":")[0], str(ip.ip), ip.network_prefix)  # eth0:1 is a second address of eth0
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if ip.is_IPv4
    ]


def interfaces(
    system: str | None = None,
    run: Run = run_text,
    read: Read = read_text,
    addresses: Callable[[], Iterable[Address]] = system_addresses,
    net: Path = Path("/sys/class/net"),
) -> tuple[Interface, ...]:
    """The addresses at which others may reach this machine, fastest kind first, loopback last.

    Bridges of containers and virtual machines are left out: their addresses are the same on many machines. So are
    tunnels, and self-assigned addresses (169.254.…), except on Thunderbolt, where nobody hands out others.

    Args:
        system: ``Darwin`` or ``Linux``; None takes this machine's.
        run: how commands are asked.
        read: how files are asked.
        addresses: how the system's addresses are asked.
        net: where Linux describes its interfaces.
    """
    system = system or platform.system()
    found = list(addresses())
    names = {address.name for address in found}
    if system == "Darwin":
        ports = mac_ports(run(["networksetup", "-listallhardwareports"]) or "")
        kinds = {name: _mac_kind(name, ports) for name in names}
    else:
        kinds = {name: _linux_kind(name, net / name, read) for name in names}
    kept = []
    for address in found:
        kind = "loopback" if address.address.startswith("127.") else kinds[address.name]
        if kind is None or (IPv4Address(address.address).is_link_local and kind != "thunderbolt"):
            continue
        kept.append(Interface(address.name, kind, address.address))
    return tuple(sorted(kept, key=lambda i: (KIND_ORDER.index(i.kind), i.name, IPv4Address(i.address))))


def mac_ports(shown: str) -> dict[str, str]:
    """Device to hardware port, as ``networksetup -listallhardwareports`` prints them."""
    pairs = re.findall(r"^Hardware Port: *(.+?) *\nDevice: *(\S+)", shown, re.MULTILINE)
    return {device: port for port, device in pairs}


def rdma_devices(system: str | None = None, run: Run = run_text) -> tuple[RdmaDevice, ...]:
    """RDMA devices whose cable is plugged in: Thunderbolt 5 from macOS 26.2 on, once ``rdma_ctl enable`` has been run.

    Args:
        system: ``Darwin`` or ``Linux``; None takes this machine's.
        run: how commands are asked.
    """
    if (system or platform.system()) != "Darwin":
        return ()
    parts = re.split(r"^hca_id:", run(["ibv_devinfo"]) or "", flags=re.MULTILINE)[1:]
    names = [part.split()[0] for part in parts if "PORT_ACTIVE" in part]
    return tuple(RdmaDevice(name, name.removeprefix("rdma_")) for name in names if name.startswith("rdma_"))


def measure(address: str, seconds: float, trust: Trust, certificate: bytes) -> Measured:
    """How fast data goes from here to another node's relay. Blocks for about ``seconds`` and the connecting.

    Args:
        address: ``ip:port`` of the relay.
        seconds: of sending; at most ``MOST_SECONDS`` are used.
        trust: shows who we are.
        certificate: of the other node, in PEM; nobody else is measured.

    Returns:
        What was found; with 0 bits per second and the reason when the relay was not reached.
    """
    seconds = min(max(seconds, 0.01), MOST_SECONDS)
    host, _, port = address.rpartition(":")
    try:
        home_of(certificate)
        context = trust.context(server=False, peers=[certificate])
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as connection:
            left_by = _interface_of(connection.getsockname()[0])
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # What a slow link has not carried by the end is dropped, not delivered in the background.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            stream = SecureStream(connection, context, server=False, deadline=time.monotonic() + ANSWER_SECONDS)
            if stream.fingerprint != fingerprint(certificate):
                raise ConnectionError("another machine answers there")
            stream.settimeout(ANSWER_SECONDS)
            stream.send(preamble(KIND_MEASURE))
            latency = statistics.median(_ping(stream, number) for number in range(PINGS))
            counted, took = _send(connection, stream, seconds)
    except (OSError, ValueError, UserError) as error:
        return Measured(address, 0.0, 0.0, error=_reason(error))
    return Measured(address, 8 * counted / took if took > 0 else 0.0, latency, left_by)


def serve_measure(stream: SecureStream) -> None:
    """The other end of ``measure``, after the preamble; at most a few run at once, others are left without a word.

    Args:
        stream: nothing but the preamble has been read. The caller closes it.
    """
    if not _places.acquire(blocking=False):
        return
    try:
        with contextlib.suppress(OSError):  # who asked has gone; there is nobody to tell
            _serve(stream)
    finally:
        _places.release()


def _mac_kind(name: str, ports: dict[str, str]) -> InterfaceKind | None:
    if NOISE.match(name) or re.fullmatch(r"bridge\d{3,}", name):  # from bridge100 on they belong to virtual machines
        return None
    port = ports.get(name, "")
    if re.fullmatch(r"Thunderbolt( Bridge| \d+)?", port):
        return "thunderbolt"
    if port in {"Wi-Fi", "AirPort"}:
        return "wifi"
    if not port or re.search(r"Bluetooth|iPhone|iPad|Modem", port):
        return "other"
    return "ethernet"  # adapters go by the names of their makers and chips


def _linux_kind(name: str, folder: Path, read: Read) -> InterfaceKind | None:
    if NOISE.match(name):
        return None
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        return "wifi"
    if name.startswith("thunderbolt"):
        return "thunderbolt"
    if (folder / "bridge").exists():
        cards = (port for port in (folder / "brif").iterdir() if (folder.parent / port.name / "device").exists())
        return "ethernet" if any(cards) else None
    if (folder / "tun_flags").exists() or read(str(folder / "type")) != ETHERNET_TYPE:
        return "other"
    return "ethernet"


def _interface_of(address: str) -> str:
    """The interface with this address, or ""."""
    return next((found.name for found in system_addresses() if found.address == address), "")


def _ping(stream: SecureStream, number: int) -> float:
    began = time.perf_counter()
    stream.send(_FRAME.pack(_PING, number))
    if _FRAME.unpack(_read(stream, _FRAME.size)) != (_PING, number):
        raise ValueError("the answer is not a relay's")
    return time.perf_counter() - began


def _send(connection: socket.socket, stream: SecureStream, seconds: float) -> tuple[int, float]:
    """Send until the other side answers; the connection serves for nothing else afterwards.

    Returns:
        Bytes that it counted, and the seconds that they took.
    """
    stream.send(_FRAME.pack(_DATA, round(seconds * 1000)))
    stream.settimeout(seconds + ANSWER_SECONDS)
    sending = threading.Thread(target=_flood, args=(stream,), name="measure", daemon=True)
    sending.start()
    try:
        counted, took = _RESULT.unpack(_read(stream, _RESULT.size))
    finally:
        with contextlib.suppress(OSError):  # it has gone, which ends the sending as well
            connection.shutdown(socket.SHUT_RDWR)
        sending.join()
    return int(counted), float(took)


def _flood(stream: SecureStream) -> None:
    chunk, sent = bytes(CHUNK_BYTES), 0
    with contextlib.suppress(OSError):  # ended when the answer is there
        while sent < MOST_BYTES:
            stream.send(chunk)
            sent += len(chunk)


def _serve(stream: SecureStream) -> None:
    stream.settimeout(ANSWER_SECONDS)
    stream.end_by(time.monotonic() + SERVED_SECONDS)  # who only dawdles would keep the place from others
    for _ in range(MOST_PINGS):
        frame = _read(stream, _FRAME.size)
        kind, value = _FRAME.unpack(frame)
        if kind == _DATA:
            answer = _count(stream, min(value / 1000, MOST_SECONDS))
            stream.settimeout(ANSWER_SECONDS)
            stream.send(_RESULT.pack(*answer))
            # Closing with unread data would take the answer back.
            _drain(stream, time.monotonic() + ANSWER_SECONDS)
            return
        if kind != _PING:
            return
        stream.send(frame)


def _count(stream: SecureStream, seconds: float) -> tuple[int, float]:
    """Read for so many seconds, or until the most is read; bytes after the warm-up and the seconds they took."""
    began = time.monotonic()
    warm, ends = began + _WARM_UP * seconds, began + seconds
    total, before, since = 0, 0, began
    now = began
    while (left := ends - now) > 0 and total < MOST_BYTES:
        stream.settimeout(left)
        try:
            got = len(stream.receive())
        except TimeoutError:
            break
        if not got:
            break
        total += got
        now = time.monotonic()
        if since == began and now >= warm:
            before, since = total, now
    now = time.monotonic()
    return (total - before, now - since) if total > before else (total, now - began)


def _drain(stream: SecureStream, until: float) -> None:
    while (left := until - time.monotonic()) > 0:
        stream.settimeout(left)
        if not stream.receive():
            return


def _read(stream: SecureStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            raise ConnectionError("it closed the connection")
        data += part
    return data


def _reason(error: Exception) -> str:
    match error:
        case ConnectionRefusedError():
            return "nothing listens there"
        case TimeoutError():
            return f"no answer within {ANSWER_SECONDS:.0f} s"
        case ssl.SSLError():
            return "the machine there does not show the certificate of the one that is meant"
        case OSError():
            return error.strerror or one_line(error)
        case _:
            return one_line(error)
