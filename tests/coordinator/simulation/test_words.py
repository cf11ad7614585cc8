"""Machines and links as people write them."""

from __future__ import annotations

import pytest

from coordinator.ring_order import Link
from coordinator.simulation.fleets import Wire
from coordinator.simulation.words import USUAL_WIRES, parse_link, parse_machine
from node.errors import UserError

NAMES = ["Studio", "Mac-Air", "mini"]


@pytest.mark.parametrize(
    ("text", "name", "count", "tokens_per_second"),
    [
        ("Studio: 12000", "Studio", 1, 12000),
        ("Studio:12,000", "Studio", 1, 12000),
        ("4 x mini: 2500.5", "mini", 4, 2500.5),
        ("4*mini:1e3", "mini", 4, 1000),
        ("Ben's Mac: 1: 10", "Ben's Mac: 1", 1, 10),
        ("2 Macs: 10", "2 Macs", 1, 10),
    ],
)
def test_machines(text: str, name: str, count: int, tokens_per_second: float) -> None:
    kind = parse_machine(text, "--machine")
    assert (kind.name, kind.count) == (name, count)
    assert 1 / kind.speed.seconds_per_position == pytest.approx(tokens_per_second)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Studio", "NAME: TOKENS_PER_SECOND"),
        (": 100", "NAME: TOKENS_PER_SECOND"),
        ("Studio: fast", "'fast' is no number of tokens per second above 0"),
        ("Studio: 0", "'0' is no number"),
        ("Studio: -5", "'-5' is no number"),
        ("Studio: nan", "'nan' is no number"),
        ("Studio: inf", "'inf' is no number"),
        ("0 x mini: 100", "1 to 64 machines"),
        ("65 x mini: 100", "1 to 64 machines"),
    ],
)
def test_what_is_no_machine(text: str, told: str) -> None:
    with pytest.raises(UserError, match="--machine") as error:
        parse_machine(text, "--machine")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "pair", "wire"),
    [
        ("wifi", None, USUAL_WIRES["wifi"]),
        ("Wi-Fi", None, USUAL_WIRES["wifi"]),
        ("10 GbE", None, USUAL_WIRES["10gbe"]),
        ("1 Gbit/s", None, Wire(Link(1e9, 0.0003), "switch")),
        ("200Mbit/s 5 ms", None, Wire(Link(200e6, 0.005), "switch")),
        ("16 gbps 0.1ms cable", None, Wire(Link(16e9, 0.0001), "cable")),
        ("300 Mbit/s 3 ms air", None, Wire(Link(300e6, 0.003), "air")),
        ("Studio - mini: thunderbolt", ("Studio", "mini"), USUAL_WIRES["thunderbolt"]),
        ("Studio-Mac-Air: 1 Gbit/s", ("Studio", "Mac-Air"), Wire(Link(1e9, 0.0003), "switch")),
        ("mini - mini: ethernet", ("mini", "mini"), USUAL_WIRES["ethernet"]),
    ],
)
def test_links(text: str, pair: tuple[str, str] | None, wire: Wire) -> None:
    found, told = parse_link(text, NAMES, "--link")
    assert found == pair
    assert told.medium == wire.medium
    assert told.link.bits_per_second == pytest.approx(wire.link.bits_per_second)
    assert told.link.latency_seconds == pytest.approx(wire.link.latency_seconds)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no link"),
        ("fast", "'fast' is no link"),
        ("0 Gbit/s", "is no link"),
        ("1 Gbit/s 1 ms string", "is no link"),
        ("Studio - Bob: wifi", "name two of the machines"),
        ("Studio: wifi", "name two of the machines"),
    ],
)
def test_what_is_no_link(text: str, told: str) -> None:
    with pytest.raises(UserError, match="--link") as error:
        parse_link(text, NAMES, "--link")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
