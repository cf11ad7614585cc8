from __future__ import annotations

import math

import pytest

from coordinator.stream import Advanced, Noted, StepFinished, Validated
from coordinator.view.series import Series
from coordinator.view.state import RunState
from tests.coordinator.view.synthetic import FLEET, fleet_metrics, started, step_metrics, validation_metrics, whole_run


def fed(*events: object) -> RunState:
    state = RunState()
    for event in events:
        state.apply(event)  # type: ignore[arg-type]
    return state


def step(number: int, report: bool = False, **changes: object) -> StepFinished:
    return StepFinished(step_metrics(number, **changes), report)  # type: ignore[arg-type]


def test_a_whole_run_is_folded_into_its_figures() -> None:
    state = fed(*whole_run())
    assert (state.step, state.iterations, state.fraction) == (100, 100, 1.0)
    assert state.trained_tokens == sum(step_metrics(s)["tokens"] for s in range(1, 101))
    assert state.validation is not None
    assert state.validation.step == 100
    assert state.test is not None
    assert state.tasks == {}
    assert state.warning_count == 1


def test_what_came_before_the_plan_is_over_with_it() -> None:
    assert fed(Advanced("measuring the machines", 0, 0)).tasks
    assert fed(Advanced("measuring the machines", 0, 0), FLEET).tasks == {}


EACH = {"steps_per_report": 1}


def test_the_training_loss_is_the_mean_over_tokens_of_the_last_report_interval() -> None:
    first = [step(1, loss=9.0, tokens=50), step(2, report=True, loss=9.0, tokens=50)]
    second = [step(3, loss=1.0, tokens=300), step(4, report=True, loss=2.0, tokens=100)]
    state = fed(started(config={"steps_per_report": 2}), *first, *second)
    assert state.training_loss == pytest.approx(1.25)
    assert fed(started(config={"steps_per_report": 3}), *first, *second).training_loss == pytest.approx(950 / 450)
    state.apply(step(5, loss=6.0, tokens=100))
    assert state.training_loss == pytest.approx(4.0), "of whole intervals, also between two reports"
    accumulated = [step(number, iter=4 * number, loss=float(number), tokens=1) for number in range(1, 6)]
    assert fed(started(config={"steps_per_report": 8}), *accumulated).training_loss == 4.5
    assert fed(started(config=EACH), *accumulated).training_loss == 5.0


def test_a_step_that_is_computed_again_stands_once() -> None:
    state = fed(started(), step(1, tokens=10), step(2, tokens=20), step(2, tokens=20), step(3, tokens=30))
    assert state.trained_tokens == 60
    assert sum(b.count for b in state.smoothed.buckets) == 3


def test_speed_is_tokens_over_seconds_of_the_last_steps_only() -> None:
    slow = [step(s, tokens=10, seconds=10.0) for s in range(1, 11)]
    fast = [step(s, tokens=100, seconds=0.5) for s in range(11, 31)]
    assert fed(started(), *slow).tokens_per_second == pytest.approx(1)
    assert fed(started(), *slow, *fast).tokens_per_second == pytest.approx(200)


def test_time_left_counts_steps_and_validations_to_come() -> None:
    state = fed(started(100), Validated(validation_metrics(0, seconds=3.0), best=True))
    assert state.seconds_left is None
    for number in range(1, 51):
        state.apply(step(number, seconds=2.0))
    assert state.seconds_left == pytest.approx(50 * 2.0 + 3 * 3.0)


@pytest.mark.parametrize(("slope", "expected"), [(-0.05, "falling"), (0.0, "flat"), (0.05, "rising")])
def test_the_trend_follows_the_smoothed_loss(slope: float, expected: str) -> None:
    state = fed(started(), *(step(s, loss=5.0 + slope * s) for s in range(1, 30)))
    assert state.trend == expected


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "broken"])
def test_losses_that_are_no_numbers_are_counted_and_leave_the_curve_alone(bad: object) -> None:
    steps = [step(1, loss=2.0), step(2, loss=bad, report=True), step(3, loss=0.0, report=True)]
    state = fed(started(config=EACH), *steps)
    assert state.bad_losses == 1
    assert state.smoothed_loss == pytest.approx(1.0)
    assert state.training_loss == 0.0


