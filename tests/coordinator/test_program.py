"""The order of a run: a pure function of its intervals."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.program import Action, Program

programs = st.builds(
    Program,
    total_iters=st.integers(1, 60),
    accumulation=st.integers(1, 7),
    save_every=st.integers(1, 70),
    steps_per_eval=st.integers(1, 70),
    steps_per_report=st.integers(1, 70),
    validates=st.booleans(),
)


def everything(program: Program) -> list[Action]:
    return list(program.actions(0, -1))


def steps(actions: list[Action], kind: str) -> list[int]:
    return [action.step for action in actions if action.kind == kind]


@given(programs)
def test_every_batch_is_in_one_step_and_every_step_is_trained_once_in_order(program: Program) -> None:
    assert steps(everything(program), "train") == list(range(1, program.total_steps + 1))
    batches = [batch for step in range(1, program.total_steps + 1) for batch in program.iters(step)]
    assert batches == list(range(1, program.total_iters + 1))
    for step in range(1, program.total_steps + 1):
        assert program.iters(step)[-1] == program.last_iter(step)
        assert {program.step_of(batch) for batch in program.iters(step)} == {step}


@given(programs)
def test_checkpoints_and_validations_follow_the_steps_that_hold_their_batches(program: Program) -> None:
    actions = everything(program)

    def expected(interval: int) -> list[int]:
        wanted = {program.step_of(batch) for batch in range(interval, program.total_iters + 1, interval)}
        return sorted(wanted | {program.total_steps})

    assert steps(actions, "checkpoint") == expected(program.save_every)
    assert steps(actions, "validate") == ([0, *expected(program.steps_per_eval)] if program.validates else [])
    reported = [step for step in range(1, program.total_steps + 1) if program.reports(step)]
    assert reported == expected(program.steps_per_report)


@given(programs, st.integers(1, 9))
def test_rounds_end_after_so_many_steps_and_where_anything_follows(program: Program, local_steps: int) -> None:
    rounds = dataclasses.replace(program, local_steps=local_steps)
    actions = everything(rounds)
    assert actions == everything(program)
    follows = {action.step for action in actions if action.kind != "train"} - {0}
    ends = {step for step in range(1, rounds.total_steps + 1) if rounds.closes_round(step)}
    assert ends == follows | set(range(local_steps, rounds.total_steps + 1, local_steps)) | {rounds.total_steps}


@given(programs)
def test_what_belongs_to_a_step_follows_it_at_once_and_a_validation_comes_before_its_checkpoint(
    program: Program,
) -> None:
    place = {"train": 0, "validate": 1, "checkpoint": 2}
    actions = everything(program)
    assert actions == sorted(actions, key=lambda action: (action.step, place[action.kind]))
    assert len(set(actions)) == len(actions)
    assert actions[-1] == Action("checkpoint", program.total_steps)


@given(programs, st.data())
def test_resuming_anywhere_leaves_what_is_left(program: Program, data: st.DataObject) -> None:
    actions = everything(program)
    done = data.draw(st.integers(0, program.total_steps), label="done")
    rest = [action for action in actions if action.step > done]
    assert list(program.actions(done, done)) == rest
    pending = [Action("validate", done)] if Action("validate", done) in actions else []
    assert list(program.actions(done, done - 1)) == pending + rest
    assert list(program.actions(done, -1)) == pending + rest


@given(programs, st.integers(1, 60))
def test_a_longer_run_begins_as_the_shorter_one_where_no_step_was_cut_short(program: Program, more: int) -> None:
    whole = program.total_iters - program.total_iters % program.accumulation
    if whole == 0:
        return
    shorter = Program(whole, *_intervals(program))
    longer = Program(whole + more, *_intervals(program))
    last = shorter.total_steps
    assert [a for a in everything(longer) if a.step < last] == [a for a in everything(shorter) if a.step < last]
    assert all(longer.iters(step) == shorter.iters(step) for step in range(1, last + 1))


def _intervals(program: Program) -> tuple[int, int, int, int, bool]:
    return (
        program.accumulation,
        program.save_every,
        program.steps_per_eval,
        program.steps_per_report,
        program.validates,
    )


@pytest.mark.parametrize(("iters", "accumulation", "sizes"), [(5, 2, [2, 2, 1]), (1, 4, [1]), (4, 1, [1, 1, 1, 1])])
def test_the_last_step_takes_what_is_left(iters: int, accumulation: int, sizes: list[int]) -> None:
    program = Program(iters, accumulation, 100, 100, 100, validates=True)
    assert [len(program.iters(step)) for step in range(1, program.total_steps + 1)] == sizes
