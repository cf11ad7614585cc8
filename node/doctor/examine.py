"""Look at this machine, try its network, and judge both. Takes some seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib import metadata
from ipaddress import IPv4Network
from pathlib import Path

from node import links
from node.doctor import lan, readings
from node.doctor.checks import check_machine
from node.doctor.facts import Device, MachineFacts, Serving, device, disk, needed_versions, peer_names
from node.doctor.finding import Diagnosis, Finding, Reached, Wanted
from node.errors import one_line
from node.hardware import facts
from node.info import DEFAULT_PORT, PROTOCOL, NodeInfo
from node.names import usable_name

ROUTER_PORT = 53
"""Of a router, which answers or refuses there; either has come over the network."""


async def examine(home: Path, info: NodeInfo, serving: Serving, wanted: Wanted) -> Diagnosis:
    """All findings on the machine of this program.

    Args:
        home: its ``TANDEM_HOME``.
        info: of the node.
        serving: how it is served.
        wanted: what is to be tried on the network.
    """
    received = time.time()
    names = dict.fromkeys(item.name for item in info.interfaces)
    read, heard, found, needs, room, peers = await asyncio.gather(
        asyncio.to_thread(readings.look, tuple(names)),
        lan.listen(info.id, wanted.expect),
        _device(),
        asyncio.to_thread(needed_versions),
        asyncio.to_thread(disk, home, info.store_bytes),
        asyncio.to_thread(peer_names, home),
    )
    reached = await _reach(wanted.reach, heard.addresses, read.gateway)
    seen = MachineFacts(info, read, found, room, serving, heard, reached, peers, needs, _networks(info))
    findings = check_machine(seen)
    # Who only hears of the addresses that it gave: what else is on this network is not for it.
    asked = tuple(item for item in reached if item.address in wanted.reach)
    return Diagnosis(info, findings, asked, heard.ids, not heard.off, received, time.time())


async def serving_now(port: int, relay_port: int, host: str, *, advertised: bool, remark: str = "") -> Serving:
    """How a node of this process is served, tried at its own address.

    Args:
        port: of its service; 0 for a machine where none serves.
        relay_port: likewise.
        host: where programs of this machine reach it.
        advertised: whether others can find it.
        remark: why it does not serve on the usual port, or "".
    """
    taken = ""
    if not port or remark:
        taken = await asyncio.to_thread(readings.listener, DEFAULT_PORT)
    if not port:
        return Serving(usual_port_taken_by=taken)
    (answer,) = await lan.reach([f"{host}:{port}"])
    return Serving(port, relay_port, advertised, remark, taken, answer.outcome == "answers")


def this_machine() -> NodeInfo:
    """The machine of a program that serves no node, which has no id therefore."""
    found = facts()
    return NodeInfo(
        id="",
        home="",
        name=usable_name(found.name),
        protocol=PROTOCOL,
        version=metadata.version("mlx-tandem"),
        facts=found,
        interfaces=links.interfaces(),
        rdma=links.rdma_devices(),
    )


def _networks(info: NodeInfo) -> tuple[str, ...]:
    """By which others come to this node."""
    outside = {item.address for item in info.interfaces if item.kind != "loopback"}
    found = [
        IPv4Network((at.address, at.prefix), strict=False) for at in links.system_addresses() if at.address in outside
    ]
    return tuple(dict.fromkeys(map(str, found)))


async def _reach(given: Sequence[str], heard: Sequence[str], gateway: str) -> tuple[Reached, ...]:
    """Connect to what was given; where nothing was, to whoever was heard, and to the router."""
    router = [f"{gateway}:{ROUTER_PORT}"] if gateway else []
    return await lan.reach(list(dict.fromkeys([*given, *heard, *router])))


async def _device() -> Device:
    try:
        return await device()
    except OSError as error:
        return Device(f"its process cannot be started: {one_line(error)}")


def clock_alone() -> Finding:
    """One machine has nothing to compare its clock with."""
    return Finding("clock", "unknown", "one machine alone cannot tell; `coordinator doctor` compares several")
