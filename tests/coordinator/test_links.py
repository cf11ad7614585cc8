from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest

from coordinator.links import (
    Measuring,
    Path,
    Paths,
    by_cable,
    interfaces_of,
    jaccl_matrix,
    measure_links,
    ring_connections,
    rounds,
    same_machine,
    worth_measuring,
)
from coordinator.view.format import bits_text
from coordinator.view.sections import links_html
from node.errors import NodeError, NodeLost
from node.hardware import Facts
from node.info import Interface, InterfaceKind, Measured, NodeInfo, RdmaDevice

FACTS = Facts("x", None, None, None, None, None, None, "3.11", None, None)
GBIT = 1e9


def info(name: str, *addresses: tuple[str, InterfaceKind, str], rdma: tuple[str, ...] = ()) -> NodeInfo:
    found = [Interface(*address) for address in addresses]
    found.append(Interface("lo0", "loopback", "127.0.0.1"))
    devices = tuple(RdmaDevice(f"rdma_{interface}", interface) for interface in rdma)
    return NodeInfo(name.lower(), f"home of {name}", name, 1, "0.1", FACTS, tuple(found), relay_port=7, rdma=devices)


STUDIO = info("Studio", ("bridge0", "thunderbolt", "169.254.1.1"), ("en0", "ethernet", "10.0.0.1"))
AIR = info("Air", ("bridge0", "thunderbolt", "169.254.1.2"), ("en1", "wifi", "10.0.0.2"))
MINI = info("Mini", ("en0", "ethernet", "10.0.0.3"), ("en1", "wifi", "10.0.0.4"))


def addresses(one: NodeInfo, other: NodeInfo) -> list[str]:
    return [item.address for item in interfaces_of(one, other)]


def test_a_cable_is_tried_only_where_both_have_one() -> None:
    assert addresses(AIR, STUDIO) == ["169.254.1.2", "10.0.0.2"]
    assert addresses(AIR, MINI) == ["10.0.0.2"]
    assert addresses(MINI, STUDIO) == ["10.0.0.3", "10.0.0.4"]


def test_programs_of_one_machine_meet_on_loopback_and_others_never_do() -> None:
    second = info("Second", ("en0", "ethernet", "10.0.0.1"))
    near = info("Near")
    assert same_machine(STUDIO, second)
    assert same_machine(near, STUDIO)
    assert addresses(second, STUDIO) == addresses(near, STUDIO) == ["127.0.0.1"]
    assert not same_machine(STUDIO, AIR)
    assert "127.0.0.1" not in addresses(AIR, STUDIO)


def test_two_machines_with_nothing_but_a_cable_are_two() -> None:
    one = info("One", ("bridge0", "thunderbolt", "169.254.1.1"))
    other = info("Other", ("bridge0", "thunderbolt", "169.254.1.2"))
    assert addresses(one, other) == ["169.254.1.1"]


def pairs_of(ids: Sequence[str]) -> set[frozenset[str]]:
    return {frozenset((one, other)) for one in ids for other in ids if one != other}


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_of_all_pairs_are_a_tournament(count: int) -> None:
    ids = [f"n{index}" for index in range(count)]
    found = rounds(ids, pairs_of(ids))
    assert len(found) == (count - 1 if count % 2 == 0 else count if count > 1 else 0)
    for pairs in found:
        seen = [one for pair in pairs for one in pair]
        assert len(seen) == len(set(seen))
    played = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(played) == len(set(played))
    assert set(played) == pairs_of(ids)


def test_a_large_fleet_is_measured_in_a_few_rounds() -> None:
    infos = {f"id{index:02}": info(f"N{index:02}") for index in range(64)}
    wanted = worth_measuring(infos)
    partners = {key: sum(key in pair for pair in wanted) for key in infos}
    assert set(partners.values()) == {6}
    found = rounds(list(infos), wanted)
    assert {frozenset(pair) for pairs in found for pair in pairs} == wanted
    assert len(found) <= 12


def path(address: str, gbit: float, interface: str = "", kind: str = "ethernet", latency: float = 0.0004) -> Path:
    return Path(f"{address}:7", kind, interface, gbit * GBIT, latency)


