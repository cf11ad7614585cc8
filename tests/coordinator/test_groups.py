from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.config import TrainConfig
from coordinator.discovery import Selection
from coordinator.fleet import Fleet
from coordinator.groups import WAIT_SECONDS, Means, group_parts, rdma_of, unencrypted
from coordinator.watch import state_patience
from coordinator.workers import Quiet
from node.errors import UserError
from tests.coordinator.test_links import info, path, paths

PLAIN = paths(a_b=(path("10.0.0.2", 1, "en0"),), b_a=(path("10.0.0.1", 1, "en0"),))
CABLE = paths(a_b=(path("10.0.0.2", 40, "en3"),), b_a=(path("10.0.0.1", 40, "en3"),))
RDMA = {name: info(name.upper(), rdma=("en3",)) for name in "ab"}
WITHOUT = {**RDMA, "b": info("B")}
CERTIFICATES = {name: f"of {name}".encode() for name in "abc"}
# A cable between a and b, without RDMA, and c on the network.
WIRED = {
    name: info(name.upper(), ("en3", "thunderbolt", f"10.1.0.{number}"), ("en0", "ethernet", f"10.0.0.{number}"))
    for number, name in enumerate("abc", start=1)
}
BESIDE = paths(
    a_b=(path("10.1.0.2", 40, "en3", "thunderbolt"), path("10.0.0.2", 1, "en0")),
    b_a=(path("10.1.0.1", 40, "en3", "thunderbolt"), path("10.0.0.1", 1, "en0")),
    a_c=(path("10.0.0.3", 1, "en0"),),
    b_c=(path("10.0.0.3", 1, "en0"),),
    c_a=(path("10.0.0.1", 1, "en0"),),
    c_b=(path("10.0.0.2", 1, "en0"),),
)


def means(reduce: str, ring_encryption: str = "auto") -> Means:
    return Means(reduce, ring_encryption)


@pytest.mark.parametrize(
    ("reduce", "backend"), [("auto", "jaccl"), ("ring", "ring"), ("jaccl", "jaccl"), ("grpc", "grpc")]
)
def test_means_where_all_are_there(reduce: str, backend: str) -> None:
    parts = group_parts(means(reduce), ["a", "b"], RDMA, CABLE, CERTIFICATES)
    assert [part.backend for part in parts] == [backend] * 2
    assert [(part.rank, part.size) for part in parts] == [(0, 2), (1, 2)]
    assert len({part.token for part in parts}) == 1
    assert bool(parts[0].devices) == bool(parts[0].leader) == (backend == "jaccl")
    assert bool(parts[0].next) == (backend != "grpc")
    if backend != "grpc":
        assert parts[0].next_route == parts[1].route != parts[1].next_route == parts[0].route


def test_without_rdma_the_ring_is_taken() -> None:
    assert group_parts(means("auto"), ["a", "b"], WITHOUT, CABLE, CERTIFICATES)[0].backend == "ring"
    assert group_parts(means("auto"), ["a", "b"], RDMA, PLAIN, CERTIFICATES)[0].backend == "ring"


def test_each_group_has_routes_of_its_own() -> None:
    one, other = (group_parts(means("ring"), ["a", "b"], RDMA, CABLE, CERTIFICATES) for _ in range(2))
    assert len({part.route for part in [*one, *other]}) == 4


def test_who_insists_on_rdma_is_told_what_is_lacking() -> None:
    with pytest.raises(UserError, match="--reduce jaccl: B has no RDMA device"):
        group_parts(means("jaccl"), ["a", "b"], WITHOUT, CABLE, CERTIFICATES)
    with pytest.raises(UserError, match=r"A does not reach B over an interface with RDMA \(en3\): .*cable"):
        rdma_of(means("jaccl"), ["a", "b"], RDMA, PLAIN)
    three = {**RDMA, "c": info("C", rdma=("en3",))}
    with pytest.raises(UserError, match="it adds up over two machines, not 3"):
        rdma_of(means("jaccl"), ["a", "b", "c"], three, CABLE)
    assert rdma_of(means("auto"), ["a", "b", "c"], three, CABLE) is None


def test_streams_need_no_way_from_node_to_node() -> None:
    cut = paths(a_b=(), b_a=())
    assert group_parts(means("grpc"), ["a", "b"], RDMA, cut, CERTIFICATES)[0].backend == "grpc"


def test_a_ring_s_neighbours_know_each_other_by_certificate() -> None:
    parts = group_parts(means("ring"), ["a", "b", "c"], WIRED, BESIDE, CERTIFICATES)
    assert [part.next_certificate for part in parts] == [b"of b", b"of c", b"of a"]
    assert [part.previous_certificate for part in parts] == [b"of c", b"of a", b"of b"]


