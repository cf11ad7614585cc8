"""What is decided before machines are asked: are there enough of them?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator import fleet
from coordinator.config import TrainConfig
from coordinator.discovery import LeftOut, SeenNode, Selection
from coordinator.links import Paths
from coordinator.recruits import NotWorth
from coordinator.stream import Noted, RunEvent
from node.errors import NodeError, TandemError, TooFewNodes
from node.info import NodeInfo
from tests.fixtures.told import told


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def handle(self, event: RunEvent) -> None:
        if isinstance(event, Noted):
            self.messages.append(event.message)

    def close(self) -> None:
        """Nothing is open."""


def seen(name: str, *, own: bool = False) -> SeenNode:
    info = told(name)
    return SeenNode(name, info.id, info.home, "10.0.0.1:1", info, "", own=own, label=name)


def look(
    monkeypatch: pytest.MonkeyPatch,
    nodes: tuple[SeenNode, ...],
    left_out: tuple[LeftOut, ...] = (),
    heard: Heard | None = None,
    **options: object,
) -> Selection | None:
    """What comes of looking, when these are there."""

    async def select(wanted: str, *, local: bool) -> Selection:
        not_local = [node.label for node in nodes if node.own and not local]
        chosen = tuple(node for node in nodes if node.label not in not_local)
        return Selection(chosen, left_out, 1.0, not_local=tuple(not_local))

    monkeypatch.setattr(fleet, "select", select)
    monkeypatch.setattr(fleet, "running_nodes", lambda home: [node for node in nodes if node.own])
    config = TrainConfig(model="m", **options)  # type: ignore[arg-type]
    return asyncio.run(fleet._look(config, heard or Heard(), plan_only=False))


PAUSED = LeftOut("Air", "paused")


@pytest.mark.parametrize(
    ("nodes", "left_out", "options", "said"),
    [
        ((), (), {}, "1 of --min-nodes 9 machines is there (looked 1.0 s): no other was found"),
        ((seen("Own", own=True),), (), {}, "1 of --min-nodes 9 machines is there (looked 1.0 s): no other was found"),
        ((seen("Mini"),), (PAUSED,), {}, "2 of --min-nodes 9 machines are there (looked 1.0 s): Air: paused"),
        ((seen("Mini"),), (), {"local": False}, "1 of --min-nodes 9 machines is there (looked 1.0 s): no other"),
        ((), (), {"local": False}, "0 of --min-nodes 9 machines are there (looked 1.0 s): no other was found"),
        (
            (seen("Own", own=True),),
            (PAUSED,),
            {"local": False},
            (
                "0 of --min-nodes 9 machines are there (looked 1.0 s): Air: paused; Own: it is on this machine, which"
                " --no-local leaves out"
            ),
        ),
    ],
)
def test_too_few_are_said_before_anything_is_sent(
    nodes: tuple[SeenNode, ...],
    left_out: tuple[LeftOut, ...],
    options: dict[str, object],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(TooFewNodes) as raised:
        look(monkeypatch, nodes, left_out, heard := Heard(), min_nodes=9, **options)
    assert str(raised.value).startswith(said)
    assert heard.messages == [], "who is missing is said once, in the error"


def test_enough_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(monkeypatch, (seen("Mini"),), min_nodes=2) is not None
    assert look(monkeypatch, (seen("Own", own=True), seen("Mini")), min_nodes=2) is not None
    assert look(monkeypatch, (), min_nodes=1) is None, "this machine alone"
    assert look(monkeypatch, (seen("Own", own=True), seen("Mini")), heard=(heard := Heard()), local=False) is not None
    assert heard.messages[0].startswith("Own is left out: it is on this machine, which --no-local leaves out")


def test_a_reason_never_lacks() -> None:
    async def drop() -> None:
        ahead: Any = SimpleNamespace(config=TrainConfig(model="m", min_nodes=9))
        await fleet.Fleet(ahead, Selection((), (), 1.0), Heard(), asyncio.Event())._drop_problems()

    with pytest.raises(TandemError, match=r"^0 of --min-nodes 9 machines can take part: no other was found$"):
        asyncio.run(drop())


def test_machines_come_together_before_the_data_is_read(monkeypatch: pytest.MonkeyPatch, tandem_home: Path) -> None:
    done: list[str] = []

    async def begin_and_close() -> None:
        ahead: Any = SimpleNamespace(config=TrainConfig(model="m"), job="job")
        air = fleet.Fleet(ahead, Selection((), (), 1.0), Heard(), asyncio.Event())
        reached, left = asyncio.Event(), asyncio.Event()

        def noting(name: str) -> Callable[..., Awaitable[None]]:
            async def note(*_: object) -> None:
                done.append(name)

            return note

        async def hang() -> None:
            reached.set()
            try:
                await asyncio.Event().wait()
            finally:
                left.set()

        for name in ("_meet", "_check_memory", "_reserve", "_bring_the_model"):
            monkeypatch.setattr(air, name, noting(name))
        monkeypatch.setattr(air, "_measure_links", hang)
        air.begin()
        await reached.wait()
        # The data turns out to be broken.
        await air.close()
        assert left.is_set()

    asyncio.run(asyncio.wait_for(begin_and_close(), 30))
    assert done == ["_meet", "_check_memory", "_reserve", "_bring_the_model"]


@pytest.mark.parametrize("own", [True, False])
def test_links_are_measured_once_and_not_of_a_machine_that_reads_the_data(
    own: bool, monkeypatch: pytest.MonkeyPatch, tandem_home: Path
) -> None:
    done: list[str] = []

    def noting(name: str) -> Callable[..., Awaitable[None]]:
        async def note(*_: object) -> None:
            done.append(name)

        return note

    async def measure(*_: object) -> Paths:
        done.append("links")
        return Paths({}, {})

    def planned(*_: object, **__: object) -> None:
        raise TandemError("enough is known")

    async def assemble() -> None:
        ahead: Any = SimpleNamespace(config=TrainConfig(model="m"), job="job")
        air = fleet.Fleet(ahead, Selection((), (), 1.0), Heard(), asyncio.Event())
        wanted: Any = SimpleNamespace(train=SimpleNamespace(longest=9))
        air.want(wanted)
        for name in ("_meet", "_reserve", "_bring_the_model", "_check_memory", "_load", "_probe"):
            monkeypatch.setattr(air, name, noting(name))
        for name in ("_largest", "_candidate", "_facts"):
            monkeypatch.setattr(air, name, lambda *_: None)
        monkeypatch.setattr(fleet, "measure_links", measure)
        monkeypatch.setattr(fleet, "plan", planned)
        machines: Any = [SimpleNamespace(seen=seen("mini", own=own), client=None, info=told("mini"), link=None)]
        air._nodes = machines
        monkeypatch.setattr(air, "_certificates", dict)
        air.begin()
        assert air._coming is not None
        await air._coming
        done.append("data")
        with pytest.raises(TandemError, match="enough is known"):
            await air.assemble()
        air._nodes = []
        await air.close()

    asyncio.run(assemble())
    assert done.count("links") == 1
    assert (done.index("links") > done.index("data")) == own


def test_a_fleet_that_is_let_go_reads_the_model_no_further(monkeypatch: pytest.MonkeyPatch, tandem_home: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def manifest_of(*given: Any, **_: object) -> None:
        try:
            while True:
                given[4](0, 1)
                begun.set()
        finally:
            ended.set()

    async def begin_and_close() -> None:
        model: Any = SimpleNamespace(name="m", revision=None, path=tandem_home)
        ahead = fleet.Ahead(TrainConfig(model="m"), model, "job")
        air = fleet.Fleet(ahead, Selection((), (), 1.0), Heard(), asyncio.Event())

        async def nothing(*_: object) -> None:
            pass

        for name in ("_meet", "_check_memory", "_reserve"):
            monkeypatch.setattr(air, name, nothing)
        monkeypatch.setattr(fleet, "manifest_of", manifest_of)
        air.begin()
        await asyncio.to_thread(begun.wait, 30)
        await air.close()
        assert await asyncio.to_thread(ended.wait, 30)

    asyncio.run(begin_and_close())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotWorth("Air stays out: slower than it is worth"), "Air stays out: slower than it is worth"),
        (NodeError("the model does not load"), "Air cannot take part yet: the model does not load"),
    ],
)
def test_who_is_being_prepared_is_told_of_again(
    error: TandemError, said: str, monkeypatch: pytest.MonkeyPatch, tandem_home: Path
) -> None:
    class Client:
        def __init__(self, *_: object) -> None:
            """Of nobody."""

        async def describe(self) -> NodeInfo:
            return told("Air")

        async def open_worker(self, *_: object) -> None:
            """There is nothing to speak to."""

        async def close(self) -> None:
            """Nothing is open."""

    async def nothing(*_: object) -> None:
        """Goes well."""

    async def fail(*_: object) -> None:
        raise error

    async def prepare() -> None:
        ahead: Any = SimpleNamespace(config=TrainConfig(model="m"), job="job")
        air = fleet.Fleet(ahead, Selection((), (), 1.0), heard, asyncio.Event())
        for name in ("_check_paired", "_check_worth"):
            monkeypatch.setattr(air, name, lambda *_: None)
        for name in ("_be_ready_for", "_send_model", "_load_on", "_probe_on"):
            monkeypatch.setattr(air, name, nothing)
        monkeypatch.setattr(air, "_weigh", fail)
        await air._prepare(seen("Air"))

    heard = Heard()
    monkeypatch.setattr(fleet, "NodeClient", Client)
    monkeypatch.setattr(fleet, "unusable", lambda *_: "")
    with pytest.raises(type(error)):
        asyncio.run(prepare())
    assert heard.messages == ["preparing Air to take part", said]
