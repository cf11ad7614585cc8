"""Who cannot be paired, on real sockets: strangers, liars, those in the middle, and those who come too late."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from coordinator import pairing as pairings
from coordinator.invites import Invites
from coordinator.pairing import Pairing, Place, WrongCode
from node.errors import NodeError, TandemError, UserError
from node.identity import credentials
from node.pairing import messages
from node.pairing.desk import Desk
from node.pairing.exchange import Coordinator, Party, Unproven, read_hello
from node.pairing.exchange import Node as NodeSide
from node.pairing.listener import BURST, HELLO_SECONDS, MOST_CONNECTIONS
from node.pairing.messages import Garbled, Kind, Refused, pack, unpack
from node.pairing.secrets import CODE_SECONDS, CODE_TRIES, Secret, code_secret
from node.pairing.tokens import Token, new_token
from node.peers import Peers, der_of, fingerprint
from tests.fixtures.desks import pairable

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(limited())


def other_than(code: str) -> str:
    return f"{(int(code) + 1) % 10**8:08}"


def friends(home: Path) -> list[str]:
    return [peer.name for peer in Peers(home).all()]


def nobody_is_paired(*homes: Path) -> bool:
    return all(friends(home) == [] for home in homes)


@pytest.fixture
def air(tmp_path: Path) -> Path:
    return tmp_path / "air"


@pytest.fixture
def studio(tmp_path: Path) -> Path:
    return tmp_path / "studio"


@pytest.fixture
def mallory(tmp_path: Path) -> Path:
    return tmp_path / "mallory"


@asynccontextmanager
async def listening(
    visit: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Place]:
    """Somebody else's listener, where a coordinator takes a node to be."""
    visits: set[asyncio.Task[None]] = set()

    async def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        visits.add(task)
        try:
            with suppress(Garbled, Refused, Unproven, OSError):
                await visit(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.transport.abort()
            visits.discard(task)

    server = await asyncio.start_server(visited, "127.0.0.1", 0)
    try:
        yield Place("Air", (("127.0.0.1", server.sockets[0].getsockname()[1]),))
    finally:
        server.close()
        for task in tuple(visits):
            task.cancel()
        await asyncio.gather(*visits, return_exceptions=True)


async def connect(place: Place) -> Streams:
    return await asyncio.open_connection(*place.addresses[0])


Change = Callable[[bytes], bytes | None]


@asynccontextmanager
async def middle(
    node: Place,
    upwards: Change = lambda said: said,
    downwards: Change = lambda said: said,
    said: list[bytes] | None = None,
) -> AsyncIterator[Place]:
    """Somebody between the two, who hands on what he likes and writes down what the coordinator says."""

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await connect(node)

        async def hand_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, change: Change) -> None:
            while True:
                content = await messages.read(source)
                if change is upwards and said is not None:
                    said.append(content)
                if (changed := change(content)) is not None:
                    await messages.write(target, changed)

        ways = [hand_on(reader, back, upwards), hand_on(there, writer, downwards)]
        both = [asyncio.ensure_future(way) for way in ways]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            back.transport.abort()
            for way in both:
                way.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async with listening(visit) as place:
        yield place


# --- the code -------------------------------------------------------------------------------------------------------


