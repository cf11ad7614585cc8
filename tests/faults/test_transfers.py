"""Bytes that change on their way: what they belong to is noticed by its digest, and sent again."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.specs import MOST_REPLAYED_STEPS
from tests.faults.harness import Fault, Inputs, arguments, end, faulty, make_inputs, run_through
from tests.fixtures.bending import BendingProxy, Direction
from tests.fixtures.runs import Run, notes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ITERS = 400
FEW = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), iters=ITERS)


@pytest.mark.parametrize(("direction", "bent"), [("to the node", "ben"), ("from the node", "anna")])
def test_a_state_is_damaged_on_its_way(inputs: Inputs, tmp_path: Path, direction: Direction, bent: str) -> None:
    """ben is lost and comes back: it is given the state that anna has."""
    faults: dict[str, list[Fault]] = {"anna": [], "ben": [{"step": 23, "do": "kill worker"}]}
    with faulty(tmp_path, faults) as nodes, BendingProxy(nodes[bent].port) as proxy:
        adapter = tmp_path / "adapters"
        command = arguments(inputs, adapter, list(nodes.values()), iters=ITERS)
        through = {**{name: node.address for name, node in nodes.items()}, bent: proxy.address}
        command[command.index("--nodes") + 1] = ",".join(through.values())
        run = Run(*command)
        run.until(lambda event: event.get("kind") == "restarted")
        proxy.bend(direction)
        run.until(lambda event: proxy.bent.is_set() and event.get("kind") == "restarted")
        outcome = end(run, adapter)
    # TLS takes a connection with a bent byte for broken: whose it is is lost as well, and the run goes on.
    # anna was the last who had the newest state.
    outcome.check(inputs, replayed=0 if bent == "ben" else MOST_REPLAYED_STEPS)
    assert len(outcome.repairs) == 2


def test_a_model_is_damaged_on_its_way(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs", iters=FEW)
    outcome = run_through(inputs, tmp_path, {"anna": [], "ben": [{"at": "model", "do": "bend"}]}, iters=FEW)
    outcome.check(inputs)
    assert (tmp_path / "faults-ben" / "0").exists(), "nothing was changed"
    assert not notes(outcome.folder, "left_out")
    assert outcome.nodes() == [2] * FEW