def paths(**found: tuple[Path, ...]) -> Paths:
    """``a_b=(…)`` is the way from a to b."""
    ends = {tuple(key.split("_")): ways for key, ways in found.items()}
    names = {one: one.upper() for pair in ends for one in pair}
    return Paths({(one, other): ways for (one, other), ways in ends.items()}, names)


def wired(name: str, *interfaces: str) -> NodeInfo:
    """A machine with an address on each of these Thunderbolt interfaces, and one on Ethernet."""
    cables = [(port, "thunderbolt", f"169.254.{name}.{port[-1]}") for port in interfaces]
    return info(name, *cables, ("en0", "ethernet", f"10.0.0.{name}"))


def cable(end: str, port: str) -> Path:
    return path(f"169.254.{end}.{port[-1]}", 20, port, "thunderbolt")


def test_a_cable_is_what_ends_at_the_two_machines() -> None:
    infos = {name: wired(number, "bridge0", "en1", "en2") for name, number in (("a", "1"), ("b", "2"), ("c", "3"))}
    over = {"169.254.2.1:7", "10.0.0.2:7"}
    ether = path("10.0.0.2", 1, "en0")
    found = paths(a_b=(cable("2", "en1"), ether), b_a=(cable("1", "en1"),), a_c=(cable("3", "en2"),), c_a=())
    assert by_cable("a", "b", ["169.254.2.1:7"], infos, found)
    assert not by_cable("a", "b", sorted(over), infos, found), "one of the connections goes another way"
    assert not by_cable("a", "b", [], infos, found)
    # It leaves by Ethernet although it arrives at a Thunderbolt address.
    assert not by_cable("a", "b", ["169.254.2.1:7"], infos, paths(a_b=(path("169.254.2.1", 1, "en0", "thunderbolt"),)))
    # A bridge from which two machines are reached: which of them is in the middle is not known.
    bridged = paths(a_b=(cable("2", "bridge0"),), b_a=(cable("1", "bridge0"),), b_c=(cable("3", "bridge0"),), c_b=())
    assert not by_cable("a", "b", ["169.254.2.0:7"], infos, bridged)
    assert not by_cable("b", "a", ["169.254.1.0:7"], infos, bridged)


def test_one_connection_uses_the_fastest_path() -> None:
    found = paths(a_b=(path("b1", 20, "en3"), path("b2", 1, "en0")), b_a=(path("a1", 20, "en3"), path("a2", 1, "en0")))
    assert ring_connections(["a", "b"], found) == [("b1:7",), ("a1:7",)]


def test_two_paths_that_are_about_as_fast_are_used_at_once() -> None:
    both = {
        "a_b": (path("b1", 10, "en3"), path("b2", 7, "en4")),
        "b_a": (path("a1", 10, "en3"), path("a2", 7, "en4")),
    }
    assert ring_connections(["a", "b"], paths(**both)) == [("b1:7", "b2:7"), ("a1:7", "a2:7")]


def test_addresses_behind_one_card_are_one_path() -> None:
    same = (path("b1", 0.94, "en0"), path("b2", 0.9, "en0", "wifi"))
    found = paths(a_b=same, b_a=same)
    assert [len(connections) for connections in ring_connections(["a", "b"], found)] == [1, 1]
    assert found.describe("a", "b") == "A ↔ B: en0 940 Mbit/s 0.4 ms (Wi-Fi 0.9 unused)"


def test_a_pair_with_one_path_sends_twice_over_it_where_the_others_gain() -> None:
    slow = (path("x1", 1, "en0"), path("x2", 1, "en1"))
    fast = (path("y1", 10, "en5"),)
    ring = {"a_b": slow, "b_c": fast, "c_a": slow}
    assert ring_connections(["a", "b", "c"], paths(**ring)) == [("x1:7", "x2:7"), ("y1:7", "y1:7"), ("x1:7", "x2:7")]


def test_a_pair_with_one_path_that_is_the_slowest_keeps_all_at_one_connection() -> None:
    ring = {
        "a_b": (path("x1", 10, "en3"), path("x2", 10, "en4")),
        "b_c": (path("y1", 1, "en0"),),
        "c_a": (path("z1", 10, "en3"), path("z2", 10, "en4")),
    }
    assert ring_connections(["a", "b", "c"], paths(**ring)) == [("x1:7",), ("y1:7",), ("z1:7",)]


