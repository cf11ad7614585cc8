"""Who is late, by what was asked and what was heard: no clock."""

from __future__ import annotations

import math

import pytest

from coordinator.watch import Late, Watch


def _waiting_for_a_sum(sum_limit: float) -> Watch:
    """Two ranks that entered the sum of step 1 at second 1, and have step 2 before them."""
    watch = Watch(2)
    for step in (1, 2):
        watch.step(step, [5.0, 5.0], sum_limit, 0.0)
    for member in (0, 1):
        watch.entered(member, 1, 1.0)
    return watch


def test_a_sum_is_late_when_all_have_entered_it_for_too_long() -> None:
    watch = _waiting_for_a_sum(2.0)
    assert watch.deadline() == 3.0
    assert watch.late(2.9) is None
    assert watch.late(3.0) == Late(None, 1, 2.0)


@pytest.mark.parametrize(("sum_limit", "deadline"), [(7.0, 8.0), (0.5, 3.0)])
def test_steps_that_were_asked_for_have_longer_when_sums_turn_out_to_take_longer(
    sum_limit: float, deadline: float
) -> None:
    watch = _waiting_for_a_sum(2.0)
    watch.sums_may_take(sum_limit)
    assert watch.deadline() == deadline
    for member in (0, 1):
        watch.done(member, 1, 10.0)
        watch.entered(member, 2, 11.0)
    assert watch.deadline() == 11.0 + deadline - 1.0


def test_a_step_without_a_sum_is_nobodys_to_wait_for() -> None:
    watch = Watch(2)
    for step, sum_limit in ((1, None), (2, 3.0)):
        watch.step(step, [5.0, 9.0], sum_limit, 0.0)
    watch.done(0, 1, 2.0)
    assert watch.deadline() == 7.0
    watch.entered(0, 2, 4.0)
    assert watch.late(9.0) == Late(1, 1, 9.0), "who is still at the first"
    watch.done(1, 1, 9.0)
    watch.entered(1, 2, 10.0)
    watch.sums_may_take(4.0)
    assert watch.deadline() == 14.0


def test_a_single_machine_is_late_with_a_step_however_alive_it_is() -> None:
    watch = Watch(1)
    watch.step(1, [5.0], 5.0, now=0.0)
    watch.step(2, [5.0], 5.0, now=0.0)
    watch.done(0, 1, now=4.0)
    assert watch.deadline() == 9.0
    watch.entered(0, 2, now=6.0)
    assert watch.deadline() == 11.0
    assert watch.late(11.5) == Late(None, 2, 5.5)


def test_a_copy_is_late_from_when_its_state_is_there() -> None:
    watch = Watch(2)
    for step in (1, 2, 3):
        watch.step(step, [5.0, 5.0], 5.0, now=0.0)
    watch.copy_asked(0, 2, 30.0, now=1.0)
    for member in (0, 1):
        watch.done(member, 1, now=4.0)
    assert watch.deadline() == 9.0, "of step 2"
    for member in (0, 1):
        watch.done(member, 2, now=5.0)
        watch.done(member, 3, now=6.0)
    assert watch.late(34.0) is None
    assert watch.late(35.0) == Late(0, ("copy", 2), 30.0)


def test_a_copy_of_a_state_that_is_there_is_late_from_when_it_is_asked_for() -> None:
    watch = Watch(1)
    watch.copy_asked(0, 2, 30.0, now=1.0)
    assert watch.deadline() == 31.0
    watch.copied(0)
    assert watch.deadline() == math.inf


def test_other_duties_do_not_hold_up_a_copys_clock() -> None:
    watch = Watch(1)
    watch.asked(0, ("chunk", 1), 600.0, now=0.0)
    watch.copy_asked(0, 2, 30.0, now=1.0)
    assert watch.late(31.0) == Late(0, ("copy", 2), 30.0)
