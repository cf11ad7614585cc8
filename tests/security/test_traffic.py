"""What crosses the network in a run, read by somebody on the same cable."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file

from node.identity import credentials
from tests.fixtures.hosts import Host, hosts, hosts_available
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair
from tests.fixtures.runs import Run, losses

REASON = hosts_available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CLONE_NEWNET = 0x40000000
ALL_PROTOCOLS = 3
MARKER = b"this was said in clear, and whoever listens has read it"
SECRET_WORDS = "the password of the vault is opensesame and nobody else may know it"
RUN_OF_IDS = 6
"""Token ids in a row: 24 bytes that nothing else has by chance."""
LARGE_STREAM = 100_000
MOST_UNEVEN = 1.4
"""Of a large stream; by chance 1.2 at most."""
WINDOW = 24
"""Bytes of a tensor or key, likewise."""


@contextlib.contextmanager
def listening(host: Host) -> Iterator[list[bytes]]:
    """Every packet that comes to or leaves a host's network card, as whoever taps its cable has it."""
    packets: list[bytes] = []
    opened: list[socket.socket] = []

    def open_there() -> None:
        # A thread of its own: it stays in that namespace.
        handle = os.open(f"/run/netns/{host.namespace}", os.O_RDONLY)
        assert ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET) == 0
        os.close(handle)
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
        tap.bind(("eth0", ALL_PROTOCOLS))
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        opened.append(tap)

    opening = threading.Thread(target=open_there)
    opening.start()
    opening.join()
    (tap,) = opened
    ended = threading.Event()

    def read() -> None:
        tap.settimeout(0.2)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                packets.append(tap.recv(70_000))

    reading = threading.Thread(target=read)
    reading.start()
    try:
        yield packets
    finally:
        ended.set()
        reading.join()
        tap.close()


def say_in_clear(speaker: Host, listener: Host) -> None:
    """Send the marker from one host to another by plain TCP."""
    serve = "import socket; s = socket.create_server(('', 5999)); print('up', flush=True); s.accept()[0].recv(999)"
    say = f"import socket; s = socket.create_connection(({listener.address!r}, 5999)); s.sendall({MARKER!r})"
    import subprocess

    with subprocess.Popen([*listener.prefix, sys.executable, "-c", serve], stdout=subprocess.PIPE) as serving:
        assert serving.stdout is not None
        serving.stdout.readline()
        speaker.run(sys.executable, "-c", say)


def streams_of(packets: list[bytes]) -> dict[tuple[bytes, bytes], bytes]:
    """What each side of each TCP connection sent, by addresses and ports."""
    found: dict[tuple[bytes, bytes], list[bytes]] = {}
    for packet in packets:
        if packet[12:14] != b"\x08\x00" or packet[23] != socket.IPPROTO_TCP:
            continue
        tcp = 14 + 4 * (packet[14] & 15)
        end = 14 + int.from_bytes(packet[16:18], "big")
        payload = packet[tcp + 4 * (packet[tcp + 12] >> 4) : end]
        found.setdefault((packet[26:34], packet[tcp : tcp + 4]), []).append(payload)
    return {ends: b"".join(parts) for ends, parts in found.items()}


def unevenness(data: bytes) -> float:
    """How often the most frequent byte stands there, against what it would be if all were equally frequent."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    return float(counts.max() * 256 / len(data))


def secrets_of(home: Path) -> dict[str, bytes]:
    """A home's private key in every form, and its secret."""
    key = serialization.load_pem_private_key(credentials(home).key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    scalar = key.private_numbers().private_value
    return {
        "private key": scalar.to_bytes(32, "big"),
        "private key in PEM": credentials(home).key.splitlines()[1][:WINDOW],
        "secret": (home / "identity" / "secret").read_bytes()[:WINDOW],
    }


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_nothing_can_be_read_on_the_cable(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = tmp_path / "data"
    data.mkdir()
    row = f'{{"text": "{SECRET_WORDS}"}}\n'
    (data / "train.jsonl").write_text(row * 12)
    homes = [tmp_path / "home1", tmp_path / "home2"]
    pair(*homes)
    folder = tmp_path / "adapters"
    with hosts(2) as (first, second), contextlib.ExitStack() as stack:
        packets = stack.enter_context(listening(first))
        say_in_clear(first, second)
        addresses = []
        for host, home, name in zip((first, second), homes, ("anna", "ben"), strict=True):
            environment = {"TANDEM_BONJOUR": "off"}
            node = stack.enter_context(ServingNode(name, home, environment=environment, prefix=host.prefix, friends=[]))
            addresses.append(f"{host.address}:{node.port}")
        environment = {"TANDEM_HOME": str(homes[0]), "TANDEM_BONJOUR": "off"}
        run = Run(
            "train", "--model", model, "--data", data, "--adapter-path", folder, "--iters", "40", "--batch-size", "4",
            "--num-layers", "-1", "--force-all", "--val-batches", "0", "--nodes", ",".join(addresses),
            environment=environment, prefix=first.prefix,
        )  # fmt: skip
        code, errors = run.wait()
        assert code == 0, errors
    assert len(losses(folder)) == 40
    seen = b"\0".join(packets)
    assert MARKER in seen, "whoever listens does hear"
    weights = load_file(model / "model.safetensors")
    size = sum(tensor.nbytes for tensor in weights.values())
    assert len(seen) > size, "the model itself crossed the cable"

    wanted: dict[str, bytes] = {
        "words of a row": SECRET_WORDS[:WINDOW].encode(),
        "another part": b"vault is opensesame",
    }
    for number, home in enumerate(homes):
        wanted |= {f"{what} of home {number}": value for what, value in secrets_of(home).items()}
    for name, tensor in weights.items():
        wanted[f"tensor {name}"] = tensor.tobytes()[:WINDOW]
    for name, tensor in load_file(folder / "adapters.safetensors").items():
        wanted[f"adapter {name}"] = tensor.tobytes()[:WINDOW]
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(SECRET_WORDS)["input_ids"]
    assert len(ids) > RUN_OF_IDS
    for at in range(len(ids) - RUN_OF_IDS):
        wanted[f"token ids from {at}"] = np.array(ids[at : at + RUN_OF_IDS], "<i4").tobytes()
    found = [what for what, value in wanted.items() if set(value) != {0} and value in seen]
    assert found == []
    # What nobody can list beforehand, gradients above all: numbers in clear have bytes that are far from even.
    streams = {ends: data for ends, data in streams_of(packets).items() if len(data) > LARGE_STREAM}
    assert len(streams) >= 3, "both directions of the ring, and the model"
    assert {ends: unevenness(data) for ends, data in streams.items() if unevenness(data) > MOST_UNEVEN} == {}
    assert unevenness(next(iter(weights.values())).tobytes()) > MOST_UNEVEN