@pytest.mark.parametrize(
    ("ring_encryption", "in_clear", "lines"),
    [
        ("auto", [True, False, False], ["A → B: not encrypted, over their own Thunderbolt cable"]),
        ("on", [False] * 3, []),
        (
            "off",
            [True] * 3,
            [f"{edge}: not encrypted, as --ring-encryption says" for edge in ("A → B", "B → C", "C → A")],
        ),
    ],
)
def test_an_edge_is_in_clear_on_both_its_ends_or_on_none(
    ring_encryption: str, in_clear: list[bool], lines: list[str]
) -> None:
    ids, asked = ["a", "b", "c"], means("ring", ring_encryption)
    parts = group_parts(asked, ids, WIRED, BESIDE, CERTIFICATES)
    assert [part.next_in_clear for part in parts] == in_clear
    assert [part.previous_in_clear for part in parts] == [in_clear[-1], *in_clear[:-1]]
    assert unencrypted(asked, ids, WIRED, BESIDE) == lines


def test_rdma_is_not_taken_where_all_is_to_be_encrypted() -> None:
    ids = ["a", "b"]
    assert group_parts(means("auto", "on"), ids, RDMA, CABLE, CERTIFICATES)[0].backend == "ring"
    assert unencrypted(means("auto"), ids, RDMA, CABLE) == [
        "A ↔ B: not encrypted, by RDMA over their Thunderbolt cable"
    ]
    assert unencrypted(means("auto", "on"), ids, RDMA, CABLE) == []
    assert unencrypted(means("grpc", "off"), ids, RDMA, CABLE) == [], "streams are encrypted always"
    assert unencrypted(means("ring"), ids, RDMA, paths(a_b=(), b_a=())) == []
    with pytest.raises(UserError, match="RDMA cannot be encrypted; leave one out"):
        TrainConfig(reduce="jaccl", ring_encryption="on")


def test_gradients_are_rounded_on_a_ring_and_on_streams_and_never_over_rdma() -> None:
    for reduce, backend in (("auto", "ring"), ("ring", "ring"), ("grpc", "grpc")):
        parts = group_parts(Means(reduce, "auto", "bf16"), ["a", "b"], RDMA, CABLE, CERTIFICATES)
        assert [(part.backend, part.gradient_dtype) for part in parts] == [(backend, "bf16")] * 2
    assert group_parts(means("auto"), ["a", "b"], RDMA, CABLE, CERTIFICATES)[0].gradient_dtype == "fp32"
    with pytest.raises(UserError, match="RDMA adds up fp32 only; leave one out"):
        TrainConfig(reduce="jaccl", gradient_dtype="bf16")


@pytest.mark.parametrize("reduce", ["ring", "grpc"])
def test_limits_grow_with_what_the_links_have_to_carry(reduce: str) -> None:
    ahead: Any = SimpleNamespace(config=TrainConfig(reduce=reduce))
    fleet = Fleet(ahead, Selection((), (), 0.0), Quiet(), asyncio.Event())
    parameters = 1 << 29
    ready: Any = SimpleNamespace(trainable_parameters=parameters)
    own = {"a": True, "b": False}
    nodes: Any = [
        SimpleNamespace(info=RDMA[n], ready=ready, seen=SimpleNamespace(own=own[n], certificate=CERTIFICATES[n]))
        for n in own
    ]
    crew: Any = SimpleNamespace(ids=["a", "b"])
    fleet._nodes, fleet._links = nodes, PLAIN
    rate = min(path.bits_per_second for ways in PLAIN.found.values() for path in ways)
    seconds = fleet.sum_seconds(crew.ids, streams=False)
    assert seconds >= 4 * parameters * 8 / rate
    assert fleet.sum_seconds(["a"], streams=False) == 0
    assert {part.wait_seconds for part in fleet.ring(crew, streams=False)} == {WAIT_SECONDS + state_patience(seconds)}


@pytest.mark.parametrize("reduce", ["auto", "ring", "jaccl", "grpc"])
def test_a_fleet_takes_what_the_option_says_until_it_is_to_use_streams(reduce: str) -> None:
    ahead: Any = SimpleNamespace(config=TrainConfig(reduce=reduce))
    fleet = Fleet(ahead, Selection((), (), 0.0), Quiet(), asyncio.Event())
    nodes: Any = [
        SimpleNamespace(info=RDMA[name], ready=None, seen=SimpleNamespace(own=False, certificate=CERTIFICATES[name]))
        for name in "ab"
    ]
    crew: Any = SimpleNamespace(ids=["a", "b"])
    fleet._nodes, fleet._links = nodes, CABLE
    expected = {"auto": "jaccl"}.get(reduce, reduce)
    assert {part.backend for part in fleet.ring(crew, streams=False)} == {expected}
    for _ in range(2):
        assert {part.backend for part in fleet.ring(crew, streams=True)} == {"grpc"}
