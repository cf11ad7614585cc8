"""Workers and daemons that die, freeze, hang, slow down or run out of memory at a named step."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from coordinator.engine import STEPS_AHEAD
from coordinator.specs import MOST_REPLAYED_STEPS
from tests.faults.harness import (
    Cable,
    Fault,
    Inputs,
    arguments,
    end,
    faulty,
    injected,
    local,
    make_inputs,
    run_through,
)
from tests.fixtures.runs import Run, losses

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    "fault",
    [
        {"step": 23, "do": "kill worker"},
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in (
                {"step": 23, "do": "kill worker", "at": "sum"},
                {"step": 23, "do": "kill daemon"},
                {"step": 23, "do": "kill host"},
                {"step": 23, "do": "freeze worker"},
                {"step": 23, "do": "freeze worker", "at": "sum"},
                {"step": 23, "do": "hang"},
            )
        ),
        pytest.param({"step": 23, "do": "freeze host"}, marks=pytest.mark.slow),
    ],
    ids=lambda fault: f"{fault['do']} in {fault.get('at', 'compute')}",
)
def test_one_of_three_is_lost(inputs: Inputs, tmp_path: Path, fault: Fault) -> None:
    outcome = run_through(inputs, tmp_path, {"anna": [], "ben": [fault], "cleo": []})
    outcome.check(inputs)
    assert outcome.repairs, "it is told"
    assert "ben" in outcome.repairs[0]["message"]
    assert {3, 2} <= set(outcome.nodes()), "the others went on without it"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"step": 21, "do": "kill worker"},
        {"step": 24, "do": "freeze host", "at": "sum"},
        {"step": 21, "do": "leave"},
    ],
    ids=lambda fault: fault["do"],
)
def test_a_round_of_local_steps_in_which_one_is_lost_is_done_again(
    inputs: Inputs, tmp_path: Path, fault: Fault
) -> None:
    faults = {"anna": [], "ben": [fault], "cleo": []}
    outcome = run_through(inputs, tmp_path, faults, "--local-steps", "8", iters=40)
    assert outcome.code == 0, outcome.errors
    found = losses(outcome.folder)
    assert [step for step, _ in found] == list(range(1, 41)), "every step stands once"
    # Other numbers than one machine's, and as good ones.
    expected = [loss for _, loss in inputs.losses[:40]]
    assert sum(loss for _, loss in found[-8:]) < 1.02 * sum(expected[-8:])
    assert outcome.replayed == 0, "no step that stands in the metrics"
    last = outcome.nodes().index(2)  # step of three
    if fault["do"] == "leave":
        assert fault["step"] <= last <= fault["step"] + STEPS_AHEAD + 2, "the round is closed for who leaves"
    else:
        assert last in (16, 24), "a round is of one group"
    assert bool(outcome.repairs) == (fault["do"] != "leave")
    digests = {"ended with the same weights" in value for _, value in outcome.events[-1]["summary"] if "rows" in value}
    assert digests == {True}


@pytest.mark.slow
def test_a_freeze_of_seconds_ends_in_eviction_or_in_completion(inputs: Inputs, tmp_path: Path) -> None:
    freeze = {"step": 23, "do": "freeze host", "seconds": 5}
    run_through(inputs, tmp_path, {"anna": [], "ben": [freeze]}).check(inputs)


@pytest.mark.slow
def test_one_that_gets_slow_keeps_the_curve(inputs: Inputs, tmp_path: Path) -> None:
    slow = {"step": 30, "do": "slow", "steps": 40}
    run_through(inputs, tmp_path, {"anna": [], "ben": [slow]}).check(inputs)


@pytest.mark.slow
def test_one_without_memory_comes_back_with_smaller_micro_batches(inputs: Inputs, tmp_path: Path) -> None:
    outcome = run_through(inputs, tmp_path, {"anna": [], "ben": [{"step": 23, "do": "memory"}]})
    outcome.check(inputs)
    assert any("smaller micro-batches" in event.get("message", "") for event in outcome.events)


@pytest.mark.slow
def test_all_die_at_once_and_the_last_copy_is_taken_up(inputs: Inputs, tmp_path: Path) -> None:
    kill = {"step": 37, "do": "kill worker"}
    outcome = run_through(inputs, tmp_path, {"anna": [kill], "ben": [kill]})
    outcome.check(inputs, replayed=MOST_REPLAYED_STEPS)


@pytest.mark.slow
def test_all_are_cut_off_at_once_and_what_they_still_hold_is_taken_up(inputs: Inputs, tmp_path: Path) -> None:
    adapter = tmp_path / "adapters"
    with faulty(tmp_path, {"anna": [], "ben": []}) as nodes, contextlib.ExitStack() as stack:
        cables = [stack.enter_context(Cable(node.port)) for node in nodes.values()]
        command = arguments(inputs, adapter, list(nodes.values()))
        command[command.index("--nodes") + 1] = ",".join(cable.address for cable in cables)
        run = Run(*command)
        run.until_step(37)
        for cable in cables:
            cable.cut()
        outcome = end(run, adapter)
    outcome.check(inputs, replayed=0)
    assert outcome.repairs
    assert any("still holds step" in event.get("message", "") for event in outcome.events)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hang", "hang copies"])
@pytest.mark.parametrize("where", ["here", "on a node"])
def test_the_only_machine_hangs_and_begins_anew(inputs: Inputs, tmp_path: Path, where: str, what: str) -> None:
    fault: Fault = {"step": 23, "do": what}
    more = ("--save-every", "25") if what == "hang copies" else ()
    if where == "here":
        outcome = end(
            Run(*local(inputs, tmp_path / "adapters", *more), environment=injected(tmp_path, [fault])),
            tmp_path / "adapters",
        )
    else:
        outcome = run_through(inputs, tmp_path, {"anna": [fault]}, *more)
    # With copies that are never finished it trains on until the next one has to wait for the last: whether that is one
    # that it makes by itself or the next checkpoint depends on which of them the fault has met.
    outcome.check(inputs, replayed=MOST_REPLAYED_STEPS, seconds=120.0)
    (repair,) = outcome.repairs
    expected = "alive, but has not finished step 23"
    if what == "hang copies":
        expected = r"has not written the state of step \d+|alive, but has not finished step \d+"
    assert re.search(expected, repair["message"])


@pytest.mark.slow
def test_a_fault_during_recovery(inputs: Inputs, tmp_path: Path) -> None:
    faults = {
        "anna": [],
        "ben": [{"step": 23, "do": "kill worker"}],
        "cleo": [{"step": 23, "do": "kill host", "at": "sum"}],
    }
    run_through(inputs, tmp_path, faults).check(inputs)


@pytest.mark.slow
def test_one_that_leaves_hands_over(inputs: Inputs, tmp_path: Path) -> None:
    outcome = run_through(inputs, tmp_path, {"anna": [], "ben": [{"step": 23, "do": "leave"}]})
    outcome.check(inputs)
    assert not outcome.repairs, "nothing was lost"
    assert any("ben has left" in event.get("message", "") for event in outcome.events)
    assert outcome.nodes()[-1] == 1
