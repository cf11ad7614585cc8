"""Who trains together is decided by figures, and said with them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from coordinator.pace import Speed
from coordinator.planner import (
    Candidate,
    JobFacts,
    Link,
    Links,
    Plan,
    StepSplit,
    as_json,
    describe,
    network_waits,
    plan,
    says_slow_network,
)
from coordinator.ring_order import best_order, ring_pairs, ring_seconds, streams_seconds
from node.errors import TooFewNodes

GIB = 1 << 30
FAST = Link(20e9, 0.0002)
SLOW = Link(0.2e9, 0.003)


def machine(name: str, seconds_per_position: float | None = 1e-4, **changes: object) -> Candidate:
    speed = None if seconds_per_position is None else Speed(0.01, seconds_per_position)
    facts: dict[str, object] = {"memory_bytes": 32 * GIB, "needs_bytes": 8 * GIB, "token_limit": None}
    return Candidate(f"id-{name}", name, speed=speed, **{**facts, **changes})  # type: ignore[arg-type]


def job(batch: int = 16, gradient_bytes: int = 10 << 20) -> JobFacts:
    return JobFacts((np.full(batch, 257, np.int32),), 2048, batch, 1, gradient_bytes)


def linked(candidates: list[Candidate], link: Link = FAST) -> dict[tuple[str, str], Link]:
    return {(a.id, b.id): link for a, b in itertools.combinations(candidates, 2)}


def decide(candidates: list[Candidate], links: Links | None = None, batch: int = 16, **options: object) -> Plan:
    found = linked(candidates) if links is None else links
    return plan(candidates, job(batch), found, **options)  # type: ignore[arg-type]


def names(result: Plan) -> set[str]:
    return {member.candidate.name for member in result.members}


def test_machines_share_by_their_speed() -> None:
    result = decide([machine("Studio"), machine("Air", 3e-4)])
    assert {member.candidate.name: member.rows for member in result.members} == {"Studio": 12, "Air": 4}
    assert result.alone == "Studio"
    assert 1.2 < result.ratio < 4 / 3
    assert result.step_seconds == result.compute_seconds + result.network_seconds
    assert result.left_out == ()


def test_one_machine_trains_alone_without_a_network() -> None:
    result = decide([machine("Studio")])
    assert result.network_seconds == 0
    assert result.ratio == pytest.approx(1)
    assert describe(result) == ["Studio trains alone: a step takes about 0.42 s"]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (machine("Air", memory_bytes=4 * GIB), "needs 8.0 GB of memory, has 4.0 GB"),
        (machine("Air", problem="is paused"), "is paused"),
        (machine("Air", None), "its speed was not measured"),
    ],
)
def test_what_cannot_train_is_left_out_whatever_is_forced(candidate: Candidate, reason: str) -> None:
    result = decide([machine("Studio"), candidate], force_all=True)
    assert names(result) == {"Studio"}
    assert [(left.name, left.reason) for left in result.left_out] == [("Air", reason)]
    assert f"Air is left out: {reason}" in describe(result)


def test_unknown_memory_is_no_reason() -> None:
    assert names(decide([machine("Studio"), machine("Air", memory_bytes=None)])) == {"Studio", "Air"}


def test_a_slower_machine_than_it_is_worth_is_left_out_with_both_figures() -> None:
    pair = [machine("Studio"), machine("Air")]
    result = decide(pair, linked(pair, Link(1e6, 0.01)))
    assert names(result) == {"Studio"}
    (left,) = result.left_out
    assert left.reason.startswith("slower than it is worth: a step takes ")
    assert left.reason.endswith(f"{result.step_seconds:.2f} s without")


def test_slower_machines_can_be_forced_and_asked_for() -> None:
    pair = [machine("Studio"), machine("Air")]
    links = linked(pair, Link(1e6, 0.01))
    assert names(decide(pair, links, force_all=True)) == {"Studio", "Air"}
    assert names(decide(pair, links, required_names=["Air"])) == {"Air"}
    assert names(decide(pair, links, required_names=["Air", "Studio"])) == {"Studio", "Air"}


def test_a_slow_link_keeps_one_machine_out_and_not_the_others() -> None:
    for count, poor in ((4, 1), (9, 0), (9, 1), (9, 8)):
        machines = [machine(f"m{i}") for i in range(count)]
        links = linked(machines)
        links |= {(a, b): Link(1e6, 0.01) for a, b in links if machines[poor].id in (a, b)}
        result = decide(machines, links, batch=64)
        assert names(result) == {candidate.name for candidate in machines} - {f"m{poor}"}


def test_machines_that_cannot_reach_each_other_do_not_train_together() -> None:
    pair = [machine("Studio"), machine("Air")]
    cut = linked(pair, Link(0, 0))
    for force_all in (False, True):
        result = decide(pair, cut, force_all=force_all)
        assert len(result.members) == 1
        assert result.left_out[0].reason == "no way between it and the others was found over the network"
    with pytest.raises(TooFewNodes, match="cannot all reach"):
        decide(pair, cut, required_names=["Studio", "Air"])


def test_too_few_machines_are_named_with_their_reasons() -> None:
    pair = [machine("Studio"), machine("Air", memory_bytes=4 * GIB)]
    with pytest.raises(TooFewNodes, match=r"1 of at least 2 machines take part: Air: needs 8\.0 GB"):
        decide(pair, min_nodes=2)
    pair[1] = machine("Air")
    with pytest.raises(TooFewNodes, match=r"--force-all.*Air: slower than it is worth|Studio: slower"):
        decide(pair, linked(pair, Link(1e6, 0.01)), min_nodes=2)
    with pytest.raises(TooFewNodes, match="no machine was found"):
        decide([])
    with pytest.raises(TooFewNodes, match="Mini was not found"):
        decide([machine("Studio")], required_names=["Mini"])
    with pytest.raises(TooFewNodes, match="Air: is paused"):
        decide([machine("Studio"), machine("Air", problem="is paused")], required_names=["Air"])
    with pytest.raises(TooFewNodes, match="Air: is paused"):
        decide([machine("Air", problem="is paused")])


def test_slow_links_are_kept_out_of_the_ring() -> None:
    ids = list("abcdefghijkl")
    good = {frozenset(pair) for pair in ring_pairs(list("acebdfhjlgik"))}
    links = {pair: FAST if frozenset(pair) in good else SLOW for pair in itertools.combinations(ids, 2)}
    few = list("abcde")
    few_good = {frozenset(pair) for pair in ring_pairs(list("acebd"))}
    few_links = {pair: FAST if frozenset(pair) in few_good else SLOW for pair in itertools.combinations(few, 2)}
    order = best_order(few, few_links, 1 << 20)
    assert {frozenset(pair) for pair in ring_pairs(order)} == few_good
    order = best_order(ids, links, 1 << 20)
    assert order[0] == "a"
    assert sorted(order) == ids
    assert best_order(ids, links, 1 << 20) == order


def test_one_poor_link_is_avoided_in_large_rings() -> None:
    ids = [f"n{i:02}" for i in range(40)]
    links: dict[tuple[str, str], Link] = dict.fromkeys(itertools.combinations(ids, 2), FAST)
    links |= {(ids[i], ids[i + 1]): SLOW for i in range(39)}
    pairs = {frozenset(pair) for pair in ring_pairs(best_order(ids, links, 1 << 20))}
    assert not pairs & {frozenset(pair) for pair, link in links.items() if link is SLOW}


def test_ring_time_is_bytes_over_the_slowest_link_and_its_latency() -> None:
    links = {("a", "b"): Link(8e9, 0.001), ("b", "c"): Link(4e9, 0.001), ("c", "a"): Link(8e9, 0.001)}
    assert ring_seconds(["a"], links, 10**8, 0.01) == 0
    assert ring_seconds(["a", "b"], links, 10**8, 0.01) == pytest.approx(0.1 + 2 * 0.001 + 0.01)
    assert ring_seconds(["a", "b", "c"], links, 10**8, 0.01) == pytest.approx(4 / 3 * 0.2 + 4 * 0.001 + 0.01)


def test_a_batch_too_small_to_share_is_said_with_what_would_help() -> None:
    machines = [machine(f"m{i}") for i in range(3)]
    advice = decide(machines, batch=4).advice
    assert any(line.startswith("batch 4 limits this fleet to 1.") and " would give 2." in line for line in advice)
    assert not any("limits" in line for line in decide(machines, batch=96).advice)


def test_a_slow_network_is_said() -> None:
    pair = [machine("Studio"), machine("Air")]
    links = linked(pair, Link(0.4e9, 0.001))
    assert any("the network takes" in line for line in decide(pair, links).advice)
    assert not any("the network takes" in line for line in decide(pair).advice)


@pytest.mark.parametrize(
    ("link", "asked", "chosen", "line"),
    [
        (Link(0.4e9, 0.001), "auto", "bf16", "gradients travel as bf16: 52 ms of network a step instead of 0.16 s;"),
        (Link(0.4e9, 0.001), "bf16", "bf16", "gradients travel as bf16: 52 ms of network a step instead of 0.16 s;"),
        (
            Link(0.4e9, 0.001),
            "fp32",
            "fp32",
            "gradients as bf16 would take 52 ms of network a step instead of 0.16 s: ",
        ),
        (FAST, "auto", "fp32", ""),
        (FAST, "fp32", "fp32", ""),
        # It is slow because of what no rounding helps.
        (Link(20e9, 0.05), "auto", "fp32", ""),
        (Link(20e9, 0.05), "fp32", "fp32", ""),
    ],
)
def test_gradients_are_rounded_where_that_is_worth_it_and_may_be(
    link: Link, asked: Any, chosen: str, line: str
) -> None:
    pair = [machine("Studio"), machine("Air")]
    facts = dataclasses.replace(job(), gradient_dtype=asked)
    result = plan(pair, facts, linked(pair, link), force_all=True)
    assert result.gradient_dtype == as_json(result)["gradient_dtype"] == chosen
    told = [said for said in describe(result) if "gradients" in said]
    assert len(told) == bool(line)
    assert all(said.startswith(line) and "--gradient-dtype" in said for said in told)


def test_local_steps_are_recommended_where_the_network_takes_a_third() -> None:
    pair = [machine("Studio"), machine("Air")]
    slow, middling = linked(pair, Link(0.3e9, 0.001)), linked(pair, Link(2e9, 0.001))
    result = plan(pair, job(), slow, force_all=True)
    assert result.network_seconds > result.step_seconds / 3
    (line,) = [said for said in describe(result) if "--local-steps" in said]
    rounds = plan(pair, dataclasses.replace(job(), local_steps=16), slow, force_all=True)
    ids = [member.candidate.id for member in rounds.members]
    assert rounds.network_seconds == pytest.approx(ring_seconds(ids, slow, job().gradient_bytes, 0.005) / 16)
    assert line == (
        f"--local-steps 16 would make a step {rounds.step_seconds:.2f} s instead of {result.step_seconds:.2f} s,"
        " if the numbers need not be those of one machine"
    )
    (line,) = [said for said in describe(rounds) if "--local-steps" in said]
    assert line.startswith("machines train 16 steps by themselves at a time: ")
    assert "a step instead of" in line
    assert not [said for said in describe(plan(pair, job(), middling, force_all=True)) if "--local-steps" in said]
    alone = plan(pair[:1], dataclasses.replace(job(), local_steps=16), {})
    assert not [said for said in describe(alone) if "--local-steps" in said]


def test_rounding_may_be_what_makes_a_machine_worth_its_place() -> None:
    pair = [machine("Studio"), machine("Air")]
    links = linked(pair, Link(0.2e9, 0.001))
    results = {
        asked: plan(pair, dataclasses.replace(job(), gradient_dtype=asked), links) for asked in ("fp32", "auto", "bf16")
    }
    assert {asked: len(result.members) for asked, result in results.items()} == {"fp32": 1, "auto": 2, "bf16": 2}
    alone = plan(pair[:1], dataclasses.replace(job(), gradient_dtype="bf16"), {})
    assert not [said for said in describe(alone) if "gradients" in said]


def test_the_plan_is_told_to_people_and_programs() -> None:
    pair = [machine("Studio"), machine("Air", 3e-4), machine("Mini", memory_bytes=GIB)]
    links = linked(pair, Link(21e9, 0.0004, "Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)"))
    result = decide(pair, links)
    lines = describe(result)
    assert lines[0].startswith("2 machines: about 1.3 ")
    assert lines[1] == "Studio 12/16 of the rows, computes 0.32 s, needs 8.0 GB of 32.0 GB"
    assert "Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)" in lines
    content = json.loads(json.dumps(as_json(result)))
    assert [member["name"] for member in content["members"]] == ["Studio", "Air"]
    assert content["step_seconds"] == pytest.approx(result.step_seconds)
    assert content["left_out"][0]["name"] == "Mini"


def test_the_same_facts_give_the_same_plan() -> None:
    machines = [machine(f"m{i}", 1e-4 * (1 + i % 5)) for i in range(12)]
    assert as_json(decide(machines, batch=64)) == as_json(decide(machines, batch=64))


def test_a_plan_needs_rows() -> None:
    with pytest.raises(ValueError, match="with rows"):
        plan([machine("Studio")], JobFacts((np.zeros(0, np.int32),), 2048, 4, 1, 1), {})


def test_waiting_for_the_network_is_told_from_waiting_for_others() -> None:
    assert network_waits([1.0, 0.5], [0.25, 0.75]) == StepSplit(1.0, 0.25, 0.5)
    assert network_waits([1.0, 0.98], [0.5, 0.25]) == StepSplit(1.0, 0.25, 0.25)
    assert network_waits([0.0, 1.0], [1.1, 0.1]).network_seconds == 0.1


def test_a_slow_network_is_told_after_some_steps() -> None:
    slow = StepSplit(1.0, 0.5, 0.0)
    assert says_slow_network([slow] * 4) is None
    assert "33 % of a step" in (says_slow_network([slow] * 5) or "")
    assert says_slow_network([StepSplit(1.0, 0.2, 0.9)] * 9) is None
    assert says_slow_network([slow, slow, *[StepSplit(1.0, 0.1, 0.0)] * 5]) is None


def test_sums_through_the_coordinator_cost_its_own_link_each_machine() -> None:
    even = {("a", "b"): Link(1e9, 0.001), ("a", "c"): Link(1e9, 0.001), ("b", "c"): SLOW}
    size = 100 << 20
    once = 8 * size / 1e9
    assert streams_seconds(["a"], even, "a", size, 0.0) == 0
    assert streams_seconds(["a", "b"], even, "a", size, 0.0) == pytest.approx(2 * once + 0.002)
    assert streams_seconds(["a", "b", "c"], even, "a", size, 0.0) == pytest.approx(4 * once + 0.002)
    assert streams_seconds(["b", "c"], even, "", size, 0.0) > 10 * once, "the coordinator is elsewhere"


def test_a_network_that_a_ring_could_bear_may_be_too_slow_for_streams() -> None:
    machines = [machine(f"Mini {number}") for number in range(4)]
    links = linked(machines, Link(1e9, 0.0005))
    streams = dataclasses.replace(job(), streams=True, hub=machines[0].id)
    assert len(plan(machines, job(), links).members) == 4
    assert len(plan(machines, streams, links).members) == 2
    small = dataclasses.replace(streams, gradient_bytes=1 << 20)
    two = plan(machines[:2], small, links, force_all=True)
    ids = [member.id for member in machines[:2]]
    assert two.network_seconds == pytest.approx(streams_seconds(ids, links, ids[0], small.gradient_bytes, 0.005))


def test_streams_need_no_ring() -> None:
    machines = [machine("Studio"), machine("Air"), machine("Mini")]
    links = {**linked(machines), ("id-Air", "id-Mini"): Link(0.0, 0.0)}
    facts = dataclasses.replace(job(), streams=True, hub="id-Studio")
    assert len(plan(machines, facts, links, force_all=True).members) == 3
