"""``node doctor`` as a command, with and without a node that serves."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import click
import grpc.aio
import pytest
from click.testing import CliRunner

from node import client, guard, rpc, service
from node.cli import cli
from node.client import NodeClient
from node.daemon import Daemon
from node.doctor.finding import Finding, Verdict, Wanted, worst
from node.doctor.show import as_lines, closing
from node.errors import NodeRefused
from node.identity import credentials
from node.info import NodeInfo
from node.trust import Trust
from tandem.v1 import node_pb2, node_pb2_grpc
from tests.fixtures.nodes import serving
from tests.fixtures.pairs import pair
from tests.fixtures.told import told

ENTRY = "import sys; from node.cli import main; sys.exit(main())"


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", ENTRY, "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def verdicts(machine: dict[str, Any]) -> dict[str, Verdict]:
    return {finding["check"]: finding["verdict"] for finding in machine["findings"]}


def test_a_machine_without_a_node_is_told_so(tandem_home: Path) -> None:
    done = doctor("--json")
    said = json.loads(done.stdout)
    (machine,) = said["machines"]
    found = verdicts(machine)
    assert (found["python"], found["mlx"], found["mlx-lm"], found["metal"]) == ("ok",) * 4, machine
    assert (found["ports"], found["pairing"], found["clock"]) == ("warning", "warning", "unknown")
    assert found["multicast"] == "warning", "TANDEM_BONJOUR is off in tests"
    assert machine["verdict"] == said["verdict"] == worst([Finding("", verdict, "") for verdict in found.values()])
    assert done.returncode == (1 if said["verdict"] == "wrong" else 0)
    assert not list((tandem_home).glob("*")), "looking changes nothing"


def test_the_node_that_serves_answers_for_itself_and_exit_1_says_that_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The packages that a node finds first: what it calls its mlx is too old.
    old = tmp_path / "packages" / "mlx-0.31.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.31.0\n")
    with serving(tmp_path, "Studio", environment={"PYTHONPATH": str(old.parent)}) as (node,):
        monkeypatch.setenv("TANDEM_HOME", str(node.home))
        done = doctor()
        assert done.returncode == 1, done.stdout + done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == "Studio"
        at = next(number for number, line in enumerate(lines) if line.split()[:2] == ["wrong", "mlx"])
        assert "0.31.0; " in lines[at]
        assert "to mend it: pip install 'mlx" in lines[at + 1]
        assert f"the service listens on {node.port}" in done.stdout
        assert "1 wrong" in lines[-1]


def test_only_paired_machines_are_told(tmp_path: Path, tandem_home: Path) -> None:
    home = tmp_path / "home"

    async def work() -> None:
        node = Daemon(home, "Studio", host="127.0.0.1", advertise=False)
        await node.start()
        client = NodeClient(node.address, "Studio", credentials(home).certificate)
        try:
            with pytest.raises(NodeRefused, match="does not know this machine"):
                await client.diagnose(Wanted())
            pair(home, tandem_home)
            again = NodeClient(node.address, "Studio", credentials(home).certificate)
            found = await again.diagnose(Wanted((node.address,)))
            assert found.info.name == "Studio"
            assert [(item.address, item.outcome) for item in found.reached] == [(node.address, "answers")]
            assert found.received <= found.replied
            assert {"disk", "mlx", "local-network", "pairing"} <= {finding.check for finding in found.findings}
            await again.close()
        finally:
            await client.close()
            await node.stop()

    asyncio.run(work())


def test_a_machine_from_elsewhere_does_not_learn_what_listens_on_loopback(
    tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called_from: list[IPv4Address | None] = []

    def caller_address(context: object) -> IPv4Address | None:
        called_from.append(guard.caller_address(context))
        return IPv4Address("198.51.100.9")

    monkeypatch.setattr(service, "caller_address", caller_address)

    async def work() -> None:
        node = Daemon(tandem_home, "Studio", host="127.0.0.1", advertise=False)
        await node.start()
        client = NodeClient(node.address)
        try:
            found = await client.diagnose(Wanted((node.address, "localhost:22")))
        finally:
            await client.close()
            await node.stop()
        assert [(item.address, item.outcome) for item in found.reached] == [
            (node.address, "untried"),
            ("localhost:22", "untried"),
        ]
        assert "127.0.0.1 is on no network" in found.reached[0].reason

    asyncio.run(work())
    assert called_from == [IPv4Address("127.0.0.1")]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:50000", "10.0.0.1"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:50000", "10.0.0.1"),
        ("ipv6:[::ffff:127.0.0.1]:50000", "127.0.0.1"),
        ("ipv6:%5Bfe80::1%25en0%5D:50000", None),
        ("unix:/tmp/socket", None),
        ("", None),
    ],
)
def test_where_a_call_came_from(peer: str, address: str | None) -> None:
    class Context:
        def peer(self) -> str:
            return peer

    assert guard.caller_address(Context()) == (IPv4Address(address) if address else None)


class OfAnotherProtocol(node_pb2_grpc.NodeServicer):
    """Answers as a later version would: by who it is alone."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info

    async def Diagnose(  # noqa: N802 - the name of the call
        self,
        request: node_pb2.DiagnoseRequest,
        context: grpc.aio.ServicerContext[node_pb2.DiagnoseRequest, node_pb2.DiagnoseReply],
    ) -> node_pb2.DiagnoseReply:
        assert request.protocol == rpc.PROTOCOL
        return node_pb2.DiagnoseReply(info=rpc.encode_info(self.info))


