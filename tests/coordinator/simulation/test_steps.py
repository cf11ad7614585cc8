"""Steps of simulated fleets."""

from __future__ import annotations

import time

import numpy as np
import pytest

from coordinator import engine
from coordinator.overlap import waits
from coordinator.planner import JobFacts, plan
from coordinator.ring_order import ring_seconds
from coordinator.simulation import steps
from coordinator.simulation.steps import REGROUP_SECONDS, Slowdown, simulate
from coordinator.simulation.sums import Costs
from node.errors import TooFewNodes
from tests.coordinator.simulation.made import FREE, job, machine, names, network


def test_a_machine_alone_computes_and_applies() -> None:
    found = simulate([machine("m00", 1000, overhead=0.5)], job(4), network([], 1e9), Costs(apply_seconds=0.25), steps=4)
    assert found.step_seconds == pytest.approx(0.5 + 4 * 256 / 1000 + 0.25)
    assert found.network_seconds == found.waiting_seconds == 0.0
    assert found.tokens_per_second == pytest.approx(4 * 257 / found.step_seconds)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_equal_machines_with_a_free_network_scale_until_rows_run_out(count: int) -> None:
    def seconds(machines: int) -> float:
        ids = names(machines)
        found = simulate([machine(i) for i in ids], job(8), network(ids, 1e18), FREE, steps=6, everyone=True)
        return found.step_seconds

    assert seconds(1) / seconds(count) == pytest.approx(min(count, 8), rel=0.01)


def test_shares_follow_speeds() -> None:
    machines = [machine("fast", 3000), machine("slow", 1000)]
    found = simulate(machines, job(16), network(["fast", "slow"], 1e12), FREE, steps=5)
    assert found.steps[-1].positions == {"fast": 12 * 256, "slow": 4 * 256}
    assert found.step_seconds == pytest.approx(1.024, rel=0.01)
    assert found.waiting_seconds == pytest.approx(0.0, abs=1e-3)


def test_who_waits_and_how_long() -> None:
    """Three rows for two equal machines: one of them waits for a row's time."""
    found = simulate([machine("a"), machine("b")], job(3), network(["a", "b"], 1e12), FREE, steps=5, everyone=True)
    assert found.waiting_seconds == pytest.approx(0.256 / 2, rel=0.01)
    assert found.network_seconds == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("bits_per_second", [4e7, 2e8, 1e9, 1e11])