def test_neighbours_that_do_not_reach_each_other_are_named() -> None:
    with pytest.raises(NodeError, match="B does not reach A over the network"):
        ring_connections(["a", "b"], paths(a_b=(path("b1", 1),), b_a=()))


def test_a_link_is_as_good_as_its_worse_direction() -> None:
    found = paths(
        a_b=(path("b1", 10, "en3", latency=0.001),), b_a=(path("a1", 4, "en3", latency=0.003),), a_c=(), c_a=()
    )
    links = found.between()
    told = {(link.one, link.other): (link.bits_per_second, link.text) for link in found.told()}
    assert told["A", "B"] == (links["a", "b"].bits_per_second, links["a", "b"].text)
    assert links["a", "b"].bits_per_second == 4e9
    assert links["a", "b"].latency_seconds == pytest.approx(0.0015)
    assert links["a", "b"].text == "A ↔ B: en3 4.0 Gbit/s 3.0 ms"
    assert (links["a", "c"].bits_per_second, links["a", "c"].text) == (0.0, "A ↔ C: not reached")
    shown = links_html([{"links": [dataclasses.asdict(link) for link in found.told()]}])
    assert "<td>4.0 Gbit/s</td><td>3.0 ms</td><td>A ↔ B: en3 4.0 Gbit/s 3.0 ms</td>" in shown, "they agree"


def test_a_link_that_goes_one_way_only_is_none() -> None:
    found = paths(a_b=(path("b1", 10, "en3"),), b_a=())
    link = found.between()["a", "b"]
    assert (link.bits_per_second, link.text) == (0.0, "A ↔ B: B does not reach A")


def test_links_in_words() -> None:
    found = Paths(
        {("s", "a"): (path("x", 21, "en3", "thunderbolt"), path("y", 0.6, "en0", "wifi"))}, {"s": "Studio", "a": "Air"}
    )
    assert found.describe("s", "a") == "Studio ↔ Air: en3 21 Gbit/s 0.4 ms (Wi-Fi 0.6 unused)"
    assert [bits_text(bits) for bits in (2.34e9, 40e9, 3.4e8)] == ["2.3 Gbit/s", "40 Gbit/s", "340 Mbit/s"]


def test_rdma_needs_a_cable_between_all_pairs() -> None:
    infos = {name: info(name, rdma=("en3", "en4")) for name in "abc"}
    cables = {
        "a_b": "en3",
        "b_a": "en3",
        "a_c": "en4",
        "c_a": "en3",
        "b_c": "en4",
        "c_b": "en4",
    }
    found = paths(**{key: (path(f"10.0.0.{n}", 40, by),) for n, (key, by) in enumerate(cables.items())})
    matrix = jaccl_matrix(["a", "b", "c"], infos, found)
    assert matrix is not None
    devices, leader = matrix
    assert devices == ("", "rdma_en3", "rdma_en4", "rdma_en3", "", "rdma_en4", "rdma_en3", "rdma_en4", "")
    assert leader.startswith("10.0.0.1:")
    without = {**infos, "b": info("b", rdma=("en3",))}
    assert jaccl_matrix(["a", "b", "c"], without, found) is None


@dataclass
class Played:
    """A node of a made-up network.

    Attributes:
        reaches: bits per second by address.
        busy: all nodes in a measurement now; shared.
    """

    id: str
    reaches: dict[str, float]
    busy: set[str]
    owner: Callable[[str], str]
    asked: list[str] = field(default_factory=list)

    async def measure(self, addresses: Sequence[str], seconds: float, certificate: bytes) -> tuple[Measured, ...]:
        assert {certificate} == {f"of {self.owner(address)}".encode() for address in addresses}
        ends = {self.id, *(self.owner(address) for address in addresses)}
        assert not ends & self.busy, "nobody is in two measurements at once"
        self.busy |= ends
        await asyncio.sleep(0)
        self.busy -= ends
        self.asked += addresses
        return tuple(
            Measured(address, self.reaches.get(address, 0.0), seconds / 100, "en0", "" if self.reaches else "cut")
            for address in addresses
        )


