"""Pairing as a person meets it: the commands, on real sockets and with real nodes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator import pairing as pairing_module
from coordinator.cli import coordinator
from coordinator.commands import pair as command
from coordinator.discovery import Found, SeenNode, Wanted, find, select, unpaired
from coordinator.invites import Invites
from coordinator.pairing import Pairing, Place, can_be_paired, join_all
from node.advert import Advert
from node.cli import cli as node_command
from node.clikit import run_cli
from node.errors import UserError
from node.identity import credentials
from node.info import PAIRING_PORT
from node.pairing.tokens import parse_token
from node.peers import Peers, fingerprint, shown
from tests.fixtures.desks import Node, pairable
from tests.fixtures.nodes import END_SECONDS, ENTRY, READY_SECONDS, loopback
from tests.fixtures.pairs import pair
from tests.fixtures.told import told

COORDINATOR = "import sys; from coordinator.cli import main; sys.exit(main())"


def seen_of(node: Node, name: str = "Air") -> SeenNode:
    """The node, as its advert tells of it."""
    ((host, port),) = node.place.addresses
    home = credentials(node.home).home
    problem = unpaired(name)
    return SeenNode(
        name,
        f"id-{name}",
        home,
        f"{host}:1",
        None,
        problem,
        label=name,
        pairing_port=port,
        join=node.place.join,
        hosts=(host,),
    )


def names(home: Path) -> list[str]:
    return [peer.name for peer in Peers(home).all()]


# --- a real node ----------------------------------------------------------------------------------------------------


class Serving:
    """A ``node serve`` of another home, and what it says."""

    def __init__(self, home: Path, *arguments: str, fleet: str) -> None:
        options = ["--name", "Air", "--port", "0", "--host", "127.0.0.1", "--json", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", ENTRY, "serve", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, **loopback(fleet), "TANDEM_HOME": str(home)},
            start_new_session=True,
            text=True,
        )
        self._watch = threading.Timer(READY_SECONDS, self.process.kill)
        self._watch.start()

    def hear(self, event: str) -> dict[str, Any]:
        """What it says next, which must be this."""
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"event": "end"}')
        assert said["event"] == event, said
        return said

    def stop(self) -> None:
        self._watch.cancel()
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@contextmanager
def serving(home: Path, *arguments: str, fleet: str) -> Iterator[Serving]:
    node = Serving(home, *arguments, fleet=fleet)
    try:
        yield node
    finally:
        node.stop()


def in_home(home: Path, work: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(home))
        return work()


def test_a_node_is_paired_by_its_code_and_each_side_can_end_it(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    air = tmp_path / "air"
    with serving(air, fleet=os.environ["TANDEM_FLEET"]) as node:
        node.hear("serving")
        code = node.hear("pairing")
        address = f"127.0.0.1:{code['port']}"
        wrong = f"{(int(code['code'].replace('-', '')) + 1) % 10**8:08}"
        assert run_cli(coordinator, ["pair", address, "--code", wrong]) == 2
        assert "the code is wrong, or somebody else answers" in capsys.readouterr().err
        node.hear("wrong_code")
        assert names(tandem_home) == names(air) == []

        assert run_cli(coordinator, ["pair", address, "--code", code["code"]]) == 0
        mark = fingerprint(credentials(air).certificate)
        assert f"paired with Air ({shown(mark)})" in capsys.readouterr().out
        paired = node.hear("paired")
        assert paired["fingerprint"] == fingerprint(credentials(tandem_home).certificate)
        assert names(tandem_home) == ["Air"]
        assert names(air) == [paired["name"]]

        assert in_home(air, lambda: run_cli(node_command, ["pair", "--json"]), monkeypatch) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["code"] == node.hear("pairing")["code"] != code["code"]

        assert run_cli(coordinator, ["unpair", "air"]) == 0
        assert names(tandem_home) == []
        assert run_cli(coordinator, ["unpair", "air"]) == 2
        assert "paired with nobody" in capsys.readouterr().err
        assert in_home(air, lambda: run_cli(node_command, ["forget", paired["home"]]), monkeypatch) == 0
        assert names(air) == []


def test_a_node_joins_by_a_token_when_it_is_seen(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in loopback(os.environ["TANDEM_FLEET"]).items():
        monkeypatch.setenv(name, value)
    assert run_cli(coordinator, ["invite", "--hours", "1"]) == 0
    token = capsys.readouterr().out.strip()
    air = tmp_path / "air"
    with serving(air, "--join", token, fleet=os.environ["TANDEM_FLEET"]) as node:
        node.hear("serving")
        assert node.hear("joining")["token"] == parse_token(token).id
        assert run_cli(coordinator, ["nodes", "--json"]) == 0
        out = capsys.readouterr()
        assert "paired with Air, which joined by its token" in out.err
        node.hear("paired")
        (seen,) = json.loads(out.out)["nodes"]
        assert (seen["state"], seen["fingerprint"]) == ("free", fingerprint(credentials(air).certificate))
    assert names(tandem_home) == ["Air"]


# --- what is asked --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Has a person type these lines at the terminal."""
    with contextlib.ExitStack() as stack:

        def type_(*lines: str) -> None:
            keyboard, screen = pty.openpty()
            stack.callback(os.close, keyboard)
            monkeypatch.setattr(sys, "stdin", stack.enter_context(os.fdopen(screen)))
            monkeypatch.setattr(sys, "stderr", Terminal())
            os.write(keyboard, "".join(f"{line}\n" for line in lines).encode())

        yield type_


