"""What macOS and Linux print is read; what they do not is unknown."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from node.doctor import readings
from node.doctor.readings import Bridge, Firewall, Readings, Sleep, Thunderbolt, look
from node.hardware import read_text
from tests.node.doctor import samples
from tests.node.doctor.samples import MAC, says


def mac(**changed: str) -> Readings:
    outputs = dict(MAC) | {key.replace("_", " "): value for key, value in changed.items()}
    return look(["en0", "en1"], "Darwin", says(outputs), lambda _: None, "/usr/bin/python3")


def firewall(state: str, block_all: str = "", app: str = "") -> Firewall:
    outputs = {
        f"{readings.FIREWALL} --getglobalstate": state,
        f"{readings.FIREWALL} --getblockall": block_all,
        f"{readings.FIREWALL} --getappblocked /p": app,
    }
    return readings.mac_firewall(says(outputs), "/p")


def test_a_mac_tells_all_of_this() -> None:
    found = mac()
    assert found == Readings(
        "Darwin",
        version="26.2",
        architecture=found.architecture,
        translated=False,
        wired_limit_mb=0,
        firewall=Firewall(True, False, None),
        sleep=Sleep(15, False),
        on_battery=False,
        thunderbolt=Thunderbolt(3, "Up to 120 Gb/s", ("Air",), ("Envoy Ultra",)),
        bridge=Bridge(True, False, ("en2", "en3")),
        rdma_switch="enabled",
        rdma={"rdma_en2": "PORT_DOWN", "rdma_en3": "PORT_ACTIVE"},
        gateway="192.168.1.1",
        speeds={"en0": "10Gbase-T"},
    )
    assert found.thunderbolt is not None
    assert found.thunderbolt.gigabits == 120


def test_a_mac_that_says_nothing_leaves_everything_unknown() -> None:
    found = look(["en0"], "Darwin", lambda _: None, lambda _: None, "/p")
    assert found == Readings("Darwin", architecture=found.architecture)


@pytest.mark.parametrize(
    ("state", "block_all", "app", "expected"),
    [
        (samples.FIREWALL_OFF, samples.BLOCK_ALL_OFF, samples.APP_PERMITTED, Firewall(False, False, None)),
        (samples.FIREWALL_ON, samples.BLOCK_ALL_ON, samples.APP_PERMITTED, Firewall(True, True, None)),
        (samples.FIREWALL_ALL, "", "", Firewall(True, True, None)),
        (samples.FIREWALL_ON, samples.BLOCK_ALL_OFF, samples.APP_BLOCKED, Firewall(True, False, True)),
        ("", "", "", Firewall(None, None, None)),
        ("the firewall says something new", "so does this", "and this", Firewall(None, None, None)),
    ],
)
def test_the_firewall_never_calls_us_permitted(state: str, block_all: str, app: str, expected: Firewall) -> None:
    assert firewall(state, block_all, app) == expected


def test_what_keeps_a_mac_awake_for_the_moment_does_not_count() -> None:
    assert readings.mac_sleep(samples.PMSET) == Sleep(15, False)
    assert readings.mac_sleep(samples.PMSET_DISABLED) == Sleep(0, False)
    assert readings.mac_sleep(" Sleep On Power Button 1\n") == Sleep(None, None)
    assert readings.mac_sleep(" sleep 0\n lowpowermode 1\n") == Sleep(0, True)


def test_a_drive_at_a_thunderbolt_port_is_no_mac() -> None:
    found = readings.mac_thunderbolt(samples.thunderbolt("Up to 40 Gb/s", device="Envoy Ultra"))
    assert found == Thunderbolt(3, "Up to 40 Gb/s", (), ("Envoy Ultra",))
    assert readings.mac_thunderbolt('{"SPThunderboltDataType": []}') == Thunderbolt(0, "", (), ())
    for broken in ("", "{", "[]", "{}", '{"SPThunderboltDataType": [1]}', '{"SPThunderboltDataType": null}'):
        assert readings.mac_thunderbolt(broken) is None, broken


def test_a_bridge_that_is_not_there_is_told_from_one_that_is_not_known() -> None:
    assert readings.mac_bridge("") is None
    assert readings.mac_bridge(samples.IFCONFIG.partition("bridge0")[0]) == Bridge(False)
    active = samples.IFCONFIG.replace("status: inactive", "status: active")
    assert readings.mac_bridge(active) == Bridge(True, True, ("en2", "en3"))


def test_who_listens_is_named_on_a_mac() -> None:
    command = "lsof -nP -iTCP:21617 -sTCP:LISTEN -Fpc"
    assert readings.listener(21617, "Darwin", says({command: samples.LSOF})) == "Python (process 812)"
    assert readings.listener(21617, "Darwin", says({})) == ""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_who_listens_is_named_on_linux() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert readings.listener(port, "Linux").endswith(f"(process {os.getpid()})")
    assert readings.listener(port, "Linux") == ""


def test_linux_tells_its_router_and_speeds(tmp_path: Path) -> None:
    table = "Iface\tDestination\tGateway\tFlags\neth0\t0001A8C0\t00000000\t0001\neth0\t00000000\t0101A8C0\t0003\n"
    assert readings.linux_gateway(table) == "192.168.1.1"
    assert readings.linux_gateway("") == ""
    files = {"/sys/class/net/eth0/speed": "10000", "/sys/class/net/wlan0/speed": "-1", "/proc/net/route": table}
    found = look(["eth0", "wlan0", "none"], "Linux", says({}), files.get)
    assert (found.gateway, dict(found.speeds)) == ("192.168.1.1", {"eth0": "10000 Mbit/s"})
    assert (found.sleep, found.firewall, found.is_mac) == (Sleep(None), Firewall(None, None, None), False)
    masked = says({"systemctl show -p LoadState sleep.target": "LoadState=masked"})
    assert look([], "Linux", masked, files.get).sleep == Sleep(0)


def test_this_machine_can_be_read() -> None:
    found = look(["lo"], read=read_text)
    assert found.architecture
