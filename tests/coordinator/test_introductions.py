"""Which machines of a job are made known to which, and what becomes of one that is unpaired: no network."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.config import TrainConfig
from coordinator.discovery import SeenNode, Selection
from coordinator.fleet import Fleet
from coordinator.workers import Quiet
from node.errors import NodeError
from node.identity import credentials
from node.peers import Peers, fingerprint
from tests.fixtures.pairs import pair
from tests.fixtures.told import told


class Told:
    """A node that is told who takes part."""

    def __init__(self) -> None:
        self.known: list[list[bytes]] = []

    async def introduce(self, job: str, certificates: list[bytes], *_: object) -> None:
        # Whoever is told first need not answer first.
        await asyncio.sleep(0.01 if len(self.known) % 2 else 0.0)
        self.known.append(certificates)


class Link:
    """A stream to a worker."""

    job = "job"

    def __init__(self) -> None:
        self.killed = False

    def kill(self) -> None:
        self.killed = True


def machine(name: str, home: Path) -> Any:
    info = told(name, home=credentials(home).home)
    seen = SeenNode(
        name, info.id, info.home, "127.0.0.1:1", info, "", label=name, certificate=credentials(home).certificate
    )
    return SimpleNamespace(seen=seen, info=info, client=Told(), link=Link(), member=None, problem="")


def three_machines(folder: Path, own: Path) -> tuple[list[Path], list[Any]]:
    """Homes that are paired with our own, and the machines."""
    homes = [folder / name for name in ("anna", "ben", "cleo")]
    for home in homes:
        pair(own, home)
    return homes, [machine(home.name, home) for home in homes]


def fleet_of() -> Fleet:
    ahead: Any = SimpleNamespace(config=TrainConfig())
    return Fleet(ahead, Selection((), (), 0.0), Quiet(), asyncio.Event())


def test_all_know_all_also_those_that_are_prepared_at_the_same_time(tmp_path: Path, tandem_home: Path) -> None:
    async def work() -> None:
        homes, (anna, ben, cleo) = three_machines(tmp_path, tandem_home)
        fleet = fleet_of()
        fleet._nodes = [anna]
        fleet._preparing = [ben]
        first = asyncio.create_task(fleet._introduce())
        await asyncio.sleep(0)
        fleet._preparing.append(cleo)
        await asyncio.gather(first, fleet._introduce())
        certificates = [credentials(home).certificate for home in homes]
        for node, own in zip((anna, ben, cleo), certificates, strict=True):
            assert node.client.known[-1] == [other for other in certificates if other != own]
        fleet._nodes, fleet._preparing = [anna], []
        await fleet._introduce()
        assert anna.client.known[-1] == [], "who is gone is known no more"

    asyncio.run(work())


def test_who_is_unpaired_is_cut_off_also_while_it_is_prepared(tmp_path: Path, tandem_home: Path) -> None:
    async def work() -> None:
        homes, (anna, ben, cleo) = three_machines(tmp_path, tandem_home)
        fleet = fleet_of()
        fleet._nodes, fleet._preparing = [anna, ben], [cleo]
        fleet._trust.on_revoked(fleet._cut_off)
        fleet._trust.look()
        fleet._check_paired(cleo.seen)
        ben.link = None  # it stands in line there
        for home in homes[1:]:
            Peers(tandem_home).remove(credentials(home).home)
        fleet._trust.look()
        await asyncio.gather(*fleet._closing)
        assert (anna.link.killed, cleo.link.killed) == (False, True)
        assert (anna.problem, bool(ben.problem), bool(cleo.problem)) == ("", True, True)
        assert anna.client.known == [[], []], "once for each that is gone"
        for node in (ben, cleo):
            with pytest.raises(NodeError, match="paired with this machine no more"):
                fleet._check_paired(node.seen)
        assert fleet._trust.standing(fingerprint(credentials(homes[1]).certificate)) is None

    asyncio.run(work())