def test_a_nan_is_shown_not_hidden() -> None:
    state = fed(started(), step(1, loss=2.0), step(2, loss=math.nan, report=True))
    assert state.loss is not None
    assert math.isnan(state.loss)
    assert state.training_loss is not None
    assert math.isnan(state.training_loss)


def test_a_resumed_run_starts_with_its_history() -> None:
    history = [validation_metrics(0), *(step_metrics(s) for s in range(1, 41)), validation_metrics(40)]
    state = fed(started(first_step=41, history=tuple(history)))
    assert state.step == 40
    assert state.best is not None
    assert state.best.step == 40
    assert state.tokens_per_second is None
    assert len(state.smoothed.buckets) == 40
    whole = fed(started(), *(step(s) for s in range(1, 41)))
    assert state.training_loss == whole.training_loss, "as if it had not been cut off"


def test_best_follows_the_job() -> None:
    state = fed(
        started(),
        Validated(validation_metrics(0, val_loss=3.0), best=True),
        Validated(validation_metrics(10, val_loss=2.0), best=True),
        Validated(validation_metrics(20, val_loss=2.5), best=False),
    )
    assert state.best is not None
    assert state.validation is not None
    assert (state.best.step, state.best.loss) == (10, 2.0)
    assert (state.validation.step, state.validation.loss) == (20, 2.5)


def test_tasks_appear_and_go() -> None:
    state = fed(Advanced("loading model", 0, 0), Advanced("tokenising train", 3, 10))
    assert list(state.tasks) == ["loading model", "tokenising train"]
    state.apply(Advanced("tokenising train", 10, 10))
    assert list(state.tasks) == ["loading model"]
    state.apply(started())
    state.apply(step(1))
    assert state.tasks == {}


def test_metrics_without_anything_in_them_are_survived() -> None:
    state = fed(started(total=0), StepFinished({}, report=True), Validated({}, best=False), Noted("", "", "odd"))
    assert state.seconds_left is None
    assert state.fraction == 0.0
    assert state.training_loss is None


def test_a_series_stays_small_and_keeps_its_extremes() -> None:
    series = Series(limit=100)
    for position in range(100_000):
        series.append(position, {31_415: 99.0, 92_653: -99.0}.get(position, position / 100_000))
    assert len(series.buckets) <= 100
    assert sum(b.count for b in series.buckets) == 100_000
    outline = series.outline()
    assert (31_415, 99.0) in outline
    assert (92_653, -99.0) in outline
    assert [x for x, _ in outline] == sorted(x for x, _ in outline)
    means = series.means(10)
    assert len(means) == 10
    assert means[5] == pytest.approx(0.55, abs=0.02)


def test_a_series_leaves_out_what_is_not_finite() -> None:
    series = Series()
    for value in (1.0, math.nan, math.inf, 2.0):
        series.append(len(series.buckets), value)
    assert (series.missing, [b.mean for b in series.buckets]) == (2, [1.0, 2.0])


def test_a_fleet_is_followed_member_by_member() -> None:
    state = fed(FLEET, started(), *(StepFinished(fleet_metrics(s), report=False) for s in range(1, 40)))
    studio, air = state.members.by_name.values()
    assert (state.members.share(studio), state.members.share(air)) == (0.75, 0.25)
    assert (studio.tokens_per_second, air.tokens_per_second) == (2000.0, 500.0)
    assert state.members.slowest is air
    assert len(studio.turns) == 20


def test_machines_that_a_step_no_longer_names_are_gone() -> None:
    three = StepFinished(fleet_metrics(1, ("a", "b", "c")), report=False)
    state = fed(started(), three, StepFinished(fleet_metrics(2, ("c", "a")), report=False))
    assert list(state.members.by_name) == ["c", "a"]
    assert [len(member.turns) for member in state.members.by_name.values()] == [2, 2]
    state.apply(step(3))
    assert len(state.members) == 0


def test_a_member_without_rows_and_broken_figures_are_survived() -> None:
    idle = {"rows": 0, "positions": 0, "compute_seconds": 0.0, "wait_seconds": 1.0, "peak_memory_bytes": None}
    state = fed(started(), step(1, per_node={"a": idle, "b": "broken"}))
    member = state.members.by_name["a"]
    assert member.tokens_per_second is None
    assert state.members.doing(member) == "has no rows"
    assert state.members.share(member) == 0.0
