"""Who is paired: kept whole, seen by other programs, and never more than what was said."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from node.doctor.facts import peer_names
from node.errors import UserError
from node.identity import credentials
from node.peers import Peers, certificate_of, fingerprint, home_of, shown


def certificate(home: Path) -> bytes:
    return credentials(home).certificate


def test_peers_that_cannot_be_read_are_not_taken_for_none(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    assert (peers.all(), peers.trouble) == ((), "")
    assert peer_names(tmp_path) == ()
    # Rights would not keep root out; whatever the system refuses is an OSError.
    (tmp_path / "peers").write_text("no folder")
    assert peers.all() == ()
    assert "Not a directory" in peers.trouble
    assert peer_names(tmp_path) is None
    (tmp_path / "peers").unlink()
    added = peers.add("Air", certificate(tmp_path / "air"))
    assert (peers.all(), peers.trouble) == ((added,), "")
    record = tmp_path / "peers" / f"{added.home}.json"
    record.unlink()
    record.mkdir()  # one of them alone
    assert peers.all() == (added,), "what was known holds"
    assert peer_names(tmp_path) is None


def test_a_certificate_names_its_home_and_nothing_else_does(tmp_path: Path) -> None:
    one, other = credentials(tmp_path / "one"), credentials(tmp_path / "other")
    assert home_of(one.certificate) == one.home
    assert fingerprint(one.certificate) != fingerprint(other.certificate)
    assert len(shown(fingerprint(one.certificate)).split()) == 8
    broken = one.certificate.replace(one.certificate[100:104], b"AAAA", 1)
    for wrong in (b"", b"x" * 10_000, one.certificate + other.certificate, broken, one.certificate[:-40]):
        with pytest.raises(UserError, match="certificate"):
            home_of(wrong)


def test_a_peer_is_kept_and_seen_by_other_programs(tmp_path: Path) -> None:
    ours, theirs = credentials(tmp_path / "ours"), credentials(tmp_path / "theirs")
    peers, others = Peers(tmp_path / "ours"), Peers(tmp_path / "ours")
    assert others.all() == ()
    peer = peers.add("Air\x1b[2J of\nAnna" + "x" * 200, theirs.certificate)
    assert others.all() == (peer,)
    assert peer.name == ("Air[2J ofAnna" + "x" * 200)[:80]
    assert (tmp_path / "ours" / "peers" / f"{theirs.home}.json").stat().st_mode & 0o777 == 0o600
    assert others.get(theirs.home) == others.with_fingerprint(fingerprint(theirs.certificate)) == peer
    assert certificate_of(theirs.home, ours, others) == theirs.certificate
    assert certificate_of(ours.home, ours, others) == ours.certificate
    assert certificate_of("0" * 16, ours, others) is None
    assert others.remove(theirs.home)
    assert not others.remove(theirs.home)
    assert not others.remove("../../x")
    assert peers.all() == ()


def test_others_are_not_forgotten_with_one_that_goes(tmp_path: Path) -> None:
    """Nor all of them when the disk is away for a while."""
    ours = tmp_path / "ours"
    peers, others = Peers(ours), Peers(ours)
    stays = peers.add("Air", certificate(tmp_path / "air"))
    passing = certificate(tmp_path / "passing")
    done = threading.Event()

    def change() -> None:
        for _ in range(300):
            peers.remove(peers.add("Mini", passing).home)
        done.set()

    changing = threading.Thread(target=change)
    changing.start()
    while not done.is_set():
        assert stays in others.all()
    changing.join()
    assert others.all() == (stays,)
    ours.rename(tmp_path / "away")
    assert others.all() == (stays,)
    ours.mkdir()
    assert others.all() == ()


def test_a_person_means_a_peer_by_name_id_or_fingerprint(tmp_path: Path) -> None:
    peers = Peers(tmp_path / "ours")
    air = peers.add("Air", certificate(tmp_path / "air"))
    mini = peers.add("Mini", certificate(tmp_path / "mini"))
    again = peers.add("Mini", certificate(tmp_path / "again"))
    assert peers.find("air") == (air,)
    assert set(peers.find("Mini")) == {mini, again}
    assert peers.find(mini.home) == (mini,)
    assert peers.find(shown(again.fingerprint)) == (again,)
    assert peers.find(again.fingerprint[:4]) == ()
    assert peers.find("Studio") == ()


def test_a_record_that_was_tampered_with_is_nobody(tmp_path: Path) -> None:
    peers = Peers(tmp_path / "ours")
    peer = peers.add("Air", certificate(tmp_path / "air"))
    path = tmp_path / "ours" / "peers" / f"{peer.home}.json"
    record = json.loads(path.read_text())
    stranger = certificate(tmp_path / "stranger").decode()
    for number, content in enumerate(("", "[]", "{}", json.dumps(record | {"certificate": stranger}), "[" * 10_000)):
        path.write_text(content)
        os.utime(path, ns=(number, number))
        assert peers.all() == ()
