"""A node whose coordinator or worker goes away: what it keeps of the run, and how that is asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from node import listener, wire
from node.client import NodeClient, RemoteWorker
from node.copies import StateCopy
from node.errors import NodeError, NodeLost, UserError, WorkerLost
from node.events import Copied, Heartbeat, Joined, Ready, ReduceEntered, StepDone
from node.files import sha256_of
from node.holds import Holds
from node.home import holds
from node.identity import credentials
from node.info import RingPart
from node.peers import Peers
from node.spec import CopyState, FileRef, Join, Restore, RingSpec, Setup, Share, TrainStep
from tests.fixtures.models import tiny_model
from tests.fixtures.pairs import pair
from tests.fixtures.training import as_rows, random_batches
from tests.node.test_holds import RUN, write_copy
from tests.node.test_service import Node, at_home, ended, run, serving, until, worker_pid

BATCHES = random_batches(8, rows=4, seed=3)
FREE_SECONDS = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


async def begin(client: NodeClient, node: Node, *, copy_every: int = 1000) -> RemoteWorker:
    link = await client.open_worker(RUN, "anna")
    await link.send(Setup(node.job(job=RUN, copy_every=copy_every)))
    await until(link, Ready)
    return link


async def train(link: RemoteWorker, steps: Sequence[int]) -> list[StepDone]:
    for step in steps:
        await link.send(TrainStep(Share(step, (as_rows(BATCHES[step]),))))
    return [await until(link, StepDone) for _ in steps]


def told(held: StateCopy) -> list[int]:
    """The steps that a held state tells of."""
    events = [wire.decode_event(data)[1] for data in held.steps]
    assert all(isinstance(event, StepDone) for event in events)
    return [event.step for event in events if isinstance(event, StepDone)]


async def held_by(client: NodeClient) -> StateCopy:
    held = await client.held(RUN, FREE_SECONDS)
    assert held is not None
    return held


def test_a_coordinator_that_goes_leaves_the_newest_state_to_be_fetched_and_restored(
    tmp_path: Path, model: Path, tandem_home: Path
) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            other = NodeClient(node.address)
            link = await begin(other, node)
            done = await train(link, range(1, 5))
            pid = worker_pid(node)
            await other.close()
            held = await held_by(client)
            assert (await client.describe()).busy is None, "it answers when the node is free again"
            await ended(pid)
            assert held.step == 4
            assert [wire.decode_event(data)[1] for data in held.steps] == done
            assert not list((tandem_home / "jobs").glob("*/*")), "a log that says nothing is not kept"
            with pytest.raises(NodeLost):
                await link.receive()

            refs = []
            for file in held.files:
                await client.fetch_held(RUN, file, tmp_path / file.name)
                assert sha256_of(tmp_path / file.name) == file.sha256
                refs.append(FileRef(file.name, file.sha256, file.size))
            # A sitting that trains nothing changes nothing: what is held may be all there is.
            link = await client.open_worker(RUN, "anna")
            await link.close()
            assert await held_by(client) == held

            # The steps of this sitting are those after the state that it began with.
            link = await begin(client, node)
            for ref in refs:
                await link.give(ref, tmp_path / ref.name)
            await link.send(Restore(4, *refs))
            await train(link, range(5, 7))
            link.kill()
            held = await held_by(client)
            assert (held.step, told(held)) == (6, [5, 6])

    run(work)


def of_home(home: Path, node: Node, monkeypatch: pytest.MonkeyPatch) -> NodeClient:
    """A client of the node that a program of this home has."""
    theirs = node.trust.credentials.certificate
    with monkeypatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(home))
        return NodeClient(node.address, "Studio", theirs)


@pytest.mark.slow
def test_no_other_home_reads_drops_or_replaces_what_is_held_for_one(
    tmp_path: Path, model: Path, tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair(tandem_home, tmp_path / "ben")
    pair(tandem_home, tmp_path / "carla")

    async def trained(client: NodeClient, node: Node, steps: int, *, keep: bool) -> None:
        link = await begin(client, node)
        await train(link, range(1, steps + 1))
        link.keep_state = keep
        await link.close()

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, own)]:
            ben, carla = (of_home(tmp_path / name, node, monkeypatch) for name in ("ben", "carla"))

            async def steps() -> list[int]:
                found = [await client.held(RUN, FREE_SECONDS) for client in (ben, carla, own)]
                return [held.step if held is not None else 0 for held in found]

            link = await begin(ben, node)
            await train(link, [1, 2])
            # They see that it works on that run; they need not wait for what is none of theirs.
            assert await carla.held(RUN, 2.0) is None
            assert await own.held(RUN, 2.0) is None
            link.kill()
            held = await held_by(ben)
            assert await steps() == [2, 0, 0]
            for client in (carla, own):
                with pytest.raises(NodeError, match="nothing of that name is held"):
                    await client.fetch_held(RUN, held.weights, tmp_path / "stolen")
            # Whatever others do under the same name.
            await trained(carla, node, 1, keep=False)
            assert await steps() == [2, 0, 0]
            await trained(carla, node, 3, keep=True)
            await trained(own, node, 4, keep=True)
            assert await steps() == [2, 3, 4]
            await trained(own, node, 1, keep=False)
            assert await steps() == [2, 3, 0]
            await ben.fetch_held(RUN, held.weights, tmp_path / "fetched")
            # Paired anew it is the same home still.
            Peers(tandem_home).remove(credentials(tmp_path / "ben").home)
            await ben.close()
            pair(tandem_home, tmp_path / "ben")
            ben = of_home(tmp_path / "ben", node, monkeypatch)
            assert await held_by(ben) == held
            await trained(ben, node, 1, keep=False)
            assert await steps() == [0, 3, 0]
            for client in (ben, carla):
                await client.close()

    run(work)


def test_a_job_that_ends_in_peace_leaves_nothing(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            write_copy(tmp_path / "before", 1)
            holds().take(RUN, tmp_path / "before")
            assert (await held_by(client)).step == 1
            link = await begin(client, node)
            await train(link, [1, 2])
            await link.close()
            assert await client.held(RUN) is None

    run(work)


def test_a_coordinator_that_could_not_save_leaves_the_state(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node)
            await train(link, [1, 2])
            # Who asks while the job is on waits, but no longer than it said.
            with pytest.raises(NodeLost, match="did not answer in time"):
                await client.held(RUN, 0.3)
            await until(link, Heartbeat)
            asking = asyncio.create_task(client.held(RUN, FREE_SECONDS))
            link.keep_state = True
            await link.close()
            held = await asking
            assert held is not None
            assert held.step == 2

    run(work)


def test_a_worker_that_waits_for_a_rank_that_is_no_more_gives_its_last_state(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model, count=2) as pairs:
            others = [NodeClient(node.address) for node, _ in pairs]
            links = [await begin(other, node) for other, (node, _) in zip(others, pairs, strict=True)]
            routes = [secrets.token_bytes(16) for _ in pairs]
            for rank, link in enumerate(links):
                link.cancel()
                relay = f"127.0.0.1:{pairs[1 - rank][0].relay.port}"
                part = RingPart(rank, 2, "ring", routes[rank], routes[1 - rank], (relay,), 77, 20.0, 100.0)
                await link.form_ring(at_home(part))
            await asyncio.gather(*(until(link, Joined) for link in links))
            for rank, link in enumerate(links):
                await link.send(TrainStep(Share(1, (as_rows(BATCHES[1][2 * rank : 2 * rank + 2], 2 * rank),))))
            await asyncio.gather(*(until(link, StepDone) for link in links))
            # Only one of them is asked for the next step, and for some more: it waits for the other's sum.
            for step in (2, 3, 4):
                await links[0].send(TrainStep(Share(step, (as_rows(BATCHES[step]),))))
            while (await until(links[0], ReduceEntered)).step != 2:
                pass
            began = time.monotonic()
            await asyncio.gather(*(other.close() for other in others))
            for _, client in pairs:
                held = await held_by(client)
                assert (held.step, told(held)) == (1, [1])
            assert time.monotonic() - began < FREE_SECONDS

    run(work)


def test_a_node_that_is_stopped_keeps_the_state(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node)
            await train(link, [1, 2])
            pid = worker_pid(node)
            await node.server.stop(0)
            await node.service.settle()
            await ended(pid)
            held = holds().find(RUN)
            assert held is not None
            assert held.step == 2
            await link.close()

    run(work)


async def train_past_a_copy(link: RemoteWorker) -> None:
    """Three steps, of which two are copied."""
    await train(link, [1, 2])
    assert (await until(link, Copied)).step == 2
    await train(link, [3])


def test_of_a_worker_that_dies_the_last_copy_is_held(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node, copy_every=2)
            await train_past_a_copy(link)
            os.kill(worker_pid(node), signal.SIGKILL)
            with pytest.raises(WorkerLost):
                await until(link, Ready)
            await link.close()
            held = await held_by(client)
            assert (held.step, told(held)) == (2, [1, 2])

    run(work)


def test_of_a_worker_that_hangs_the_last_copy_is_held_and_it_is_ended(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SAVE_SECONDS", 0.5)

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node, copy_every=2)
            await train_past_a_copy(link)
            pid = worker_pid(node)
            os.kill(pid, signal.SIGSTOP)
            link.kill()
            assert (await held_by(client)).step == 2
            await ended(pid)

    run(work)


def test_a_node_is_not_free_before_the_state_is_held_however_often_the_coordinator_goes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "SAVE_SECONDS", 0.5)

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node, copy_every=2)
            await train_past_a_copy(link)
            pid = worker_pid(node)
            os.kill(pid, signal.SIGSTOP)
            # A request that no coordinator may make ends the job; its stream is cut while the worker is seen out.
            await link.send(Join(RingSpec(0, 1, "ring", (), (), 1, 1.0, 1.0)))
            with pytest.raises(UserError, match="cannot ask"):
                await until(link, Ready)
            link.kill()
            assert (await held_by(client)).step == 2
            await ended(pid)

    run(work)


def test_a_checkpoint_that_was_asked_for_just_before_is_not_taken_for_the_last_state(
    tmp_path: Path, model: Path
) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node)
            await train(link, [1])
            for step in (2, 3):
                await link.send(TrainStep(Share(step, (as_rows(BATCHES[step]),))))
                await link.send(CopyState(step))
            await until(link, StepDone)
            link.kill()
            held = await held_by(client)
            assert told(held) == list(range(1, held.step + 1))
            assert held.step >= 2

    run(work)


def test_a_full_disk_harms_no_node(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await begin(client, node)
            await train(link, [1])
            with monkeypatch.context() as patch:
                patch.setattr(Holds, "take", full)
                link.kill()
                assert await client.held(RUN, FREE_SECONDS) is None
            link = await client.open_worker(RUN, "anna")
            await link.close()

    with caplog.at_level(logging.WARNING):
        run(work)
    (told_of,) = [record.getMessage() for record in caplog.records if record.name == "node.service"]
    assert RUN in told_of
    assert "No space left on device" in told_of


def test_what_is_asked_for_leads_nowhere_else(tmp_path: Path, model: Path, tandem_home: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            write_copy(tmp_path / "job", 1)
            holds().take(RUN, tmp_path / "job")
            held = await held_by(client)
            (tandem_home / "held" / "secret").write_text("secret")
            with pytest.raises(NodeError, match="no id of a run"):
                await client.held("../held")
            file = held.weights
            with pytest.raises(NodeError, match="no id of a run"):
                await client.fetch_held("..", file, tmp_path / "x")
            for name in ("secret", "state.json"):
                with pytest.raises(NodeError, match="nothing of that name"):
                    await client.fetch_held(RUN, replace(file, name=name), tmp_path / "x")
            holds().path(RUN, file.name).write_bytes(bytes(file.size))
            with pytest.raises(NodeError, match="did not arrive as it was sent"):
                await client.fetch_held(RUN, file, tmp_path / "x")
            assert not (tmp_path / "x").exists()
            assert await client.held("another-run") is None

    run(work)
