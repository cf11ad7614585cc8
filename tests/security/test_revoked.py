"""Who is trusted no more in the midst of a run: cut off at once, and the run goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.identity import credentials
from node.peers import Peers
from tests.faults.harness import Inputs, arguments, make_inputs
from tests.fixtures.nodes import serving
from tests.fixtures.runs import Run, assert_same_losses, losses, metrics, notes

ITERS = 400

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), ITERS)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["coordinator", "node"])
def test_the_run_goes_on_without_it(inputs: Inputs, tmp_path: Path, tandem_home: Path, who: str) -> None:
    folder = tmp_path / "adapters"
    with serving(tmp_path, "anna", "ben") as nodes:
        ben = nodes[1]
        run = Run(*arguments(inputs, folder, nodes, iters=ITERS))
        run.until_step(20)
        if who == "coordinator":
            Peers(tandem_home).remove(credentials(ben.home.resolve()).home)
        else:
            Peers(ben.home).remove(credentials(tandem_home).home)
        code, errors = run.wait()
    assert code == 0, errors
    assert [step for step, _ in losses(folder)] == list(range(1, ITERS + 1))
    assert_same_losses(losses(folder), inputs.losses, 1e-4)
    nodes_of_steps = [row["nodes"] for row in metrics(folder) if "loss" in row]
    assert (nodes_of_steps[0], nodes_of_steps[-1]) == (2, 1)
    assert bool(notes(folder, "unpaired")) == (who == "coordinator")