def test_the_right_code_pairs_and_only_once(studio: Path, air: Path, mallory: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            place, code = node.place, node.code
            peer = await Pairing(studio, "Studio").by_code(place, code)
            assert (peer.name, friends(studio), node.friends) == ("Air", ["Air"], ["Studio"])
            with pytest.raises(TandemError):
                await Pairing(mallory, "Mallory").by_code(place, code)
            assert node.friends == ["Studio"]
            assert nobody_is_paired(mallory)

    run(work)


def test_a_sixth_try_is_refused_even_with_the_right_code(studio: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            place, code = node.place, node.code
            pairing = Pairing(studio, "Studio")
            for _ in range(CODE_TRIES):
                with pytest.raises(WrongCode, match="wrong, or somebody else answers"):
                    await pairing.by_code(place, other_than(code))
                node.clock.now += 60
            with pytest.raises(TandemError, match="node pair"):
                await pairing.by_code(place, code)
            assert nobody_is_paired(studio, air)
            assert node.events().count("wrong_code") == CODE_TRIES
            assert node.events()[-1] == "pairing_over"
            assert node.desk.entries == {}
            await node.desk.new_code()
            assert (await pairing.by_code(node.place, node.code)).name == "Air"

    run(work)


def test_tries_are_counted_over_all_who_try_and_never_two_at_once(tmp_path: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            wrong = code_secret(other_than(node.code))
            waiting = []
            for number in range(CODE_TRIES + 1):  # all get their challenge first, then all prove
                party = Party("Mallory", credentials(tmp_path / f"mallory{number}").certificate)
                side = Coordinator(party, "code", wrong)
                reader, writer = await connect(node.place)
                await messages.write(writer, side.hello())
                waiting.append((reader, writer, side.prove(await messages.read(reader))))
            for _, writer, proof in waiting:
                await messages.write(writer, proof)
            answers = []
            for reader, writer, _ in waiting:
                with pytest.raises(Refused) as caught:
                    unpack(await messages.read(reader), Kind.ANSWER)
                answers.append(caught.value.reason)
                writer.transport.abort()
            assert sorted(answers) == ["wait"] * CODE_TRIES + ["wrong"]
            assert nobody_is_paired(air)

    run(work)


def test_a_right_code_counts_at_the_last_try_and_not_after_a_new_one(studio: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            pairing, old = Pairing(studio, "Studio"), node.code
            await node.desk.new_code()
            if old != node.code:
                with pytest.raises(WrongCode):
                    await pairing.by_code(node.place, old)
                node.clock.now += 60
            while node.desk._code is not None and node.desk._code._wrong < CODE_TRIES - 1:
                with pytest.raises(WrongCode):
                    await pairing.by_code(node.place, other_than(node.code))
                node.clock.now += 60
            await pairing.by_code(node.place, node.code)
            assert (friends(studio), node.friends) == (["Air"], ["Studio"])

    run(work)


def test_an_expired_code_is_refused(studio: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            place, code = node.place, node.code
            node.clock.now += CODE_SECONDS
            with pytest.raises(UserError, match="expired"):
                await Pairing(studio, "Studio").by_code(place, code)
            await node.desk.look()
            assert "expired" in node.told[-1].line
            with pytest.raises(NodeError, match="no node waits there"):
                await Pairing(studio, "Studio").by_code(place, code)
            assert nobody_is_paired(studio, air)

    run(work)


def test_of_two_who_pair_at_once_one_is_taken(studio: Path, air: Path, mallory: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            both = [Pairing(home, home.name).by_code(node.place, node.code) for home in (studio, mallory)]
            results = await asyncio.gather(*both, return_exceptions=True)
            won = [home for home in (studio, mallory) if friends(home)]
            assert [home.name for home in won] == node.friends
            assert len(won) == 1
            assert sum(isinstance(result, TandemError) for result in results) == 1

    run(work)


def test_one_coordinator_pairs_two_nodes_at_once(studio: Path, air: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pairable(air, "Air") as one, pairable(tmp_path / "mini", "Mini") as two:
            pairing = Pairing(studio, "Studio")
            await asyncio.gather(*(pairing.by_code(node.place, node.code) for node in (one, two)))
            assert friends(studio) == ["Air", "Mini"]
            assert one.friends == two.friends == ["Studio"]

    run(work)


# --- in the middle --------------------------------------------------------------------------------------------------


def replaced(kind: Kind, field: int, certificate: bytes) -> Change:
    """Puts a certificate of one's own into frames of a kind."""

    def change(content: bytes) -> bytes:
        if content[0] != kind:
            return content
        fields = list(unpack(content, kind))
        fields[field] = der_of(certificate)
        return pack(kind, *fields)

    return change


@pytest.mark.parametrize("ends", ["both", "coordinator", "node"])
def test_whoever_puts_his_certificates_in_between_gets_nothing(
    studio: Path, air: Path, mallory: Path, ends: str
) -> None:
    async def work() -> None:
        his = credentials(mallory).certificate
        up: Change = replaced(Kind.HELLO, 1, his) if ends != "node" else lambda said: said
        down: Change = replaced(Kind.CHALLENGE, 0, his) if ends != "coordinator" else lambda said: said
        async with pairable(air) as node, middle(node.place, up, down) as place:
            with pytest.raises(WrongCode, match="nothing was kept"):
                await Pairing(studio, "Studio").by_code(place, node.code)
            assert node.events()[-1] == "wrong_code"
            assert nobody_is_paired(studio, air)

    run(work)


@pytest.mark.parametrize("kind", [Kind.CHALLENGE, Kind.PROOF, Kind.ANSWER])
def test_nothing_can_be_changed_on_the_way(studio: Path, air: Path, kind: Kind) -> None:
    def change(content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1]) if content[0] == kind else content

    async def work() -> None:
        async with pairable(air) as node, middle(node.place, change, change) as place:
            with pytest.raises(TandemError):
                await Pairing(studio, "Studio").by_code(place, node.code)
            assert nobody_is_paired(studio, air)

    run(work)


def test_the_node_keeps_nobody_whose_last_word_was_changed(studio: Path, air: Path) -> None:
    def change(content: bytes) -> bytes:
        return content[:-1] + bytes([content[-1] ^ 1]) if content[0] == Kind.KEPT else content

    async def work() -> None:
        async with pairable(air) as node, middle(node.place, change) as place:
            with pytest.raises(NodeError, match="did not say that it trusts this machine"):
                await Pairing(studio, "Studio").by_code(place, node.code)
            assert nobody_is_paired(air)
            assert friends(studio) == ["Air"], "which has proven that it knows the code"
            await Pairing(studio, "Studio").by_code(node.place, node.code)  # the code was not used up
            assert node.friends == ["Studio"]

    run(work)


def test_what_was_recorded_opens_nothing(studio: Path, air: Path) -> None:
    async def work() -> None:
        said: list[bytes] = []
        async with pairable(air) as node, middle(node.place, said=said) as place:
            await Pairing(studio, "Studio").by_code(place, node.code)
            assert [content[0] for content in said] == [Kind.HELLO, Kind.PROOF, Kind.KEPT]
            Peers(air).remove(credentials(studio).home)
            again = Secret.code(node.clock)
            again.value = code_secret("00000000")
            await node.desk.new_code()
            node.desk._code = again  # the same as the recorded one is no likelier to help
            reader, writer = await connect(node.place)
            await messages.write(writer, said[0])
            unpack(await messages.read(reader), Kind.CHALLENGE)
            for content in said[1:]:
                await messages.write(writer, content)
            with pytest.raises(Refused, match="wrong"):
                unpack(await messages.read(reader), Kind.ANSWER)
            writer.transport.abort()
            assert nobody_is_paired(air)

    run(work)


# --- rogue nodes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["guesses", "claims", "agrees", "reflects"])
def test_a_node_that_does_not_know_the_code_is_not_kept(studio: Path, mallory: Path, how: str) -> None:
    heard: list[bytes] = []

    async def rogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        us = Party("Air", credentials(mallory).certificate)
        side = NodeSide(us, read_hello(await messages.read(reader)), code_secret("11111111"))
        await messages.write(writer, side.challenge())
        proof = await messages.read(reader)
        heard.append(proof)
        if how == "guesses":
            with suppress(Unproven):
                side.check(proof)
        answer = {
            "guesses": pack(Kind.ANSWER, os.urandom(32), os.urandom(19)),
            "claims": pack(Kind.ANSWER, b"", b"Air"),
            "agrees": pack(Kind.DONE, b""),
            "reflects": pack(Kind.ANSWER, unpack(proof, Kind.PROOF)[1], os.urandom(19)),
        }[how]
        await messages.write(writer, answer)
        heard.append(await messages.read(reader))

    async def work() -> None:
        async with listening(rogue) as place:
            with pytest.raises(TandemError, match="nothing was kept"):
                await Pairing(studio, "Studio").by_code(place, "12345678")
        assert len(heard) == 1, "one guess, and neither a name nor trust"
        assert nobody_is_paired(studio)

    run(work)


def test_a_rogue_node_gets_one_guess_for_each_time_that_a_person_types(studio: Path, mallory: Path) -> None:
    proofs = []

    async def rogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        us = Party("Air", credentials(mallory).certificate)
        side = NodeSide(us, read_hello(await messages.read(reader)), code_secret("11111111"))
        await messages.write(writer, side.challenge())
        proofs.append(await messages.read(reader))
        await messages.write(writer, messages.refusal("wait", 0))

    async def work() -> None:
        async with listening(rogue) as place:
            with pytest.raises(TandemError):
                await Pairing(studio, "Studio").by_code(place, "12345678")
        assert len(proofs) == 1
        assert nobody_is_paired(studio)

    run(work)


@pytest.mark.parametrize("said", [b"", b"\0\0", b"\xff" * 50_000, b"HTTP/1.1 200 OK\r\n\r\n", b"\0\x02\x07\x00"])
def test_a_coordinator_survives_any_answer(studio: Path, said: bytes) -> None:
    async def rogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        writer.close()

    async def work() -> None:
        async with listening(rogue) as place:
            for attempt in (Pairing(studio, "Studio").by_code(place, "12345678"), Pairing(studio, "Studio").ask(place)):
                with pytest.raises(NodeError):
                    await attempt
        assert nobody_is_paired(studio)

    run(work)


# --- tokens ---------------------------------------------------------------------------------------------------------


def invited(home: Path, seconds: float = 60.0) -> Token:
    return Invites(home).new(fingerprint(credentials(home).certificate), seconds)


def test_a_token_joins_once(studio: Path, air: Path, tmp_path: Path) -> None:
    async def work() -> None:
        token = invited(studio)
        file = studio / "invites" / f"{token.id}.json"
        assert file.stat().st_mode & 0o777 == 0o600
        async with pairable(air, token=token) as node, pairable(tmp_path / "mini", "Mini", token) as late:
            pairing = Pairing(studio, "Studio")
            await pairing.by_token(node.place)
            assert (friends(studio), node.friends) == (["Air"], ["Studio"])
            assert token.secret.hex() not in file.read_text()
            with pytest.raises(UserError, match="used already"):
                await pairing.by_token(late.place)
            assert late.friends == []
        async with pairable(air, token=token) as again:  # as launchd starts it each time
            assert again.desk.entries == {}
            assert again.told == []
        Peers(air).remove(credentials(studio).home)
        async with pairable(air, token=token) as revoked:
            assert "join" not in revoked.desk.entries
            assert "used already" in revoked.told[0].line
            assert revoked.friends == []

    run(work)


@pytest.mark.parametrize("kind", [Kind.KEPT, Kind.DONE])
def test_a_pairing_whose_last_word_is_lost_is_said_and_can_be_finished(
    studio: Path, air: Path, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairings, "EXCHANGE_SECONDS", 2.0)

    def lost(content: bytes) -> bytes | None:
        return None if content[0] == kind else content

    async def work() -> None:
        token = invited(studio)
        pairing = Pairing(studio, "Studio")
        async with pairable(air, token=token) as node, pairable(tmp_path / "mini", "Mini", token) as other:
            async with middle(node.place, lost, lost) as between:
                cut = Place("Air", between.addresses, node.place.join)
                with pytest.raises(NodeError, match="Air is trusted here now, but did not say that it trusts"):
                    await pairing.by_token(cut)
            assert friends(studio) == ["Air"]
            assert node.friends == ([] if kind == Kind.KEPT else ["Studio"])
            with pytest.raises(UserError, match="used already"):
                await pairing.by_token(other.place)
            assert (friends(studio), other.friends) == (["Air"], [])
            if kind == Kind.KEPT:
                async with asyncio.timeout(5):
                    while not node.desk.entries.get("join"):
                        await asyncio.sleep(0.01)
                await pairing.by_token(node.place)
                assert node.friends == ["Studio"]
                assert pairing.token_problem(Place("Air", (), token.id)) == "used"

    run(work)


def test_who_shows_the_coordinators_certificate_is_not_taken_for_it(studio: Path, air: Path) -> None:
    async def work() -> None:
        token = invited(studio)
        async with pairable(air, token=token) as node:
            _, writer = await connect(node.place)
            replayed = Coordinator(Party("", credentials(studio).certificate), "", b"")
            await messages.write(writer, replayed.hello())
            await messages.write(writer, messages.refusal("used"))
            async with asyncio.timeout(5):
                while not node.told:
                    await asyncio.sleep(0.01)
            writer.close()
            assert "somebody who calls himself the coordinator" in node.told[0].line
            await Pairing(studio, "Studio").by_token(node.place)
            assert node.friends == ["Studio"]

    run(work)


def test_a_token_that_has_expired_is_refused_in_words_on_both_sides(studio: Path, air: Path) -> None:
    async def work() -> None:
        token = invited(studio, seconds=0.0)
        async with pairable(air, token=token) as node:
            pairing = Pairing(studio, "Studio")
            with pytest.raises(UserError, match="expired"):
                await pairing.by_token(node.place)
            await pairing.ask(node.place, pairing.token_problem(node.place))
            async with asyncio.timeout(5):
                while not node.told:
                    await asyncio.sleep(0.01)
            assert "expired" in node.told[0].line
            assert nobody_is_paired(studio, air)

    run(work)


def test_a_token_is_for_the_coordinator_that_printed_it(studio: Path, air: Path, mallory: Path) -> None:
    async def work() -> None:
        token = invited(studio)
        async with pairable(air, token=token) as node:
            his = Pairing(mallory, "Mallory")
            with pytest.raises(UserError, match="another coordinator"):
                await his.by_token(node.place)
            # He has the token itself, but another certificate.
            Invites(mallory)._folder.mkdir()
            stolen = (studio / "invites" / f"{token.id}.json").read_bytes()
            (mallory / "invites" / f"{token.id}.json").write_bytes(stolen)
            with pytest.raises(UserError, match="another coordinator"):
                await his.by_token(node.place)
            # He shows the right certificate, which anybody has seen, and does not have the token.
            party = Party("Mallory", credentials(studio).certificate)
            side = Coordinator(party, f"token:{token.id}", new_token("00" * 32).password)
            for _ in range(2 * CODE_TRIES):
                reader, writer = await connect(node.place)
                await messages.write(writer, side.hello())
                proof = Coordinator(party, f"token:{token.id}", b"token").prove(await messages.read(reader))
                await messages.write(writer, proof)
                with pytest.raises(Refused, match="wrong"):
                    unpack(await messages.read(reader), Kind.ANSWER)
                writer.transport.abort()
            assert nobody_is_paired(air, mallory)
            await Pairing(studio, "Studio").by_token(node.place)  # nobody could void it
            assert node.friends == ["Studio"]

    run(work)


# --- strangers ------------------------------------------------------------------------------------------------------


def test_garbage_gets_no_answer_and_does_no_harm(studio: Path, air: Path) -> None:
    async def work() -> None:
        chance = random.Random(3)
        async with pairable(air) as node:
            hello = Coordinator(Party("Studio", credentials(studio).certificate), "code", b"1").hello()
            for number in range(600):
                content = bytearray(hello)
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                said = (
                    struct.pack(">H", len(content)) + content if number % 3 else chance.randbytes(chance.randrange(99))
                )
                reader, writer = await connect(node.place)
                writer.write(said)
                writer.write_eof()
                with suppress(ConnectionError):
                    answer = await reader.read(8192)
                    # A changed bit may leave a right certificate of another key, or another wish.
                    assert not answer or answer[2] in (Kind.CHALLENGE, Kind.REFUSED), answer
                    assert b"Air" not in answer
                writer.transport.abort()
            node.desk._listener._pace.left = BURST  # type: ignore[union-attr]
            await Pairing(studio, "Studio").by_code(node.place, node.code)
            assert node.friends == ["Studio"]

    run(work)


def test_connections_that_say_nothing_take_no_room(studio: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            open_before = len(os.listdir("/dev/fd"))
            silent = [await connect(node.place) for _ in range(300)]
            listener = node.desk._listener
            assert listener is not None
            await asyncio.sleep(0)
            assert listener.connections <= MOST_CONNECTIONS
            assert len(os.listdir("/dev/fd")) - open_before - len(silent) <= MOST_CONNECTIONS + 2
            await Pairing(studio, "Studio").by_code(node.place, node.code)
            assert node.friends == ["Studio"]
            for _, writer in silent:
                writer.transport.abort()

    run(work)


def test_the_silent_are_sent_away_by_time(air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            reader, writer = await connect(node.place)
            writer.write(b"\0")
            async with asyncio.timeout(HELLO_SECONDS + 3):
                with suppress(ConnectionError):
                    assert await reader.read() == b""
            listener = node.desk._listener
            assert listener is not None
            assert listener.connections == 0
            writer.transport.abort()

    run(work)


def test_a_stranger_learns_neither_names_nor_version(studio: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air, "Annas Air") as node:
            heard = b""
            for wants in ("", "code", "token:0011223344", "anything"):
                reader, writer = await connect(node.place)
                side = Coordinator(Party("x", credentials(studio).certificate), wants, b"1")
                await messages.write(writer, side.hello())
                heard += await messages.read(reader)
                writer.transport.abort()
            assert b"Annas" not in heard
            assert b"0.1" not in heard.replace(der_of(credentials(air).certificate), b"")
            assert nobody_is_paired(air)

    run(work)


def test_a_paired_node_listens_no_more(studio: Path, air: Path) -> None:
    async def work() -> None:
        async with pairable(air) as node:
            place = node.place
            await Pairing(studio, "Studio").by_code(place, node.code)
            async with asyncio.timeout(5):
                while node.desk.entries:
                    await asyncio.sleep(0.01)
            with pytest.raises(OSError, match="Connect call failed"):
                await connect(place)
        async with pairable(air) as again:
            assert isinstance(again.desk, Desk)
            assert again.desk.entries == {}

    run(work)
