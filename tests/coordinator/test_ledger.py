from __future__ import annotations

import dataclasses
import math

import pytest

from coordinator.ledger import Ledger, Tally, metrics_of
from node.errors import TandemError
from node.events import StepDone


def done(step: int, compute: float = 1.0, wait: float = 0.5, loss: float = 8.0, tokens: int = 4) -> StepDone:
    return StepDone(step, loss, tokens, 1e-5, 1.0, compute + wait, compute, wait, int(100 * compute), 7)


def test_a_step_is_complete_when_all_have_reported() -> None:
    ledger = Ledger(3)
    assert ledger.report("ada", done(1)) is None
    assert ledger.report("ben", done(1)) is None
    assert ledger.report("ada", done(2)) is None, "a rank may be a step ahead"
    applied = ledger.report("cleo", done(1))
    assert applied is not None
    assert (applied.step, set(applied.reports)) == (1, {"ada", "ben", "cleo"})


def test_what_only_some_have_reported_is_there_at_the_end() -> None:
    ledger = Ledger(2)
    ledger.report("ben", done(5))
    ledger.report("ada", done(4))
    assert [applied.step for applied in ledger.close()] == [4, 5]
    assert ledger.close() == []


@pytest.mark.parametrize("other", [done(1, loss=8.1), done(1, tokens=5)])
def test_ranks_that_disagree_are_an_error(other: StepDone) -> None:
    ledger = Ledger(2)
    ledger.report("ada", done(1))
    with pytest.raises(TandemError, match="disagree about step 1"):
        ledger.report("ben", other)


@pytest.mark.parametrize(("other", "told"), [(0.5, 1.0), (2.0, 2.0), (math.nan, math.nan), (math.inf, math.inf)])
def test_in_a_round_the_largest_norm_is_told(other: float, told: float) -> None:
    ledger = Ledger(2)
    ledger.report("ada", done(1))
    applied = ledger.report("ben", dataclasses.replace(done(1), grad_norm=other))
    assert applied is not None
    assert applied.grad_norm == pytest.approx(told, nan_ok=True)


def test_a_loss_that_is_no_number_is_the_same_on_all() -> None:
    ledger = Ledger(2)
    ledger.report("ada", done(1, loss=math.nan))
    assert ledger.report("ben", done(1, loss=math.nan)) is not None


def test_the_networks_time_is_that_of_whom_the_others_waited_for() -> None:
    ledger = Ledger(2)
    ledger.report("ada", done(1, compute=1.0, wait=2.1))
    applied = ledger.report("ben", done(1, compute=3.0, wait=0.1))
    assert applied is not None
    metrics = metrics_of(applied.reports, {"ada": 2, "ben": 6})
    assert (metrics["compute_seconds"], metrics["wait_seconds"], metrics["seconds"]) == (3.0, 0.1, 3.1)
    assert (metrics["nodes"], metrics["padded_tokens"], metrics["peak_memory_bytes"]) == (2, 14, 300)
    assert metrics["per_node"]["ben"]["rows"] == 6


def test_who_is_left_over_of_several_is_named_and_the_only_one_is_not() -> None:
    left = metrics_of({"ada": done(1)}, {"ada": 8})
    assert left["nodes"] == 1
    assert {name: part["rows"] for name, part in left["per_node"].items()} == {"ada": 8}
    silent = metrics_of({"ada": done(1)}, {"ada": 5, "ben": 3})["per_node"]
    assert (silent["ada"]["rows"], silent["ben"]) == (5, {"rows": 3}), "lost before it could report"
    assert "per_node" not in metrics_of({"": done(1)}, {})
    assert "per_node" not in metrics_of({"": done(1)}, {"": 8})


def test_a_tally_counts() -> None:
    tally = Tally()
    tally.add({"ada": 2, "ben": 6}, 3.0)
    tally.add({"ada": 3, "ben": 5}, 2.0)
    assert (tally.rows, tally.steps, tally.seconds) == ({"ada": 5, "ben": 11}, 2, 5.0)