def certificates(ids: Iterable[str]) -> dict[str, bytes]:
    return {key: f"of {key}".encode() for key in ids}


class Gone:
    async def measure(self, addresses: Sequence[str], seconds: float, certificate: bytes) -> tuple[Measured, ...]:
        raise NodeLost("Mini cannot be reached")


def test_all_pairs_are_measured_one_at_a_time_for_each_node() -> None:
    infos = {name: info(name, ("en0", "ethernet", f"10.0.0.{n}")) for n, name in enumerate("abcde", start=1)}
    ids = {f"10.0.0.{n}:7": name for n, name in enumerate("abcde", start=1)}
    busy: set[str] = set()
    nodes = {name: Played(name, dict.fromkeys(ids, 1e9), busy, ids.__getitem__) for name in "abcde"}
    found = asyncio.run(measure_links({name: (nodes[name], infos[name]) for name in nodes}, certificates(nodes), 0.2))
    assert len(found.found) == 20
    assert found.found["a", "c"] == (Path("10.0.0.3:7", "ethernet", "en0", 1e9, 0.002),)
    assert sorted(nodes["a"].asked) == ["10.0.0.2:7", "10.0.0.3:7", "10.0.0.4:7", "10.0.0.5:7"]


def test_the_fastest_address_comes_first_and_cut_ones_are_left_out() -> None:
    owner = {"169.254.1.2:7": "air", "10.0.0.2:7": "air", "169.254.1.1:7": "studio", "10.0.0.1:7": "studio"}
    studio = Played("studio", {"169.254.1.2:7": 1e8, "10.0.0.2:7": 6e8}, set(), owner.__getitem__)
    air = Played("air", {"10.0.0.1:7": 5e8}, studio.busy, owner.__getitem__)
    nodes = {"studio": (studio, STUDIO), "air": (air, AIR)}
    found = asyncio.run(measure_links(nodes, certificates(nodes), 0.2))
    assert [way.address for way in found.found["studio", "air"]] == ["10.0.0.2:7", "169.254.1.2:7"]
    assert [way.address for way in found.found["air", "studio"]] == ["10.0.0.1:7"]


def test_a_node_that_goes_while_measuring_is_not_reached() -> None:
    owner = {"10.0.0.3:7": "mini", "10.0.0.4:7": "mini"}
    studio = Played("studio", {"10.0.0.3:7": 1e9}, set(), owner.__getitem__)
    nodes: dict[str, tuple[Measuring, NodeInfo]] = {"studio": (studio, STUDIO), "mini": (Gone(), MINI)}
    found = asyncio.run(measure_links(nodes, certificates(nodes), 0.2))
    assert found.between()["mini", "studio"].bits_per_second == 0.0


class LateOnce(Played):
    """Answers nothing in time when it is asked for the first time."""

    async def measure(self, addresses: Sequence[str], seconds: float, certificate: bytes) -> tuple[Measured, ...]:
        results = await super().measure(addresses, seconds, certificate)
        if len(self.asked) > len(addresses):
            return results
        return tuple(Measured(result.address, 0.0, 0.0, error="timed out") for result in results)


def test_who_is_late_once_is_asked_again() -> None:
    owner = {"10.0.0.1:7": "a", "10.0.0.2:7": "b"}
    infos = {name: info(name, ("en0", "ethernet", f"10.0.0.{n}")) for n, name in enumerate("ab", start=1)}
    first = LateOnce("a", {"10.0.0.2:7": 1e9}, set(), owner.__getitem__)
    other = Played("b", {"10.0.0.1:7": 1e9}, first.busy, owner.__getitem__)
    nodes = {"a": (first, infos["a"]), "b": (other, infos["b"])}
    found = asyncio.run(measure_links(nodes, certificates(nodes), 0.2))
    assert found.between()["a", "b"].bits_per_second == 1e9
    assert (first.asked, other.asked) == (["10.0.0.2:7"] * 2, ["10.0.0.1:7"])


def test_one_node_has_nothing_to_measure() -> None:
    assert asyncio.run(measure_links({"mini": (Gone(), MINI)}, certificates(("studio", "mini")), 0.2)).found == {}
