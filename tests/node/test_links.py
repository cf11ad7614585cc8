from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from node import links, secure
from node.info import Interface, Measured, RdmaDevice
from node.links import Address, interfaces, mac_ports, measure, rdma_devices, serve_measure
from node.relay import KIND_MEASURE, PREAMBLE, Relay, preamble
from node.secure import SecureStream
from node.trust import Trust
from tests.fixtures.relays import Caller, address

# As macOS prints them: a Mac mini with Thunderbolt, Wi-Fi and a USB adapter.
PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 1c:f6:4c:00:00:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:1c:f6:00:00:02

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 1c:f6:4c:00:00:03

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:1c:f6:00:00:04

Hardware Port: Thunderbolt Ethernet Slot 2
Device: en8
Ethernet Address: 36:1c:f6:00:00:05

Hardware Port: USB 10/100/1000 LAN
Device: en7
Ethernet Address: 00:e0:4c:00:00:06

Hardware Port: iPhone USB
Device: en9
Ethernet Address: 00:e0:4c:00:00:07

VLAN Configurations
===================
"""
IBV_DEVINFO = """hca_id:\trdma_en2
\ttransport:\t\t\tThunderbolt (5)
\tphys_port_cnt:\t\t\t1
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_DOWN (1)
hca_id:\trdma_en3
\ttransport:\t\t\tThunderbolt (5)
\tphys_port_cnt:\t\t\t1
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_ACTIVE (4)
"""


def says(command: str, output: str) -> Callable[[Sequence[str]], str | None]:
    return lambda arguments: output if " ".join(arguments) == command else None


def given(*pairs: tuple[str, str]) -> Callable[[], list[Address]]:
    return lambda: [Address(name, address) for name, address in pairs]


def test_a_mac_names_its_ports_and_the_fastest_comes_first() -> None:
    found = interfaces(
        "Darwin",
        says("networksetup -listallhardwareports", PORTS),
        addresses=given(
            ("lo0", "127.0.0.1"),
            ("en1", "192.168.1.6"),
            ("en0", "192.168.1.5"),
            ("en7", "10.0.0.9"),
            ("en7", "169.254.7.7"),
            ("en8", "10.0.0.10"),
            ("en9", "172.20.10.2"),
            ("bridge0", "169.254.33.1"),
            ("bridge100", "192.168.64.1"),
            ("utun4", "100.64.0.1"),
        ),
    )
    assert [(item.kind, item.name, item.address) for item in found] == [
        ("thunderbolt", "bridge0", "169.254.33.1"),
        ("ethernet", "en0", "192.168.1.5"),
        ("ethernet", "en7", "10.0.0.9"),
        ("ethernet", "en8", "10.0.0.10"),
        ("wifi", "en1", "192.168.1.6"),
        ("other", "en9", "172.20.10.2"),
        ("loopback", "lo0", "127.0.0.1"),
    ]


def test_a_mac_that_does_not_name_its_ports_has_addresses_all_the_same() -> None:
    found = interfaces("Darwin", lambda _: None, addresses=given(("en0", "10.0.0.1"), ("lo0", "127.0.0.1")))
    assert found == (Interface("en0", "other", "10.0.0.1"), Interface("lo0", "loopback", "127.0.0.1"))


def test_ports_are_read_by_device() -> None:
    ports = mac_ports(PORTS)
    assert (ports["en0"], ports["bridge0"], len(ports)) == ("Ethernet", "Thunderbolt Bridge", 7)
    assert mac_ports("") == {}


def test_linux_is_read_from_its_files(tmp_path: Path) -> None:
    def device(name: str, *entries: str, number: str = "1") -> None:
        for entry in entries:
            (tmp_path / name / entry).mkdir(parents=True)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "type").write_text(f"{number}\n")

    device("eth0", "device")
    device("wlp3s0", "device", "wireless")
    device("br0", "bridge", "brif/eth0")
    device("lxdbr0", "bridge", "brif/vethabc")
    device("ppp0", number="512")
    device("thunderbolt0")
    device("lo", number="772")
    names = ("lo", "ppp0", "wlp3s0", "eth0", "br0", "lxdbr0", "docker0", "thunderbolt0", "gone0")
    pairs = [(name, "127.0.0.1" if name == "lo" else f"10.0.0.{n}") for n, name in enumerate(names)]
    found = interfaces("Linux", addresses=given(*pairs), net=tmp_path)
    assert [(item.name, item.kind) for item in found] == [
        ("thunderbolt0", "thunderbolt"),
        ("br0", "ethernet"),
        ("eth0", "ethernet"),
        ("wlp3s0", "wifi"),
        ("gone0", "other"),
        ("ppp0", "other"),
        ("lo", "loopback"),
    ]


def test_this_machine_has_a_loopback_address() -> None:
    assert next(item.address for item in interfaces() if item.kind == "loopback") == "127.0.0.1"


def test_rdma_devices_are_those_with_a_cable() -> None:
    assert rdma_devices("Darwin", says("ibv_devinfo", IBV_DEVINFO)) == (RdmaDevice("rdma_en3", "en3"),)
    assert rdma_devices("Darwin", lambda _: None) == ()
    assert rdma_devices("Linux", says("ibv_devinfo", IBV_DEVINFO)) == ()


@pytest.fixture
def trust(tandem_home: Path) -> Trust:
    return Trust(tandem_home)


def measured(address: str, seconds: float, trust: Trust) -> Measured:
    """How fast a node of the same home is reached."""
    return measure(address, seconds, trust, trust.credentials.certificate)


@contextmanager
def relay(trust: Trust) -> Iterator[Relay]:
    """A relay that measures."""
    running = Relay("127.0.0.1", measured=serve_measure, trust=trust)
    running.start()
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def listener(serve: Callable[[SecureStream], None], trust: Trust) -> Iterator[str]:
    """A server that takes one connection, with small buffers; its address."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        server.bind(("127.0.0.1", 0))
        server.listen()

        def take() -> None:
            connection, _ = server.accept()
            with connection:
                serve(SecureStream(connection, trust.context(server=True), server=True, deadline=time.monotonic() + 20))

        thread = threading.Thread(target=take)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(30)
        assert not thread.is_alive()


