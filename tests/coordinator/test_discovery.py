"""Finding nodes: real Bonjour on loopback, real servers."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from zeroconf import ServiceStateChange

from coordinator import addresses, discovery
from coordinator.addresses import MOST, Remembered, split_address
from coordinator.discovery import (
    SILENT,
    WENT_AWAY,
    Found,
    SeenNode,
    choose,
    find,
    mismatch,
    parse_wanted,
    protocol_problem,
    select,
)
from coordinator.view.nodes import COLUMNS, UNKNOWN, as_data, closing_line, print_table, state_text, table_row
from node.advert import Advert
from node.errors import UserError
from node.home import home
from node.identity import credentials
from node.info import PROTOCOL, Busy, NodeInfo
from node.names import name_problem, usable_name
from node.peers import Peers, fingerprint
from tests.fixtures.pairs import pair
from tests.fixtures.told import FACTS, telling, told

NOON = 1_800_000_000.0
SECONDS = 10.0
"""To look, at most: it ends early when all has been heard, however busy this machine is."""


@pytest.fixture
def bonjour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_BONJOUR", "127.0.0.1")


def seen(name: str, **changes: object) -> SeenNode:
    info = told(name, **changes)  # type: ignore[arg-type]
    return SeenNode(name, info.id, info.home, f"10.0.0.1:{len(name)}", info, "", label=name)


def found(*nodes: SeenNode, trouble: str = "") -> Found:
    return Found(nodes, 1.0, trouble)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- by Bonjour -----------------------------------------------------------------------------------------------------


def test_finds_who_is_advertised_and_ends_early(bonjour: None) -> None:
    async def run() -> None:
        studio, mini = told("Studio"), told("Mini", facts=replace(FACTS, chip=None, free_memory_bytes=None))
        async with telling(studio, advert=studio) as port, telling(mini, advert=mini) as other:
            got = await find(SECONDS)
        assert [(node.name, node.address, node.info, node.problem) for node in got.nodes] == [
            ("Mini", f"127.0.0.1:{other}", mini, ""),
            ("Studio", f"127.0.0.1:{port}", studio, ""),
        ]
        assert got.trouble == ""

    asyncio.run(run())


def test_who_is_not_paired_is_listed_and_not_asked(bonjour: None, tmp_path: Path, tandem_home: Path) -> None:
    async def run() -> None:
        theirs = tmp_path / "theirs"
        info = told("Anna's Air", home=credentials(theirs).home)
        async with telling(info, advert=info, of=theirs) as port:
            stranger = (await find(SECONDS)).nodes
            at = f"127.0.0.1:{port}"
            by_hand = (await find(SECONDS, bonjour=False, by_hand=[at])).nodes
            pair(tandem_home, theirs)
            paired = (await find(SECONDS)).nodes
            asked = (await find(SECONDS, bonjour=False, by_hand=[at])).nodes
        how = "not paired with this machine: coordinator pair"
        assert [(node.name, node.info, node.problem) for node in stranger] == [
            ("Anna's Air", None, f"{how} 'Anna'\"'\"'s Air'")
        ]
        assert [(node.name, node.info, node.problem) for node in by_hand] == [(at, None, f"{how} {at}")]
        for nodes in (paired, asked):
            assert [(node.info, node.problem) for node in nodes] == [(info, "")]
            assert nodes[0].certificate == credentials(theirs).certificate

    asyncio.run(run())


def test_other_fleets_are_passed_over(bonjour: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        info = told("Studio")
        async with telling(info, advert=info):
            monkeypatch.setenv("TANDEM_FLEET", "another-fleet")
            got = await find(1.2)
        assert got.nodes == ()

    asyncio.run(run())


def test_two_of_one_name_are_both_listed(bonjour: None) -> None:
    async def run() -> None:
        one, two = told("Studio", id="a"), told("Studio", id="b")
        async with telling(one, advert=one), telling(two, advert=two):
            got = await find(SECONDS)
        assert [(node.id, node.label) for node in got.nodes] == [("a", "Studio"), ("b", "Studio (2)")]

    asyncio.run(run())


def test_one_node_found_in_two_ways_is_one(bonjour: None) -> None:
    async def run() -> None:
        info = told("Studio")
        async with telling(info, advert=info) as port:
            got = await find(SECONDS, by_hand=[f"localhost:{port}"], own={info.id: f"127.0.0.1:{port}"})
        (node,) = got.nodes
        assert (node.own, node.by_hand, node.problem) == (True, f"localhost:{port}", "")

    asyncio.run(run())


def test_another_protocol_is_not_called(bonjour: None) -> None:
    async def run() -> None:
        info = told("Studio")
        async with telling(info, advert=replace(info, protocol=PROTOCOL + 1, version="9.0")):
            got = await find(SECONDS)
        (node,) = got.nodes
        assert node.info is None
        assert "runs mlx-tandem 9.0, too new" in node.problem
        assert "pip install 'mlx-tandem==9.0'" in node.problem

    asyncio.run(run())


def test_an_advert_without_a_node_is_listed_as_silent(bonjour: None) -> None:
    async def run() -> None:
        advert = Advert()
        await advert.start(told("Gone"), free_port())
        try:
            got = await find(SECONDS)
        finally:
            await advert.stop()
        assert [(node.name, node.problem) for node in got.nodes] == [("Gone", SILENT)]

    asyncio.run(run())


def test_a_stranger_at_the_address_is_not_taken_for_the_node(bonjour: None) -> None:
    async def run() -> None:
        info = told("Studio")
        async with telling(told("Stranger"), advert=info):
            got = await find(SECONDS)
        assert [(node.name, node.problem) for node in got.nodes] == [("Studio", SILENT)]

    asyncio.run(run())


def test_who_leaves_while_listed_went_away(bonjour: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The look goes on until the farewell has been heard.
    monkeypatch.setattr(discovery, "QUIET_SECONDS", 3.0)

    async def run() -> None:
        info = told("Studio")
        answered = asyncio.Event()
        note = discovery._Search._note

        def noted(self: discovery._Search, address: str, said: NodeInfo, by_hand: str = "") -> None:
            note(self, address, said, by_hand)
            answered.set()

        monkeypatch.setattr(discovery._Search, "_note", noted)
        async with telling(info, advert=info):
            looking = asyncio.create_task(find(SECONDS))
            await asyncio.wait_for(answered.wait(), SECONDS)
        assert [(node.name, node.problem) for node in (await looking).nodes] == [("Studio", WENT_AWAY)]

    asyncio.run(run())


def answered_and_advertised(info: NodeInfo, address: str, *hosts: str) -> discovery._Search:
    """A look at which this node has answered, and somebody advertises its id with these hosts."""
    search = discovery._Search({}, Peers(home()), credentials(home()))
    search._note(address, info)
    told_of = SeenNode("X", info.id, info.home, f"{hosts[0]}:1", None, SILENT, pairing_port=7, hosts=hosts)
    task: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    search.adverts["X"] = discovery._Advert(task, told_of)  # type: ignore[arg-type]
    return search


def test_only_the_node_itself_can_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "FAREWELL_SECONDS", 0.01)
    monkeypatch.setattr(discovery, "AGAIN_SECONDS", SECONDS)
    removed: Any = (None, "", "X", ServiceStateChange.Removed)

    async def run() -> None:
        info = told("Studio")
        async with telling(info) as port:
            search = answered_and_advertised(info, f"127.0.0.1:{port}", "10.0.0.9")
            search._on_change(*removed)
            await search.run(SECONDS, 0)
            assert [node.problem for node in search.found().nodes] == [""], "anybody can say that it leaves"

            late = answered_and_advertised(info, f"127.0.0.1:{port}", "10.0.0.9")
            late.gone.add(info.id)
            late._note(f"127.0.0.1:{port}", info)
            await late.run(SECONDS, 0)
            assert [node.problem for node in late.found().nodes] == [""], "it has answered since"
        search._on_change(*removed)
        await search.run(SECONDS, 0)
        assert [node.problem for node in search.found().nodes] == [WENT_AWAY]

    asyncio.run(run())


def test_an_advert_with_the_id_of_another_changes_nothing() -> None:
    async def run() -> None:
        info = told("Studio")
        for hosts, wanted in (
            (["10.0.0.9"], (0, ())),
            (["10.0.0.1"], (7, ("10.0.0.1",))),
            (["10.0.0.9", "10.0.0.1"], (7, ("10.0.0.1",))),
        ):
            (node,) = answered_and_advertised(info, "10.0.0.1:5", *hosts).found().nodes
            assert (node.pairing_port, node.hosts) == wanted
            assert (node.info, node.problem) == (info, "")

    asyncio.run(run())


# --- without Bonjour ------------------------------------------------------------------------------------------------


def test_switched_off_is_said() -> None:
    got = asyncio.run(find(SECONDS))
    assert got.nodes == ()
    assert got.trouble == "Bonjour is switched off here (TANDEM_BONJOUR=off)"
    assert "TANDEM_BONJOUR=off). To mend it: run `node serve` on the other Mac" in closing_line(got, 0)


def test_addresses_by_hand_are_remembered_and_work_by_name(tandem_home: Path) -> None:
    async def run() -> None:
        async with telling(told("Studio")) as port:
            by_hand = await select(f"localhost:{port}", ours=FACTS)
            assert [node.address for node in by_hand.nodes] == [f"127.0.0.1:{port}"]
            (kept,) = json.loads((tandem_home / "addresses.json").read_text())
            assert (kept["address"], kept["id"], kept["name"]) == (f"localhost:{port}", "id-Studio", "Studio")
            for wanted in ("auto", "studio", "id-Studio", "auto,Studio"):
                assert [node.name for node in (await select(wanted, ours=FACTS)).nodes] == ["Studio"], wanted
            assert (await select("local", ours=FACTS)).nodes == ()
        assert (await select("auto", ours=FACTS)).nodes == ()  # not there now: no mistake

    asyncio.run(run())


def test_ipv6_by_hand() -> None:
    async def run() -> None:
        try:
            async with telling(told("Studio"), host="[::1]") as port:
                assert [node.address for node in (await select(f"[::1]:{port}", ours=FACTS)).nodes] == [f"[::1]:{port}"]
        except RuntimeError:
            pytest.skip("no IPv6 here")

    asyncio.run(run())


def test_nobody_at_an_address_is_a_mistake() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"--nodes {address}: nobody answers there; run `node serve` there"):
        asyncio.run(select(address, ours=FACTS))


def test_no_such_host_is_a_mistake() -> None:
    with pytest.raises(UserError, match="nobody answers there"):
        asyncio.run(select("no-such-host.invalid:1", ours=FACTS))


def test_another_protocol_by_hand_is_left_out() -> None:
    async def run() -> None:
        async with telling(told("Studio", protocol=PROTOCOL + 1)) as port:
            got = await select(f"127.0.0.1:{port}", ours=FACTS)
        assert got.nodes == ()
        assert "another version of the protocol; install the same version" in got.left_out[0].reason

    asyncio.run(run())


def test_who_cannot_train_is_left_out_with_the_reason() -> None:
    cases = {
        "Pause": ({"paused": True}, "its owner has paused it; `node resume` there ends that"),
        "Files": ({"takes_jobs": False}, "it only gives files"),
        "Used": ({"waits_for": "somebody is at the keyboard"}, "somebody is at the keyboard"),
        "Old": (
            {"facts": replace(FACTS, mlx_lm="0.31.0")},
            "it has mlx-lm 0.31.0, here is 0.32.2; on Old: pip install 'mlx-lm==0.32.2'",
        ),
        "Busy": ({"busy": Busy("run1", "anna on Mini", NOON)}, ""),
    }

    async def run() -> None:
        for name, (changes, reason) in cases.items():
            async with telling(told(name, **changes)) as port:
                got = await select(f"127.0.0.1:{port}", ours=FACTS)
            assert [tuple(left) for left in got.left_out] == ([(name, reason)] if reason else []), name
            assert [node.name for node in got.nodes] == ([] if reason else [name])

    asyncio.run(run())


def test_own_nodes_train_without_this_machine_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def names(wanted: str, *, local: bool) -> tuple[list[str], tuple[str, ...], str]:
        got = await select(wanted, local=local, ours=FACTS)
        assert got.left_out == ()
        return [node.name for node in got.nodes], got.not_local, got.giver.name if got.giver is not None else ""

    async def run() -> None:
        one, two, other = told("Amber"), told("Birch"), told("Mini")
        async with telling(one) as port, telling(two) as second, telling(other) as third:
            serving = [SimpleNamespace(id=one.id, address=f"127.0.0.1:{port}")]
            serving.append(SimpleNamespace(id=two.id, address=f"127.0.0.1:{second}"))
            monkeypatch.setattr(discovery, "running_nodes", lambda home: serving)
            mini = f"127.0.0.1:{third}"
            assert await names("Birch", local=False) == (["Birch"], (), "Birch")
            assert await names("Amber,Birch", local=False) == (["Amber", "Birch"], (), "Amber")
            assert await names(f"127.0.0.1:{second}", local=False) == (["Birch"], (), "Birch")
            assert await names(f"auto,{mini}", local=False) == (["Mini"], ("Amber", "Birch"), "Amber")
            assert await names("auto,birch", local=False) == (["Birch", "Mini"], ("Amber",), "Amber")
            assert await names(mini, local=False) == (["Mini"], (), "Amber"), "nobody asked for the others"
            assert await names(mini, local=True) == (["Amber", "Mini"], (), "Amber")

    asyncio.run(run())


# --- what --nodes means ---------------------------------------------------------------------------------------------


def test_wanted_is_taken_apart() -> None:
    wanted = parse_wanted("auto, Studio,10.0.0.1:5 ,local,[fe80::1]:7,host.local:9,Studio")
    assert (wanted.auto, wanted.local, wanted.names) == (True, True, ("Studio",))
    assert wanted.addresses == ("10.0.0.1:5", "[fe80::1]:7", "host.local:9")
    assert not parse_wanted("local,10.0.0.1:5").searches


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" , ", "name auto, local"),
        ("10.0.0.1", "give the port, too, as 10.0.0.1:PORT"),
        ("fe80::1", r"as \[fe80::1\]:PORT"),
        ("[fe80::1]", r"as \[fe80::1\]:PORT"),
        ("studio:0", "0 is no port"),
        ("studio:65536", "65536 is no port"),
        ("[studio]:5", "studio is no IPv6 address"),
    ],
)
def test_what_cannot_be_wanted_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_wanted(text)


def test_names_are_no_addresses() -> None:
    assert split_address("Anna's Studio") is None
    assert split_address("Studio (2)") is None
    assert split_address("studio:4000") == ("studio", 4000)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"Studoi: no node .* did you mean Studio\? \(found: Mini, Studio; looked 1.0 s\)"
    ):
        choose(parse_wanted("Studoi"), found(seen("Mini"), seen("Studio")))
    with pytest.raises(UserError, match="none was found; run `node serve`"):
        choose(parse_wanted("Studio"), found())


def test_a_name_that_fits_two_is_a_mistake_that_a_label_or_id_mends() -> None:
    one = replace(seen("Studio", id="a"), address="10.0.0.1:1")
    two = replace(seen("Studio", id="b"), address="10.0.0.2:2", label="Studio (2)")
    with pytest.raises(
        UserError, match=r"2 nodes .* Studio at 10.0.0.1:1 \(id a\), Studio \(2\) at 10.0.0.2:2 \(id b\)"
    ):
        choose(parse_wanted("Studio"), found(one, two))
    assert choose(parse_wanted("Studio (2)"), found(one, two)) == (two,)
    assert choose(parse_wanted("a"), found(one, two)) == (one,)


def test_a_stranger_cannot_take_the_name_of_a_paired_node() -> None:
    paired = replace(seen("Studio", since=2000), certificate=b"pem")
    stranger = replace(seen("Studio", since=1), id="0" * 16, home="1" * 16, info=None, problem="is not paired")
    in_order = sorted([stranger, paired], key=discovery._in_order)
    found = Found(discovery._labelled(in_order), 1.0, "")
    assert [(one.label, one.certificate) for one in found.nodes] == [("Studio", b"pem"), ("Studio (2)", None)]
    assert [one.id for one in choose(parse_wanted("Studio"), found)] == [paired.id]


def test_who_has_served_longest_keeps_the_name_and_every_look_finds_the_same() -> None:
    def looked(*infos: NodeInfo) -> list[tuple[str, str]]:
        search = discovery._Search({}, Peers(home()), credentials(home()))
        for info in infos:
            search._note("10.0.0.1:1", info)
        return [(node.label, node.id) for node in search.found().nodes]

    first, second, third = (told("aa", id=name, since=since) for name, since in (("z", 100), ("b", 200), ("c", 200)))
    unknown = told("aa", id="a")  # of a version that does not say
    wanted = [("aa", "z"), ("aa (2)", "b"), ("aa (3)", "c"), ("aa (4)", "a")]
    for order in itertools.permutations((first, second, third, unknown)):
        assert looked(*order) == wanted
    other = told("aa (2)", id="x", since=300)
    assert looked(first, second, other) == [("aa", "z"), ("aa (3)", "b"), ("aa (2)", "x")], "no label means two"


def test_a_name_that_a_node_may_have_is_one_for_nodes() -> None:
    for name in ("Studio", "Anna's Studio", "a:b", "aa (2)", "10.0.0", "::x", "x:", "auto 2"):
        assert name_problem(name) == "", name
        assert parse_wanted(f"Mini,{name}").names == ("Mini", name)
    refused = ("a,b", "local", "auto", "x:50", "[::1]:5", "10.0.0.1", "fe80::1", "", " ", " a", "a ", "a\tb", "x" * 61)
    for name in refused:
        assert name_problem(name), name


def test_a_machines_own_name_is_made_one_for_nodes() -> None:
    assert usable_name("Anna's Mac, old\t") == "Anna's Mac old"
    assert usable_name("x" * 80) == "x" * 60
    for name in (None, "", " , ", "auto", "10.0.0.1"):
        assert usable_name(name) == "mac"


def test_the_own_node_is_always_among_them_and_never_twice() -> None:
    own, other = replace(seen("Here"), own=True), seen("There")
    assert choose(parse_wanted("There"), found(own, other)) == (own, other)
    assert choose(parse_wanted("local"), found(own, other)) == (own,)
    assert choose(parse_wanted("auto,Here,There"), found(own, other)) == (own, other)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({}, ""),
        ({"mlx": "0.32.9"}, ""),
        ({"mlx": "0.33.0"}, "it has mlx 0.33.0, here is 0.32.4; on Studio: pip install 'mlx==0.32.4'"),
        ({"mlx": None}, "it has no mlx; on Studio: pip install 'mlx==0.32.4'"),
        ({"mlx_lm": "0.32.3"}, "it has mlx-lm 0.32.3, here is 0.32.2; on Studio: pip install 'mlx-lm==0.32.2'"),
        ({"mlx_lm": None}, "it has no mlx-lm; on Studio: pip install 'mlx-lm==0.32.2'"),
    ],
)
def test_versions_must_match(theirs: dict[str, str | None], said: str) -> None:
    assert mismatch(FACTS, told("Studio", facts=replace(FACTS, **theirs))) == said  # type: ignore[arg-type]


def test_what_is_unknown_here_is_not_compared() -> None:
    assert mismatch(replace(FACTS, mlx=None, mlx_lm=None), told("Studio")) == ""


def test_an_older_protocol_is_mended_there() -> None:
    assert protocol_problem("Studio", "0.0.1", PROTOCOL) == ""
    for protocol in (0, None):
        assert "0.0.1, too old" in protocol_problem("Studio", "0.0.1", protocol)
        assert "; on Studio: pip install 'mlx-tandem==" in protocol_problem("Studio", "0.0.1", protocol)


# --- what is remembered ---------------------------------------------------------------------------------------------


def test_only_the_latest_are_remembered_each_fleet_its_own(tmp_path: Path) -> None:
    addresses.remember(tmp_path, [Remembered(f"h:{n}", "id", "n", "a", float(n)) for n in range(1, MOST + 2)])
    addresses.remember(tmp_path, [Remembered("h:5", "id", "new name", "a", 1000.0)])
    kept = addresses.load(tmp_path, "a")
    assert len(kept) == MOST
    assert (kept[0].address, kept[0].name) == ("h:5", "new name")
    assert "h:1" not in {known.address for known in kept}
    assert addresses.load(tmp_path, "b") == ()


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[1]", '[{"address": "x"}]', '"text"'])
def test_a_file_that_cannot_be_read_is_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "addresses.json").write_text(content)
    assert addresses.load(tmp_path, "") == ()


# --- what is shown --------------------------------------------------------------------------------------------------


def test_a_row_tells_all() -> None:
    assert table_row(replace(seen("Studio"), own=True), FACTS, NOON) == (
        "Studio (here)",
        "Apple M2 Max",
        "64 GB (51 free)",
        "macOS 26.2",
        "0.32.4",
        "0.32.2",
        "0.25",
        "unknown",
        "10.0.0.1:6",
        "",
        "free",
    )
    paired = replace(seen("Studio"), certificate=credentials(home()).certificate)
    mark = fingerprint(credentials(home()).certificate)
    assert table_row(paired, FACTS, NOON)[-2] == f"{mark[:4]} {mark[4:8]} {mark[8:12]}"
    assert as_data(found(paired), [paired], FACTS, NOON)["nodes"][0]["fingerprint"] == mark


def test_unknown_is_never_a_number() -> None:
    bare = replace(FACTS, chip=None, total_memory_bytes=None, free_memory_bytes=None, os=None, mlx=None, mlx_lm=None)
    node = seen("Studio", facts=bare, load=-1.0)
    row = table_row(node, replace(FACTS, mlx=None, mlx_lm=None), NOON)
    assert row[1:8] == (UNKNOWN, "unknown (unknown free)", UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
    silent = replace(node, info=None, problem=SILENT)
    assert table_row(silent, FACTS, NOON)[1:8] == (UNKNOWN,) * 7
    data = as_data(found(node), [node], FACTS, NOON)["nodes"][0]
    assert data["info"]["load"] is None
    assert data["info"]["facts"]["chip"] is None
    assert data["info"]["on_battery"] is data["info"]["memory_pressure"] is data["info"]["thermal_pressure"] is None


@pytest.mark.parametrize(
    ("changes", "cell", "data"),
    [
        ({"on_battery": "no"}, "mains", (False, None, None)),
        ({"on_battery": "yes", "memory_pressure": "normal"}, "battery", (True, "normal", None)),
        (
            {"on_battery": "yes", "memory_pressure": "warn", "thermal_pressure": "serious"},
            "battery, memory yellow, hot",
            (True, "warn", "serious"),
        ),
        (
            {"thermal_pressure": "nominal", "memory_pressure": "critical"},
            "unknown, memory red",
            (None, "critical", "nominal"),
        ),
    ],
)
def test_power_and_pressure_are_shown(changes: dict[str, str], cell: str, data: tuple[object, ...]) -> None:
    node = seen("Air", **changes)
    assert table_row(node, FACTS, NOON)[COLUMNS.index("power")] == cell
    info = as_data(found(node), [node], FACTS, NOON)["nodes"][0]["info"]
    assert (info["on_battery"], info["memory_pressure"], info["thermal_pressure"]) == data


def test_states() -> None:
    busy = seen("Studio", busy=Busy("run7", "anna on Mini", NOON))
    assert state_text(busy, FACTS, NOON + 60).startswith("training run7 for anna on Mini since ")
    assert len(state_text(busy, FACTS, NOON + 1e6)) > len(state_text(busy, FACTS, NOON + 60))
    assert state_text(seen("Studio", paused=True), FACTS, NOON) == "paused"
    assert state_text(replace(seen("Studio"), problem=WENT_AWAY), FACTS, NOON) == WENT_AWAY


@pytest.mark.parametrize("colours", ["", "1"])
def test_no_line_of_the_table_ends_in_blanks(
    colours: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", colours)
    monkeypatch.setenv("COLUMNS", "200")
    nodes = [seen("Studio"), seen("Mini", paused=True)]
    print_table(found(*nodes), nodes, FACTS)
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[-1] for line in lines] == ["state", "free", "paused", "s"]
    assert [line for line in lines if line != line.rstrip()] == []


def test_a_name_cannot_command_the_terminal() -> None:
    node = seen("Stu\x1b[2Jdio")
    assert "\x1b" not in table_row(node, FACTS, NOON)[0]


def test_the_last_line() -> None:
    assert closing_line(found(seen("A")), 1) == "1 node, looked 1.0 s"
    assert closing_line(found(trouble="Bonjour is off"), 2) == (
        "2 nodes, looked 1.0 s; Bonjour is off: only known addresses were asked"
    )