def test_another_protocol_is_refused_on_either_side(tandem_home: Path) -> None:
    async def work() -> None:
        trust = Trust(tandem_home)
        server = rpc.new_server(trust)
        later = replace(told("Later"), protocol=rpc.PROTOCOL + 1)
        node_pb2_grpc.add_NodeServicer_to_server(OfAnotherProtocol(later), server)
        port = rpc.listen(server, "127.0.0.1:0", trust)
        await server.start()
        client = NodeClient(f"127.0.0.1:{port}")
        try:
            with pytest.raises(NodeRefused, match="another version of the protocol"):
                await client.diagnose(Wanted())
        finally:
            await client.close()
            await server.stop(0)
        node = Daemon(tandem_home, "Studio", host="127.0.0.1", advertise=False)
        await node.start()
        try:
            async with rpc.open_channel(node.address) as channel:
                request = node_pb2.DiagnoseRequest(protocol=rpc.PROTOCOL + 1)
                reply = await node_pb2_grpc.NodeStub(channel).Diagnose(request, timeout=20)
            assert (reply.info.name, len(reply.findings)) == ("Studio", 0)
        finally:
            await node.stop()

    asyncio.run(work())


def test_findings_are_shown_in_columns_of_any_width() -> None:
    long = Finding("disk", "wrong", "words " * 30, "node store prune " * 10)
    shown = as_lines("Studio", [Finding("mlx", "ok", "0.32.4", "not shown"), long], width=80)
    lines = [click.unstyle(line) for line in shown]
    assert lines[1] == "  ok       mlx            0.32.4"
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    assert text.count("words") == 30
    assert text.count("node store prune") == 10
    assert "not shown" not in text
    assert len(as_lines("Studio", [long], width=0)) == 3
    assert click.unstyle(closing([long, *[Finding("a", "warning", "")] * 2])) == "1 wrong, 2 warnings"
    assert click.unstyle(closing([])) == "nothing is wrong"


def test_a_node_that_is_frozen_is_named_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, "Studio", environment={}) as (node,):
        monkeypatch.setenv("TANDEM_HOME", str(node.home))
        monkeypatch.setattr(client, "DIAGNOSE_SECONDS", 1.0)
        node.process.send_signal(signal.SIGSTOP)
        try:
            result = CliRunner().invoke(cli, ["doctor", "--json"])
        finally:
            node.process.send_signal(signal.SIGCONT)
    assert result.exit_code == 1, result.output
    (machine,) = json.loads(result.output)["machines"]
    (finding,) = (finding for finding in machine["findings"] if finding["verdict"] == "wrong")
    assert (machine["name"], finding["check"]) == ("Studio", "answer")
    assert f"kill {node.process.pid}" in finding["mend"]
