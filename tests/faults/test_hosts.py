"""Faults of the network, between hosts of their own: a cable that is pulled, and put back; packets late and lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.specs import MOST_REPLAYED_STEPS
from tests.faults.harness import Fault, Inputs, Outcome, arguments, end, faulty, make_inputs
from tests.fixtures.hosts import Host, hosts, hosts_available, switch_available
from tests.fixtures.nodes import ServingNode
from tests.fixtures.runs import Run
from tests.fixtures.switch import Switch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(hosts_available() is not None, reason=str(hosts_available())),
]
NAMES = ("anna", "ben", "cleo")
ITERS = 400
BAD_ITERS = 60
DELAY_SECONDS = 0.2
LOSS = 0.05


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), iters=ITERS)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("few"), iters=BAD_ITERS)


def _command(
    inputs: Inputs, adapter: Path, nodes: dict[str, ServingNode], at: dict[str, Host], iters: int = ITERS
) -> list[str]:
    command = arguments(inputs, adapter, list(nodes.values()), iters=iters)
    addresses = ",".join(f"{at[name].address}:{node.port}" for name, node in nodes.items())
    command[command.index("--nodes") + 1] = addresses
    return command


@pytest.mark.parametrize("heals", [False, True], ids=["for good", "and put back"])
def test_a_cable_is_pulled(inputs: Inputs, tmp_path: Path, heals: bool) -> None:
    with hosts(4) as (here, *others):
        at = dict(zip(NAMES, others, strict=True))
        prefixes = {name: host.prefix for name, host in at.items()}
        with faulty(tmp_path, {name: [] for name in NAMES}, prefixes) as nodes:
            adapter = tmp_path / "adapters"
            run = Run(*_command(inputs, adapter, nodes, at), environment={"TANDEM_BONJOUR": "off"}, prefix=here.prefix)
            run.until_step(23)
            at["ben"].cut()
            run.until(lambda event: event.get("kind") == "restarted")
            if heals:
                at["ben"].join()
                run.until(lambda event: event.get("kind") == "generation" and "ben joins" in event.get("message", ""))
            outcome = end(run, adapter)
        outcome.check(inputs)
        assert "ben" in outcome.repairs[0]["message"]
        assert outcome.nodes()[-1] == (3 if heals else 2)


def test_the_coordinator_is_cut_off_and_comes_back(inputs: Inputs, tmp_path: Path) -> None:
    """All nodes are gone at once; they come back, and the run goes on from the last copy at the latest."""
    with hosts(3) as (here, *others):
        at = dict(zip(NAMES[:2], others, strict=True))
        prefixes = {name: host.prefix for name, host in at.items()}
        with faulty(tmp_path, {name: [] for name in at}, prefixes) as nodes:
            adapter = tmp_path / "adapters"
            run = Run(*_command(inputs, adapter, nodes, at), environment={"TANDEM_BONJOUR": "off"}, prefix=here.prefix)
            run.until_step(53)
            here.cut()
            run.until(lambda event: event.get("kind") == "worker_lost")
            here.join()
            outcome = end(run, adapter)
        outcome.check(inputs, replayed=MOST_REPLAYED_STEPS)


needs_switch = pytest.mark.skipif(switch_available() is not None, reason=str(switch_available()))


@needs_switch
def test_packets_come_late_or_not_at_all_for_a_while(few: Inputs, tmp_path: Path) -> None:
    """200 ms each way and one packet of twenty lost: slow, but nobody is taken for frozen again and again."""
    outcome = _over_a_bad_network(few, tmp_path, {"anna": [], "ben": []}, 13, 25)
    outcome.check(few)
    assert len(outcome.repairs) <= 2, outcome.repairs


@needs_switch
def test_one_is_lost_while_packets_are(few: Inputs, tmp_path: Path) -> None:
    outcome = _over_a_bad_network(
        few, tmp_path, {"anna": [], "ben": [{"step": 16, "do": "kill host"}], "cleo": []}, 13, 20
    )
    outcome.check(few)
    assert any("ben" in repair["message"] for repair in outcome.repairs)


def _over_a_bad_network(inputs: Inputs, folder: Path, faults: dict[str, list[Fault]], first: int, last: int) -> Outcome:
    """A run on nodes with these faults, whose network is bad from one step to another."""
    switch = Switch()
    with hosts(1 + len(faults), switch=switch) as (here, *others):
        at = dict(zip(faults, others, strict=True))
        with faulty(folder, faults, {name: host.prefix for name, host in at.items()}) as nodes:
            command = _command(inputs, folder / "adapters", nodes, at, BAD_ITERS)
            run = Run(*command, environment={"TANDEM_BONJOUR": "off"}, prefix=here.prefix)
            run.until_step(first)
            switch.conditions(delay_seconds=DELAY_SECONDS, loss=LOSS)
            run.until_step(last)
            switch.conditions()
            return end(run, folder / "adapters")