@pytest.mark.parametrize("at_once", [None, 1024])
def test_large_gradients_travel_while_the_rest_is_computed(bits_per_second: float, at_once: int | None) -> None:
    ids, facts = names(2), job(16, gradient_bytes=8 << 20, at_once=at_once)
    links = network(ids, bits_per_second)
    found = simulate([machine(i) for i in ids], facts, links, FREE, steps=4, everyone=True)
    last = 8 * 256 / 1000 if at_once is None else 4 * 256 / 1000
    each = ring_seconds(ids, links.links, facts.gradient_bytes // 4, 0.0)
    assert found.network_seconds == pytest.approx(waits(last, each, 4), rel=0.02, abs=1e-3)
    planned = plan([machine(i).candidate for i in ids], facts, links.links, force_all=True)
    assert planned.network_seconds == pytest.approx(waits(last, each + facts.reduction_seconds, 4))
    assert found.compute_seconds == pytest.approx(planned.compute_seconds)


def test_small_gradients_and_rounds_do_not() -> None:
    ids = names(2)
    for facts, reductions in ((job(gradient_bytes=1 << 20), 1), (job(gradient_bytes=8 << 20, local_steps=16), 16)):
        links = network(ids, 2e8)
        planned = plan([machine(i).candidate for i in ids], facts, links.links, force_all=True)
        whole = ring_seconds(ids, links.links, facts.gradient_bytes, facts.reduction_seconds)
        assert planned.network_seconds == pytest.approx(whole / reductions)


def test_the_same_seed_gives_the_same_steps() -> None:
    ids = names(5)
    machines = [machine(i, noise=0.1) for i in ids]

    def ends(seed: int) -> list[float]:
        return [step.ended for step in simulate(machines, job(), network(ids, 1e9), seed=seed).steps]

    assert ends(3) == ends(3)
    assert ends(3) != ends(4)


def test_noise_has_everybody_wait_for_the_slowest() -> None:
    ids = names(8)
    calm = simulate([machine(i) for i in ids], job(64), network(ids, 1e10), steps=30, everyone=True)
    noisy = simulate([machine(i, noise=0.1) for i in ids], job(64), network(ids, 1e10), steps=30, everyone=True)
    assert 1.05 * calm.step_seconds < noisy.step_seconds < 1.4 * calm.step_seconds
    assert noisy.waiting_seconds > calm.waiting_seconds


def test_the_planner_chooses_who_takes_part() -> None:
    machines = [machine("fast", 20000), machine("slow", 500)]
    links = network(["fast", "slow"], 1e8, 0.01)
    found = simulate(machines, job(8, 64 << 20), links, steps=5)
    assert found.ranks == ("fast",)
    chosen = plan([one.candidate for one in machines], job(8, 64 << 20), links.links)
    assert found.step_seconds == pytest.approx(chosen.step_seconds + Costs().apply_seconds)
    assert simulate(machines, job(8, 64 << 20), links, steps=5, everyone=True).step_seconds > 2 * found.step_seconds


def test_shares_follow_a_machine_that_slows_down() -> None:
    """Two steps show it, and the steps that were sent ahead have the old shares."""
    machines = [machine("a"), machine("b", slowdowns=(Slowdown(10.0, 3.0),))]
    found = simulate(machines, job(16), network(["a", "b"], 1e12), FREE, steps=30)
    first = next(index for index, step in enumerate(found.steps) if step.compute_seconds["b"] > 4.0)
    moved = next(index for index, step in enumerate(found.steps) if step.positions["b"] < step.positions["a"])
    assert 4 <= moved - first <= 7
    assert found.steps[-1].positions == {"a": 12 * 256, "b": 4 * 256}


def test_a_slowdown_within_a_share_counts_from_then_on() -> None:
    found = simulate(
        [machine("a", slowdowns=(Slowdown(1.0, 2.0),))], job(8), network([], 1e9), FREE, steps=2, warm_up=0
    )
    assert found.steps[0].ended == pytest.approx(1.0 + 2 * 1.048)
    found = simulate(
        [machine("a", slowdowns=(Slowdown(1.0, 2.0), Slowdown(2.0, 1.0)))],
        job(8),
        network([], 1e9),
        FREE,
        steps=2,
        warm_up=0,
    )
    assert found.steps[0].ended == pytest.approx(2.0 + 0.548)


def test_who_is_lost_leaves_its_rows_to_the_others() -> None:
    ids = ["a", "b", "c"]
    machines = [machine("a"), machine("b"), machine("c", lost_at=5.0)]
    found = simulate(machines, job(12), network(ids, 1e12), FREE, steps=8, everyone=True)
    assert [step.number for step in found.steps] == list(range(1, 9)), "each step once"
    assert [len(step.positions) for step in found.steps] == [3] * 4 + [2] * 4
    assert found.steps[4].ended == pytest.approx(5.0 + REGROUP_SECONDS + 6 * 0.256, rel=0.01)
    assert found.replayed == 1


def test_losing_two_at_once_replays_a_step_once() -> None:
    ids = ["a", "b", "c", "d"]
    machines = [machine("a"), machine("b"), machine("c", lost_at=5.0), machine("d", lost_at=6.0)]
    found = simulate(machines, job(12), network(ids, 1e12), FREE, steps=10, everyone=True)
    assert [step.number for step in found.steps] == list(range(1, 11))
    assert [len(step.positions) for step in found.steps][-1] == 2
    assert found.replayed == 1
    assert found.steps[6].ended > 6.0 + REGROUP_SECONDS


def test_shares_are_made_as_early_as_in_training() -> None:
    assert steps.STEPS_AHEAD == engine.STEPS_AHEAD


def test_with_the_last_machine_the_run_ends() -> None:
    found = simulate([machine("a", lost_at=2.5)], job(4), network([], 1e9), FREE, steps=8)
    assert len(found.steps) == 2


def test_machines_that_do_not_reach_each_other_make_no_ring() -> None:
    with pytest.raises(TooFewNodes, match="reach their neighbours"):
        simulate([machine("a"), machine("b")], job(), network(["a", "b"], 0.0), everyone=True)


def test_sixty_four_machines_take_seconds() -> None:
    ids = names(64)
    random = np.random.default_rng(1)
    rows = tuple(np.clip(random.lognormal(5.5, 0.8, 256), 8, 2048).astype(np.int32) for _ in range(4))
    machines = [machine(i, float(random.uniform(500, 5000)), noise=0.05) for i in ids]
    began = time.process_time()
    found = simulate(machines, JobFacts(rows, 2048, 256, 1, 40 << 20), network(ids, 1e9, 3e-4), steps=6, everyone=True)
    assert time.process_time() - began < 10, "about 2 s on a quiet core"
    assert len(found.steps) == 6
    assert len(found.steps[0].positions) == 64