def test_a_relay_is_measured(trust: Trust) -> None:
    with relay(trust) as running:
        place = address(running)
        found = measured(place, 0.1, trust)
    assert found.error == ""
    assert found.address == place
    assert found.bits_per_second > 1e6
    assert 0 < found.latency_seconds < 1
    assert found.interface == next(item.name for item in interfaces() if item.address == "127.0.0.1")


def test_a_slow_link_is_measured_in_the_same_time_as_a_fast_one(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(secure, "BUFFER_BYTES", 1024)
    pause = threading.Event()

    def slowly(stream: SecureStream) -> None:
        read = stream.receive

        def receive() -> memoryview:
            # At some 100 kB/s: far below what the socket's buffers hold.
            pause.wait(0.01)
            return read()

        stream.recv(PREAMBLE.size)
        stream.receive = receive  # type: ignore[method-assign]
        serve_measure(stream)

    with listener(slowly, trust) as place:
        found = measured(place, 0.2, trust)
    assert found.error == ""
    assert 1e4 < found.bits_per_second < 1e6


def test_another_machine_is_not_measured_for_the_one_that_is_meant(tmp_path: Path, trust: Trust) -> None:
    other, third = Trust(tmp_path / "other"), Trust(tmp_path / "third")
    for one, peer in ((trust, other), (other, trust), (trust, third)):
        one.peers.add("paired", peer.credentials.certificate)
    with relay(other) as running:
        assert measure(address(running), 0.1, trust, other.credentials.certificate).bits_per_second > 0
        found = measure(address(running), 0.1, trust, third.credentials.certificate)
        assert (found.bits_per_second, found.error) == (
            0.0,
            "the machine there does not show the certificate of the one that is meant",
        )
        assert measure(address(running), 0.1, trust, b"nonsense").error == "what was sent is no certificate"
        # It is no peer of the other's: it is let in by nobody.
        assert measure(address(running), 0.1, third, other.credentials.certificate).bits_per_second == 0


def test_nobody_there_is_said_in_words(trust: Trust) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = measured(f"127.0.0.1:{free.getsockname()[1]}", 0.1, trust)
    assert (found.bits_per_second, found.error) == (0.0, "nothing listens there")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port", "127.0.0.1:99999"])
def test_addresses_that_are_none_are_not_reached(address: str, trust: Trust) -> None:
    found = measured(address, 0.1, trust)
    assert found.bits_per_second == 0
    assert found.error


def test_another_program_is_not_taken_for_a_relay(trust: Trust) -> None:
    def foreign(stream: SecureStream) -> None:
        stream.recv(1024)
        stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listener(foreign, trust) as place:
        assert measured(place, 0.1, trust).error == "the answer is not a relay's"


def test_a_program_without_tls_is_not_reached(trust: Trust) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        found = measured(f"127.0.0.1:{server.getsockname()[1]}", 0.1, trust)
        thread.join()
    assert found.bits_per_second == 0
    assert found.error


def test_one_that_closes_is_not_reached(trust: Trust) -> None:
    with listener(lambda stream: None, trust) as place:
        assert measured(place, 0.1, trust).error


def test_only_a_few_are_measured_at_once(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_places", threading.BoundedSemaphore(1))
    with relay(trust) as running:
        with Caller(running, trust, preamble(KIND_MEASURE) + struct.pack("!BI", 1, 7)) as first:
            assert first.recv(5) == struct.pack("!BI", 1, 7)
            assert measured(address(running), 0.1, trust).error
        assert links.MOST_AT_ONCE > 1


@pytest.mark.parametrize("frame", [struct.pack("!BI", 9, 0), struct.pack("!BI", 1, 0) * (links.MOST_PINGS + 1)])
def test_a_relay_has_no_patience_with_nonsense(frame: bytes, trust: Trust) -> None:
    with relay(trust) as running, Caller(running, trust, preamble(KIND_MEASURE) + frame) as caller:
        while caller.recv(1024):
            pass


def test_a_measurement_ends_at_its_most_bytes(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MOST_BYTES", 1 << 20)
    with relay(trust) as running:
        assert measured(address(running), 2.0, trust).bits_per_second > 0


def test_who_dawdles_loses_the_place(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SERVED_SECONDS", 0.5)
    ping, pause, answers = struct.pack("!BI", 1, 7), threading.Event(), 0
    with relay(trust) as running, Caller(running, trust, preamble(KIND_MEASURE)) as caller:
        with contextlib.suppress(OSError):
            caller.stream.send(ping)
            while caller.recv(len(ping)) == ping:
                answers += 1
                pause.wait(0.1)
                caller.stream.send(ping)
    assert 0 < answers < links.MOST_PINGS // 2


def test_who_sends_a_record_byte_by_byte_loses_the_place(trust: Trust, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SERVED_SECONDS", 0.5)
    with relay(trust) as running, Caller(running, trust, preamble(KIND_MEASURE)) as caller:
        caller.socket.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            for byte in b"\x17\x03\x03\x40\x00" + bytes(25):
                caller.socket.sendall(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    while caller.socket.recv(1 << 14):
                        pass  # TLS's own
                    return
            pytest.fail("each byte gave it more time")
