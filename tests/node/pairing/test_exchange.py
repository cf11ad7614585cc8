"""Who learns what in a pairing, without sockets."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from node.identity import credentials
from node.pairing.exchange import Coordinator, Node, Party, Unproven, read_hello
from node.pairing.messages import Garbled, Kind, pack, unpack
from node.peers import der_of


@pytest.fixture
def studio(tmp_path: Path) -> Party:
    return Party("Studio", credentials(tmp_path / "studio").certificate)


@pytest.fixture
def air(tmp_path: Path) -> Party:
    return Party("Air", credentials(tmp_path / "air").certificate)


@pytest.fixture
def mallory(tmp_path: Path) -> Party:
    return Party("Mallory", credentials(tmp_path / "mallory").certificate)


def begin(studio: Party, air: Party, code: bytes = b"1", shown: bytes = b"1") -> tuple[Coordinator, Node, bytes]:
    """A coordinator, a node, and the coordinator's proof."""
    ours = Coordinator(studio, "code", code)
    theirs = Node(air, read_hello(ours.hello()), shown)
    return ours, theirs, ours.prove(theirs.challenge())


def test_both_learn_the_others_name_and_certificate(studio: Party, air: Party) -> None:
    ours, theirs, proof = begin(studio, air)
    assert ours.check(theirs.check(proof)) == air
    assert theirs.end(ours.kept()) == studio
    ours.end(theirs.done())


def test_names_and_secret_are_not_to_be_read_on_the_way(studio: Party, air: Party) -> None:
    ours, theirs, proof = begin(studio, air, b"code 12345678", b"code 12345678")
    answer = theirs.check(proof)
    ours.check(answer)
    said = ours.hello() + proof + answer + ours.kept()
    assert not [word for word in (b"Studio", b"Air", b"1234") if word in said]


def test_a_wrong_code_proves_nothing_to_either(studio: Party, air: Party) -> None:
    _, theirs, proof = begin(studio, air, b"1", b"2")
    with pytest.raises(Unproven):
        theirs.check(proof)
    ours, rogue, proof = begin(studio, air, b"1", b"2")
    with pytest.raises(Unproven):
        rogue.check(proof)
    for forged in (pack(Kind.ANSWER, bytes(32), bytes(40)), pack(Kind.ANSWER, unpack(proof, Kind.PROOF)[1], bytes(40))):
        with pytest.raises(Unproven):  # not by its own proof sent back, either
            ours.check(forged)


def test_a_replaced_certificate_is_another_secret(studio: Party, air: Party, mallory: Party) -> None:
    ours = Coordinator(studio, "code", b"1")
    hello = pack(Kind.HELLO, unpack(ours.hello(), Kind.HELLO)[0], der_of(mallory.certificate), b"code")
    theirs = Node(air, read_hello(hello), b"1")
    with pytest.raises(Unproven):
        theirs.check(ours.prove(theirs.challenge()))

    ours = Coordinator(studio, "code", b"1")
    theirs = Node(air, read_hello(ours.hello()), b"1")
    message = unpack(theirs.challenge(), Kind.CHALLENGE)[1]
    with pytest.raises(Unproven):
        theirs.check(ours.prove(pack(Kind.CHALLENGE, der_of(mallory.certificate), message)))


def test_what_is_wanted_is_bound_too(studio: Party, air: Party) -> None:
    ours = Coordinator(studio, "code", b"1")
    label, certificate, _ = unpack(ours.hello(), Kind.HELLO)
    theirs = Node(air, read_hello(pack(Kind.HELLO, label, certificate, b"token:1234")), b"1")
    with pytest.raises(Unproven):
        theirs.check(ours.prove(theirs.challenge()))


def test_a_recorded_proof_proves_nothing_again(studio: Party, air: Party) -> None:
    ours, _, proof = begin(studio, air)
    again = Node(air, read_hello(ours.hello()), b"1")
    again.challenge()
    with pytest.raises(Unproven):
        again.check(proof)


@pytest.mark.parametrize(
    "point", [b"", b"A", b"A" + bytes(32), b"A\x01" + bytes(31), b"A" + b"\xff" * 32, b"A" + b"\xfe" * 32, b"B" * 33]
)
def test_no_bad_point_is_taken(studio: Party, air: Party, point: bytes) -> None:
    _, theirs, proof = begin(studio, air)
    with pytest.raises(Garbled):
        theirs.check(pack(Kind.PROOF, point, unpack(proof, Kind.PROOF)[1]))


def test_points_of_chance_are_points_or_refused(studio: Party, air: Party) -> None:
    for number in range(100):
        _, theirs, proof = begin(studio, air)
        point = b"A" + sha256(bytes([number])).digest()
        with pytest.raises((Garbled, Unproven)):
            theirs.check(pack(Kind.PROOF, point, unpack(proof, Kind.PROOF)[1]))


def test_changed_names_are_seen(studio: Party, air: Party) -> None:
    ours, theirs, proof = begin(studio, air)
    proven, sealed = unpack(theirs.check(proof), Kind.ANSWER)
    with pytest.raises(Unproven):
        ours.check(pack(Kind.ANSWER, proven, sealed[:-1] + bytes([sealed[-1] ^ 1])))
    ours.check(pack(Kind.ANSWER, proven, sealed))
    with pytest.raises(Unproven):
        theirs.end(pack(Kind.KEPT, sealed))  # its own words, sent back
    theirs.end(ours.kept())
