"""A node as a whole: started twice, on a port that is taken, stopped, as a program."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from node import daemon, rpc
from node.cli import cli
from node.client import NodeClient
from node.clikit import run_cli
from node.daemon import Daemon
from node.errors import NodeLost, NodeRefused, UserError
from node.events import Condition, Heartbeat
from node.identity import credentials
from node.info import DEFAULT_PORT, Interface, NodeInfo
from node.owner import Owner
from node.pairing.tokens import Token, new_token
from node.peers import Peers
from node.running import running_nodes

MAIN = "from node.cli import main; raise SystemExit(main())"


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(limited())


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", MAIN, *arguments]


@contextmanager
def program(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A ``node serve`` and what it said when it served."""
    with subprocess.Popen(
        command("serve", "--port", "0", "--json", *arguments), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_a_node_serves_is_known_to_its_home_and_leaves_nothing(tandem_home: Path) -> None:
    async def work() -> None:
        node = Daemon(tandem_home, "Studio", host="127.0.0.1")
        await node.start()
        client = NodeClient(node.address)
        info = await client.describe()
        assert (info.name, info.id, info.busy) == ("Studio", node.info().id, None)
        assert info.relay_port not in (0, node.port)
        assert [item.address for item in info.interfaces] == ["127.0.0.1"]
        assert [(found.name, found.address, found.pid) for found in running_nodes(tandem_home)] == [
            ("Studio", node.address, os.getpid())
        ]
        async with rpc.open_channel(node.address) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await node.stop()
        await node.stop()
        assert running_nodes(tandem_home) == []
        with pytest.raises(NodeLost):
            await client.describe()
        await client.close()

    run(work)


def test_a_node_on_battery_takes_no_job_unless_its_owner_allows_it(
    tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "REFRESH_SECONDS", 0.05)
    now = [Condition("warn", "unknown", "yes")]

    async def work() -> None:
        for allowed in (False, True):
            owner = Owner(tandem_home, allow_battery=allowed)
            node = Daemon(tandem_home, "Air", host="127.0.0.1", advertise=False, owner=owner, condition=lambda: now[0])
            await node.start()
            client = NodeClient(node.address)
            info = await client.describe()
            assert (info.on_battery, info.memory_pressure, info.thermal_pressure) == ("yes", "warn", "unknown")
            if not allowed:
                words = r"Air runs on battery power \(node serve --allow-battery takes jobs all the same\)"
                with pytest.raises(NodeRefused, match=words):
                    await client.open_worker("run", "anna")
                now[0] = Condition("warn", "unknown", "no")
                while (await client.describe()).on_battery == "yes":
                    await asyncio.sleep(0.02)
            link = await client.open_worker("run", "anna")
            assert isinstance(await link.receive(), Condition)
            now[0] = Condition("critical", "unknown", "yes")
            while (event := await link.receive()) != now[0]:
                assert isinstance(event, Condition | Heartbeat), "the job goes on"
            await link.close()
            await client.close()
            await node.stop()
            now[0] = Condition("warn", "unknown", "yes")

    run(work)


def test_what_fails_while_a_node_serves_is_tried_again_and_logged_once(
    tandem_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(daemon, "REFRESH_SECONDS", 0.01)
    now = [Condition("normal", "unknown", "no")]
    looks: list[str] = []

    async def look() -> None:
        looks.append("desk")
        raise UserError("no port for pairing")

    async def update(info: NodeInfo) -> None:
        looks.append("advert")
        raise OSError(101, "Network is unreachable")

    async def work() -> None:
        node = Daemon(tandem_home, "Air", host="127.0.0.1", condition=lambda: now[0])
        await node.start()
        try:
            monkeypatch.setattr(node._desk, "look", look)
            monkeypatch.setattr(node._advert, "update", update)
            while len(looks) < 4:
                await asyncio.sleep(0.01)
            assert looks[:4] == ["desk", "advert"] * 2
            now[0] = Condition("normal", "unknown", "yes")
            while node.info().on_battery != "yes":
                await asyncio.sleep(0.01)
        finally:
            await node.stop()

    run(work)
    said = [record.getMessage() for record in caplog.records if record.name == "node.daemon"]
    assert said == [
        "who may be paired cannot be brought up to date now: no port for pairing",
        "the advert on the network cannot be brought up to date now: [Errno 101] Network is unreachable",
    ]


def test_a_token_need_not_stand_in_the_command(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[Token] = []

    async def serve(*arguments: Any) -> None:
        taken.extend(argument for argument in arguments if isinstance(argument, Token))

    monkeypatch.setattr(daemon, "serve", serve)
    token, file = new_token("ab" * 32), tmp_path / "token"
    file.write_text(f"{token}\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{token}\nwhat else there is\n"))
    for given in (str(token), f"@{file}", "-"):
        assert run_cli(cli, ["serve", "--join", given]) == 0, given
    assert taken == [token] * 3
    assert run_cli(cli, ["serve", "--join", f"@{tmp_path / 'none'}"]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
    assert run_cli(cli, ["serve", "--join", "-"]) == 2, "the second line is none"
    assert run_cli(cli, ["serve", "--join", ""]) == 2, "a variable that was not set"
    monkeypatch.setattr(sys, "stdin", None)
    assert run_cli(cli, ["serve", "--join", "-"]) == 2
    assert "no token" in capsys.readouterr().err


def test_a_token_whose_file_is_gone_keeps_no_paired_machine_from_serving(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[Token | None] = []

    async def serve(*arguments: Any) -> None:
        served.append(arguments[7])

    monkeypatch.setattr(daemon, "serve", serve)
    gone = tmp_path / "token"
    given = ["serve", "--quiet", "--join", f"@{gone}"]
    assert run_cli(cli, given) == 2
    assert "coordinator invite" in capsys.readouterr().err
    Peers(tandem_home).add("Air", credentials(tmp_path / "air").certificate)
    assert run_cli(cli, given) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert str(gone) in line
    assert "paired already" in line
    assert run_cli(cli, ["serve", "--json", "--join", f"@{gone}"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["event"], said["reason"], said["file"]) == ("join_refused", "missing", str(gone))
    gone.write_text("no token")
    assert run_cli(cli, given) == 2, "what is there must be one"
    gone.unlink()
    gone.mkdir()
    assert run_cli(cli, given) == 2, "only what is missing was removed after use"
    assert served == [None, None]


def test_options_are_checked_without_serving(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(*_: Any) -> None:
        raise AssertionError("it serves")

    monkeypatch.setattr(daemon, "serve", serve)
    token, log = tmp_path / "token", tmp_path / "logs" / "node.log"
    token.write_text(f"{new_token('ab' * 32)}\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        good = ["--max-memory", "12GB", "--host", "127.0.0.1", "--port", str(taken), "--log", str(log)]
        assert run_cli(cli, ["serve", "--check", "--join", f"@{token}", *good]) == 0, "a port may be free by then"
    file = tmp_path / "file"
    file.write_text("")
    for option, value, why in (
        ("--max-memory", "banana", "no size"),
        ("--max-memory", "1KB", "no job fits"),
        ("--store-limit", "1KB", "no model fits"),
        ("--name", " ", "take another"),
        ("--host", "192.0.2.7", "no IPv4 address of this machine"),
        ("--port", "70000", "--port"),
        ("--log", str(file / "node.log"), f"{file} cannot be written to"),
        ("--join", "nonsense", "no token"),
        ("--no-such-option", "x", "No such option"),
    ):
        assert run_cli(cli, ["serve", "--check", option, value]) == 2, option
        assert why in capsys.readouterr().err
    monkeypatch.setattr(daemon, "_bind_problem", lambda *_: errno.EACCES)
    assert run_cli(cli, ["serve", "--check", "--port", "80"]) == 2
    assert "--port 80: Permission denied" in capsys.readouterr().err
    assert not log.parent.exists()
    assert not list(tandem_home.glob("*")), "looking changes nothing"


def test_a_node_inside_another_program_is_not_announced(tandem_home: Path) -> None:
    async def work() -> None:
        node = Daemon(tandem_home, "Studio", host="127.0.0.1", advertise=False, takes_jobs=False)
        await node.start()
        assert running_nodes(tandem_home) == []
        client = NodeClient(node.address)
        assert not (await client.describe()).takes_jobs
        await client.close()
        await node.stop()

    run(work)


def test_a_port_that_is_taken_names_who_has_it(tandem_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        first = Daemon(tandem_home, "Studio", host="127.0.0.1")
        await first.start()
        second = Daemon(tandem_home, "Air", host="127.0.0.1", port=first.port)
        with pytest.raises(UserError, match=rf"--port {first.port}: the node Studio listens there"):
            await second.start()
        await second.stop()
        with socket.create_server(("127.0.0.1", 0)) as other:
            third = Daemon(tandem_home, "Air", host="127.0.0.1", port=other.getsockname()[1])
            with pytest.raises(UserError, match="another program listens there"):
                await third.start()
            await third.stop()
        assert [node.name for node in running_nodes(tandem_home)] == ["Studio"]
        await first.stop()

    run(work)
    assert capfd.readouterr().err == ""


def test_the_usual_port_is_taken_where_it_is_free(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            usual = probe.getsockname()[1]
        monkeypatch.setattr(daemon, "DEFAULT_PORT", usual)
        first = Daemon(tandem_home, "Studio", host="127.0.0.1", port=None)
        second = Daemon(tandem_home, "Air", host="127.0.0.1", port=None)
        await first.start()
        await second.start()
        assert (first.port, first.remark) == (usual, "")
        assert second.port not in (0, usual)
        assert daemon.greeting(first).splitlines()[1:] == [f"serving as Studio on 127.0.0.1:{usual}; Ctrl-C stops"]
        assert daemon.greeting(second).splitlines()[1:] == [
            f"serving as Air on 127.0.0.1:{second.port}; Ctrl-C stops",
            f"port {usual} is taken, the node Studio listens there: it is {second.port} until this node starts again",
        ]
        await second.stop()
        await first.stop()

    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1")
    run(work)


def test_the_usual_port_is_none_that_systems_hand_out() -> None:
    assert 1024 <= DEFAULT_PORT < 32768


@pytest.mark.parametrize("host", ["203.0.113.7", "224.0.0.1", "255.255.255.255", "studio", "::1", ""])
def test_an_address_that_is_not_this_machines_is_refused(
    host: str, tandem_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def work() -> None:
        node = Daemon(tandem_home, "Studio", host=host)
        with pytest.raises(UserError, match=rf"^--host {host}: no IPv4 address of this machine; it has .*127\.0\.0\.1"):
            await node.start()
        await node.stop()

    run(work)
    assert capfd.readouterr().err == ""


def test_a_node_on_one_address_is_reached_there_by_its_own_home(tandem_home: Path) -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("elsewhere 127.0.0.1 is the only loopback address")

    async def work() -> None:
        node = Daemon(tandem_home, "Studio", host="127.0.0.9")
        await node.start()
        (found,) = running_nodes(tandem_home)
        client = NodeClient(found.address)
        assert (await client.describe()).name == "Studio"
        await client.close()
        other = Daemon(tandem_home, "Air", host="127.0.0.9", port=node.port)
        with pytest.raises(UserError, match="the node Studio listens there"):
            await other.start()
        await other.stop()
        await node.stop()

    run(work)


def test_only_addresses_that_bonjour_may_use_are_shown(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        node = Daemon(tandem_home, "Studio", advertise=False)
        await node.start()
        addresses = [Interface("en0", "ethernet", "10.0.0.1"), Interface("en1", "wifi", "10.0.1.1")]
        node._machine["interfaces"] = (*addresses, Interface("lo0", "loopback", "127.0.0.1"))
        for allowed, shown in (
            ("", ["10.0.0.1", "10.0.1.1"]),
            ("off", ["10.0.0.1", "10.0.1.1"]),
            ("10.0.1.1", ["10.0.1.1"]),
            ("127.0.0.1", ["127.0.0.1"]),
        ):
            monkeypatch.setenv("TANDEM_BONJOUR", allowed)
            where = ", ".join(f"{address}:{node.port}" for address in shown)
            assert f"serving as Studio on {where}; Ctrl-C stops" in daemon.greeting(node), allowed
        await node.stop()

    run(work)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--name", "a,b", "--name 'a,b': --nodes has commas between names, so a name has none; take another"),
        ("--name", "local", "--name 'local': --nodes local means something else; take another"),
        ("--name", "x:50", "--name 'x:50': --nodes would take it for an address; take another"),
        ("--name", "", "--name '': a node needs a name; take another"),
        ("--name", " a", "--name ' a': a name neither begins nor ends with a blank; take another"),
        ("--max-memory", "0GB", "--max-memory 0GB: no job fits into less than 64 MB; give more,"),
        ("--max-memory", "63MB", "--max-memory 63MB: no job fits into less than 64 MB; give more,"),
        ("--store-limit", "0GB", "--store-limit 0GB: no model fits into less than 64 MB, and"),
        ("--store-limit", "", "--store-limit: '' is no size; write it as 12GB or 500MB"),
        ("--max-memory", "", "--max-memory: '' is no size; write it as 12GB or 500MB"),
        ("--max-memory", "-1GB", "--max-memory: '-1GB' is no size; write it as 12GB or 500MB"),
        ("--max-memory", "9999999999TB", "--max-memory: 9999999999TB is more than any machine has"),
    ],
)
def test_what_cannot_be_served_with_is_one_line(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(cli, ["serve", "--port", "0", option, value]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {said}")
    assert errors.count("\n") == 1


def test_the_program_from_its_greeting_to_ctrl_c(tandem_home: Path) -> None:
    with program("--name", "Studio") as (process, said):
        assert (said["event"], said["name"]) == ("serving", "Studio")
        assert said["port"] > 0
        assert "127.0.0.1" in said["addresses"]
        again = subprocess.run(command("serve", "--name", "Studio"), capture_output=True, text=True, check=False)
        assert again.returncode == 2
        assert again.stderr == (
            f"error: --name Studio: process {process.pid} serves under this name already; stop it or take another\n"
        )
        # Who was refused took nothing from who serves.
        assert [(node.port, node.pid) for node in running_nodes(tandem_home)] == [(said["port"], process.pid)]
        for wish, words in (("pause", "paused: Studio\n"), ("resume", "takes jobs again: Studio\n")):
            assert subprocess.run(command(wish), capture_output=True, text=True, check=True).stdout == words
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert running_nodes(tandem_home) == []


def test_a_node_that_was_killed_is_not_taken_for_a_running_one(tandem_home: Path) -> None:
    with program("--name", "Studio") as (process, first):
        process.kill()
        process.wait(30)
    assert running_nodes(tandem_home) == []
    with program("--name", "Studio") as (_, second):
        assert second["id"] == first["id"]