def look_gives(monkeypatch: pytest.MonkeyPatch, nodes: Sequence[SeenNode], *, late: Sequence[SeenNode] = ()) -> None:
    async def look(*, thoroughly: bool = False) -> Found:
        return Found((*nodes, *(late if thoroughly else ())), 1.0, "")

    monkeypatch.setattr(command, "_look", look)


def said() -> str:
    assert isinstance(sys.stderr, Terminal)
    return sys.stderr.getvalue()


def test_a_person_is_asked_again_after_a_slip(
    tandem_home: Path, tmp_path: Path, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with pairable(tmp_path / "air") as node:
            look_gives(monkeypatch, [seen_of(node)])
            typed("123", node.code)
            peer = await command._pair(Pairing(tandem_home, "Studio"), None, None)
            assert peer.name == "Air"
            assert node.friends == ["Studio"]
            assert said().count("The code that Air shows: ") == 2
            assert "a code has 8 digits" in said()

    asyncio.run(work())


def test_who_is_slow_to_answer_is_found_by_name(
    tandem_home: Path, tmp_path: Path, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with pairable(tmp_path / "air") as node:
            look_gives(monkeypatch, [], late=[seen_of(node)])
            typed(node.code)
            assert (await command._pair(Pairing(tandem_home, "Studio"), "air", None)).name == "Air"

    asyncio.run(work())


def test_ctrl_c_at_the_question_ends_it_at_once(tandem_home: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pairable(tmp_path / "air") as node:
            ((host, port),) = node.place.addresses
            keyboard, screen = pty.openpty()
            asking = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", COORDINATOR, "pair", f"{host}:{port}"),
                stdin=screen,
                stderr=subprocess.PIPE,
            )
            assert asking.stderr is not None
            try:
                await asking.stderr.readuntil(b" shows: ")
                asking.send_signal(signal.SIGINT)
                assert await asking.wait() == 130
                assert b"Traceback" not in await asking.stderr.read()
            finally:
                if asking.returncode is None:
                    asking.kill()
                    await asking.wait()
                os.close(keyboard)
                os.close(screen)
            assert names(tandem_home) == []

    asyncio.run(work())


def test_before_a_training_unpaired_nodes_are_asked_for_and_may_be_left_out(
    tandem_home: Path, tmp_path: Path, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with pairable(tmp_path / "air") as air, pairable(tmp_path / "mini", "Mini") as mini:
            look_gives(monkeypatch, [seen_of(air), seen_of(mini, "Mini")])
            typed("", mini.code)
            auto = Wanted(auto=True, local=False, names=(), addresses=())
            await command._pair_before_training(auto, person=True)
            question = "Air is not paired yet. Its code, as it shows it (Enter: go on without): "
            assert question in said()
            assert "going on without Air" in said()
            assert (air.friends, names(tandem_home)) == ([], ["Mini"])

            typed()
            named = replace(auto, auto=False, names=("Mini",))
            await command._pair_before_training(named, person=True)
            assert said() == "", "who is paired, or not meant, is not asked for"
            await command._pair_before_training(auto, person=False)
            assert said() == ""

    asyncio.run(work())


def test_without_a_terminal_the_command_to_run_is_told(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run_cli(coordinator, ["pair", "127.0.0.1:9", "--code", "12"]) == 2
    assert "8 digits" in capsys.readouterr().err
    assert run_cli(coordinator, ["pair", "127.0.0.1:9", "--code", "12345678"]) == 1
    assert "no node waits there to be paired" in capsys.readouterr().err
    assert run_cli(coordinator, ["pair", "127.0.0.9", "--code", "12345678"]) == 1
    assert f"127.0.0.9:{PAIRING_PORT}: no node waits there" in capsys.readouterr().err
    assert run_cli(coordinator, ["pair"]) == 2
    assert "no node that can be paired was found" in capsys.readouterr().err

    async def work() -> None:
        async with pairable(tmp_path / "air") as node:
            look_gives(monkeypatch, [seen_of(node), replace(seen_of(node), name="Mini", label="Mini")])
            code = await asyncio.to_thread(run_cli, coordinator, ["pair", "Air"])
            assert code == 2
            assert "coordinator pair Air --code CODE" in capsys.readouterr().err
            assert await asyncio.to_thread(run_cli, coordinator, ["pair"]) == 2
            assert "2 nodes can be paired: Air at" in capsys.readouterr().err

    asyncio.run(work())


def test_the_own_home_is_not_paired_with_itself(tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        async with pairable(tandem_home) as node:
            ((host, port),) = node.place.addresses
            arguments = ["pair", f"{host}:{port}", "--code", node.code]
            assert await asyncio.to_thread(run_cli, coordinator, arguments) == 2
            assert node.friends == []

    asyncio.run(work())
    assert "is of this TANDEM_HOME" in capsys.readouterr().err


def test_how_a_node_can_be_paired_is_heard_by_bonjour(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in loopback(os.environ["TANDEM_FLEET"]).items():
        monkeypatch.setenv(name, value)
    theirs = tmp_path / "theirs"
    info = told("Air", home=credentials(theirs).home)

    async def work() -> None:
        sign = Advert()
        try:
            await sign.start(info, 4711, {"pair": "4712", "join": "ab" * 5})
            (seen,) = (await find(2.4)).nodes
            assert (seen.pairing_port, seen.join, seen.hosts) == (4712, "ab" * 5, ("127.0.0.1",))
            with pytest.raises(UserError, match="--nodes Air: not paired with this machine: coordinator pair Air"):
                await select("Air", home=tandem_home)
            left_out = (await select("auto", home=tandem_home)).left_out
            assert [(node.name, node.reason) for node in left_out] == [("Air", unpaired("Air"))]
            await sign.offer({})
            (seen,) = (await find(2.4)).nodes
            assert (seen.pairing_port, seen.join) == (0, "")
            await sign.offer({"pair": "99999"})
            (seen,) = (await find(2.4)).nodes
            assert seen.pairing_port == 0
        finally:
            await sign.stop()

    asyncio.run(work())


def test_what_strangers_are_called_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    node = SeenNode(
        "A\x1b[2J", "i", "h", "1.2.3.4:5\x07", None, "", label="A\x1b[2J", pairing_port=1, hosts=("1.2.3.4",)
    )
    assert "\x1b" not in Place.of(node).name
    assert not {"\x1b", "\x07"} & set(command._listed([node]))


# --- invitations and the end ----------------------------------------------------------------------------------------


def test_only_own_invitations_are_answered(tandem_home: Path, tmp_path: Path) -> None:
    async def work() -> None:
        mark = fingerprint(credentials(tandem_home).certificate)
        other = tmp_path / "other"
        theirs = Invites(other).new(fingerprint(credentials(other).certificate), 60)
        old = Invites(tandem_home).new(mark, 0)
        ours = Invites(tandem_home).new(mark, 60)
        tokens = {"a": ours, "b": old, "c": theirs}
        nodes = [Node(tmp_path / name, name) for name in tokens]
        for node, token in zip(nodes, tokens.values(), strict=True):
            await node.desk.start(token)
        lines: list[str] = []
        try:
            seen = [seen_of(node, name) for node, name in zip(nodes, tokens, strict=True)]
            pairing = Pairing(tandem_home, "Studio")
            assert len(can_be_paired(pairing, seen)) == 3
            joined = await join_all(pairing, Found(tuple(seen), 1.0, ""), lines.append)
        finally:
            for node in nodes:
                await node.desk.stop()
        assert [peer.name for peer in joined] == ["a"]
        assert [node.friends for node in nodes] == [["Studio"], [], []]
        assert "its token has expired" in lines[0]
        assert "joined by its token" in lines[1]
        assert len(lines) == 2, "of the token of another nothing is said"

    asyncio.run(work())


def test_a_time_that_is_none_is_no_time(tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(coordinator, ["invite", "--hours", "nan"]) == 2
    assert "--hours nan is no time" in capsys.readouterr().err
    assert not Invites(tandem_home).any_open()


def test_strangers_that_wait_with_our_token_and_say_nothing_delay_nobody(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairing_module, "JOINING_SECONDS", 1.0)

    async def work() -> None:
        token = Invites(tandem_home).new(fingerprint(credentials(tandem_home).certificate), 60)
        node, lines = Node(tmp_path / "a", "a"), list[str]()
        await node.desk.start(token)
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(20)]
            real = seen_of(node, "a")
            rogues = [
                replace(real, name="x", label="x", home=f"{index:016x}", pairing_port=one.getsockname()[1])
                for index, one in enumerate(silent)
            ]
            try:
                # All at once: one after the other would take 20 times as long as each may.
                async with asyncio.timeout(10):
                    found = Found((*rogues, real), 1.0, "")
                    joined = await join_all(Pairing(tandem_home, "Studio"), found, lines.append)
            finally:
                await node.desk.stop()
        assert [peer.name for peer in joined] == ["a"]
        assert lines[:-1] == ["x waits with a token, and does not answer"] * 20

    asyncio.run(work())


def test_invitations_are_used_once_and_by_one_at_a_time(tmp_path: Path) -> None:
    now = 1000.0
    invites = Invites(tmp_path, lambda: now)
    token = invites.new("ab" * 32, 60)
    assert invites.any_open()
    assert invites.problem("../../etc") == invites.problem("0" * 10) == "unknown"
    with invites.held(token.id) as first, invites.held(token.id) as second:
        assert first is not None
        assert first.password == token.password
        assert second is None
        invites.use(first, "cd" * 32)
    with invites.held(token.id) as again:
        assert again is None
    assert invites.problem(token.id) == "used"
    late = invites.new("ab" * 32, 60)
    now += 60
    assert invites.problem(late.id) == "expired"
    assert not invites.any_open()
    now += 100 * 24 * 3600
    kept = invites.new("ab" * 32, 60)
    assert [path.stem for path in (tmp_path / "invites").glob("*.json")] == [kept.id]


def test_of_several_with_one_name_none_is_forgotten(
    tandem_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("one", "two"):
        pair(tandem_home, tmp_path / folder / "Air")
    assert run_cli(coordinator, ["unpair", "Air"]) == 2
    error = capsys.readouterr().err
    marks = [peer.fingerprint for peer in Peers(tandem_home).all()]
    assert all(shown(mark) in error for mark in marks)
    assert run_cli(node_command, ["forget", shown(marks[0])]) == 0
    assert [peer.fingerprint for peer in Peers(tandem_home).all()] == marks[1:]
