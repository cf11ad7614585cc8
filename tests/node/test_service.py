"""A node's service, with real servers, workers and connections."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from coordinator.crew import Crew, Member
from node import awake, rpc
from node.client import NodeClient, RemoteWorker
from node.errors import NodeError, NodeLost, NodeRefused, TandemError, UserError, WorkerLost
from node.events import (
    Addend,
    Condition,
    Copied,
    Digested,
    Event,
    Fused,
    Joined,
    Ready,
    ReduceEntered,
    Restored,
    RingFailed,
    StepDone,
)
from node.files import sha256_of
from node.hardware import facts
from node.home import home as tandem_home
from node.identity import credentials
from node.info import Busy, GradientDtype, Interface, NodeInfo, RdmaDevice, RingPart
from node.manifest import manifest_of
from node.owner import Owner
from node.relay import Relay
from node.service import NodeService
from node.spec import (
    PIECE_BYTES,
    CopyState,
    Digest,
    FileRef,
    Fuse,
    JobSpec,
    Leave,
    ModelSpec,
    OptimizerSpec,
    Restore,
    Setup,
    Share,
    Total,
    TrainStep,
    TuningSpec,
)
from node.store import Store
from node.trust import Trust
from node.wire import encode_event
from tandem.v1 import node_pb2, node_pb2_grpc
from tests.fixtures.awake import FakeCaffeinate
from tests.fixtures.models import tiny_model
from tests.fixtures.training import as_rows, random_batches

_E = TypeVar("_E", bound=Event)
SECRET = "of this home"
BATCHES = random_batches(3, rows=6, seed=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "llama")


class Node:
    """A service on a port of its own, with a model in its store."""

    def __init__(self, home: Path, model: Path, **changes: object) -> None:
        self.owner = Owner(home)
        self.trust = Trust(tandem_home())
        self.relay = Relay("127.0.0.1", trust=self.trust)
        self.store = Store(home / "store")
        found = manifest_of(model, "tiny", "", home / "digests.json")
        self.manifest = self.store.adopt(found, model)
        self.changes = changes
        self.service = NodeService(self.describe, self.owner, self.store, self.relay, self.trust, SECRET)

    def describe(self) -> NodeInfo:
        info = NodeInfo(
            "id", self.trust.credentials.home, "Studio", rpc.PROTOCOL, "1.2.3", facts(), relay_port=self.relay.port
        )
        return replace(info, paused=self.owner.paused, **self.changes)  # type: ignore[arg-type]

    async def start(self) -> None:
        self.relay.start()
        self.server = rpc.new_server(self.trust)
        node_pb2_grpc.add_NodeServicer_to_server(self.service, self.server)
        port = rpc.listen(self.server, "127.0.0.1:0", self.trust)
        await self.server.start()
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        await self.server.stop(0)
        await asyncio.to_thread(self.relay.stop)

    def job(self, **changes: object) -> JobSpec:
        tuning = TuningSpec(num_layers=-1, rank=4)
        spec = JobSpec("run", "", ModelSpec("", manifest=self.manifest), 0, tuning, OptimizerSpec(learning_rate=1e-4))
        return replace(spec, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def serving(
    tmp_path: Path, model: Path, count: int = 1, **changes: object
) -> AsyncIterator[list[tuple[Node, NodeClient]]]:
    nodes = [Node(tmp_path / f"home{number}", model, **changes) for number in range(count)]
    for node in nodes:
        await node.start()
    clients = [NodeClient(node.address) for node in nodes]
    try:
        yield list(zip(nodes, clients, strict=True))
    finally:
        for client in clients:
            await client.close()
        for node in nodes:
            await node.stop()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await work()

    asyncio.run(limited())


async def until(link: RemoteWorker, kind: type[_E]) -> _E:
    while not isinstance(event := await link.receive(), kind):
        pass
    return event


async def everything(link: RemoteWorker, last: type[Event]) -> AsyncIterator[Event]:
    """What is said up to the first of a kind."""
    while not isinstance(event := await link.receive(), last):
        yield event


async def ended(pid: int) -> None:
    """Wait until a process is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(handle, gone.set)
    await gone.wait()
    asyncio.get_running_loop().remove_reader(handle)
    os.close(handle)


def worker_pid(node: Node) -> int:
    assert node.service._job is not None
    return node.service._job.worker.pid


def test_a_description_survives_the_wire(tmp_path: Path, model: Path) -> None:
    told = {
        "interfaces": (Interface("en0", "wifi", "192.168.1.5"),),
        "rdma": (RdmaDevice("rdma_en3", "en3"),),
        "max_memory_bytes": 7 << 30,
        "waits_for": "sleeps",
        "on_battery": "yes",
        "memory_pressure": "warn",
        "thermal_pressure": "critical",
    }

    async def work() -> None:
        async with serving(tmp_path, model, **told) as [(node, client)]:
            info = await client.describe()
            assert info == replace(node.describe(), facts=info.facts)
            assert replace(info.facts, free_memory_bytes=None) == replace(facts(), free_memory_bytes=None)

    run(work)


def test_what_is_unknown_stays_unknown() -> None:
    info = NodeInfo("id", "home", "Air", 1, "1", replace(facts(), chip=None, free_memory_bytes=None, mlx=None))
    assert rpc.decode_info(rpc.encode_info(info)).facts == info.facts
    busy = replace(info, busy=Busy("run", "anna", 5.0))
    assert rpc.decode_info(rpc.encode_info(busy)) == busy


def test_words_of_another_version_are_unknown() -> None:
    odd = node_pb2.Condition(memory_pressure="purple", thermal_pressure="", on_battery="perhaps")
    assert rpc.decode_condition(odd) == Condition("unknown", "unknown", "")
    older = node_pb2.NodeInfo(name="Air")
    assert rpc.decode_info(older).memory_pressure == "unknown"


def test_a_coordinator_hears_how_the_machine_is_when_that_changes(tmp_path: Path, model: Path) -> None:
    worse, worst = Condition("warn", "nominal", "no"), Condition("critical", "serious", "yes")

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            first = await client.open_worker("first", "anna")
            assert first.condition == Condition(), "nothing is known of it"
            node.service.is_now(worse)
            assert await until(first, Condition) == worse
            node.service.is_now(worse)
            node.service.is_now(worst)
            assert await until(first, Condition) == worst, "what has not changed is not said"
            assert first.condition == worst
            await first.close()

            second = await client.open_worker("second", "ben")
            await second.send(Setup(node.job()))
            said = [event async for event in everything(second, Ready)]
            assert [event for event in said if isinstance(event, Condition)] == [worst], "it is said once for each job"
            await second.send(TrainStep(Share(1, (as_rows(BATCHES[1]),))))
            node.service.is_now(worse)
            heard: set[type] = set()
            while not heard >= {Condition, StepDone}:
                heard.add(type(await second.receive()))
            assert second.condition == worse
            await second.close()

    run(work)


def test_what_a_node_said_last_is_no_reason_why_a_worker_is_lost(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            node.service.is_now(Condition("warn"))
            await until(link, Condition)
            node.service.is_now(Condition("critical"))
            os.kill(worker_pid(node), 9)
            with pytest.raises(WorkerLost, match="killed by SIGKILL"):
                await until(link, Ready)
            await link.close()

    run(work)


def test_a_machine_is_kept_awake_for_as_long_as_a_job_runs(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCaffeinate(tmp_path)
    monkeypatch.setattr(awake, "PROGRAMS", {platform.system(): fake.program})

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            first = await client.open_worker("first", "anna")
            (call,) = fake.calls(1)
            assert call.runs
            await first.close()
            again = await client.open_worker("again", "anna", wait=True)  # when the first is cleared up
            assert not call.runs
            call = fake.calls(2)[1]
            assert call.runs
            os.kill(worker_pid(node), 9)
            with pytest.raises(WorkerLost):
                await until(again, Ready)
            await again.close()
            last = await client.open_worker("last", "anna", wait=True)
            assert not call.runs
            await last.close()

    run(work)


def test_a_machine_that_cannot_be_kept_awake_works_all_the_same(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(awake, "PROGRAMS", {platform.system(): str(tmp_path / "none")})

    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            await link.send(Setup(node.job()))
            await until(link, Ready)
            await link.close()

    run(work)
    assert [record.getMessage()[:28] for record in caplog.records] == ["this machine may fall asleep"]


def test_a_job_from_the_first_step_to_the_fused_model(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna on Air")
            await link.send(Setup(node.job()))
            assert (await until(link, Ready)).trainable_parameters > 0
            for step in (1, 2):
                await link.send(TrainStep(Share(step, (as_rows(BATCHES[step]),))))
            await link.send(CopyState(2))
            assert [(await until(link, StepDone)).step for _ in range(2)] == [1, 2]
            copied = await until(link, Copied)
            for ref in (copied.weights, copied.optimizer):
                await link.fetch(ref, tmp_path / ref.name)
                assert sha256_of(tmp_path / ref.name) == ref.sha256
                await link.give(replace(ref, name=f"back-{ref.name}"), tmp_path / ref.name)
            back = [replace(ref, name=f"back-{ref.name}") for ref in (copied.weights, copied.optimizer)]
            await link.send(Restore(2, *back))
            assert (await until(link, Restored)).step == 2
            await link.close()
            assert (await client.describe()).busy is None

            link = await client.open_worker("fuse", "anna on Air")
            config = tmp_path / "adapter_config.json"
            config.write_text(
                '{"fine_tune_type": "lora", "num_layers": -1,'
                ' "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}'
            )
            weights = tmp_path / copied.weights.name
            for name, path in (("adapters.safetensors", weights), (config.name, config)):
                await link.give(FileRef(name, sha256_of(path), path.stat().st_size), path)
            await link.send(Fuse(ModelSpec("", ".", manifest=node.manifest), "anywhere", peft_path="peft"))
            await until(link, Fused)
            files = {file.name: file for file in await link.outputs("fused")}
            assert "model.safetensors" in files
            assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in await link.outputs("peft")}
            await link.fetch_output(files["model.safetensors"], tmp_path / "fused.safetensors")
            assert sha256_of(tmp_path / "fused.safetensors") == files["model.safetensors"].sha256
            await link.close()
            assert not list((tmp_path / "home0").glob("jobs/*"))

    run(work)


def at_home(part: RingPart) -> RingPart:
    """Its neighbours are programs of this home."""
    own = credentials(tandem_home()).certificate
    return replace(part, next_certificate=own, previous_certificate=own)


def test_a_group_with_a_stranger_is_refused(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model, count=1) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            await link.send(Setup(node.job()))
            await until(link, Ready)
            link.cancel()
            own, other = credentials(tandem_home()).certificate, credentials(tmp_path / "stranger").certificate
            part = RingPart(0, 2, "ring", bytes(16), b"n" * 16, (f"127.0.0.1:{node.relay.port}",), 77, 20.0, 20.0)
            await link.form_ring(replace(part, next_certificate=other, previous_certificate=own))
            with pytest.raises(TandemError, match="a machine that this one is not paired with"):
                await until(link, Joined)
            await link.close()

    run(work)


@pytest.mark.parametrize("dtypes", [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")], ids="-".join)
def test_two_nodes_form_a_group_through_their_relays(
    dtypes: tuple[GradientDtype, GradientDtype], tmp_path: Path, model: Path
) -> None:
    async def work() -> None:
        async with serving(tmp_path, model, count=2) as pairs:
            links = [await client.open_worker("run", "anna") for _, client in pairs]
            await asyncio.gather(*(link.send(Setup(node.job())) for link, (node, _) in zip(links, pairs, strict=True)))
            await asyncio.gather(*(until(link, Ready) for link in links))
            routes = [secrets.token_bytes(16) for _ in pairs]
            for link in links:
                link.cancel()
            for rank, link in enumerate(links):
                after = 1 - rank
                relay = f"127.0.0.1:{pairs[after][0].relay.port}"
                part = RingPart(rank, 2, "ring", routes[rank], routes[after], (relay, relay), 77, 20.0, 20.0)
                await link.form_ring(at_home(replace(part, gradient_dtype=dtypes[rank])))
            if dtypes[0] != dtypes[1]:
                failed = await asyncio.gather(*(until(link, RingFailed) for link in links))
                assert any("do not train the same arrays" in event.reason for event in failed)
                await asyncio.gather(*(link.close() for link in links))
                return
            joined = await asyncio.gather(*(until(link, Joined) for link in links))
            assert [event.rank for event in joined] == [0, 1]
            for rank, link in enumerate(links):
                await link.send(
                    TrainStep(Share(1, (as_rows(BATCHES[0][3 * rank : 3 * rank + 3], 3 * rank),), check=True))
                )
            done = await asyncio.gather(*(until(link, StepDone) for link in links))
            assert done[0].loss_sum == done[1].loss_sum
            for link in links:
                await link.close()

    run(work)


def test_two_nodes_add_up_over_their_streams(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model, count=2) as pairs:
            links = [await client.open_worker("run", "anna") for _, client in pairs]
            await asyncio.gather(*(link.send(Setup(node.job())) for link, (node, _) in zip(links, pairs, strict=True)))
            readies = await asyncio.gather(*(until(link, Ready) for link in links))
            members = [
                Member(str(i), str(i), link, ready) for i, (link, ready) in enumerate(zip(links, readies, strict=True))
            ]
            crew = Crew(members, asyncio.Event())

            async def hear(kind: type[_E]) -> list[_E]:
                found: dict[int, _E] = {}
                while len(found) < len(crew):
                    index, event = await crew.next()
                    assert not isinstance(event, RingFailed), event
                    if isinstance(event, kind):
                        found[index] = event
                return [found[index] for index in sorted(found)]

            async def form() -> None:
                crew.cancel()
                for rank in range(2):
                    await crew.form(rank, RingPart(rank, 2, "grpc", b"", b"", (), 77, 20.0, 20.0))
                assert [event.rank for event in await hear(Joined)] == [0, 1]

            async def step(rank: int) -> None:
                rows = as_rows(BATCHES[0][3 * rank : 3 * rank + 3], 3 * rank)
                await crew.send(rank, TrainStep(Share(1, (rows,), check=True)))

            try:
                await form()
                await step(0)
                while not isinstance((await crew.next())[1], ReduceEntered):
                    pass
                # Given up with one rank's numbers on their way: nothing of them gets into the next group's sums.
                await form()
                await asyncio.gather(step(0), step(1))
                done = await hear(StepDone)
                assert done[0].loss_sum == done[1].loss_sum
                assert done[0].tokens == as_rows(BATCHES[0], 0).target_tokens
                for rank in range(2):
                    await crew.send(rank, Digest())
                assert len({digested.sha256 for digested in await hear(Digested)}) == 1
            finally:
                await crew.close()

    run(work)


def test_requests_may_be_sent_at_the_same_time(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            await link.send(Setup(node.job()))
            await until(link, Ready)
            await asyncio.gather(*(link.send(Total(0, index, bytes(PIECE_BYTES))) for index in range(8)))
            await link.send(Digest())
            await until(link, Digested)
            await link.close()

    run(work)


def test_what_is_of_a_group_of_the_past_is_not_heard() -> None:
    async def work() -> None:
        client = NodeClient("127.0.0.1:1")
        link = RemoteWorker(client, None, "job")
        link.cancel()
        said = [(Addend(1, 7, b"abcd"), 0), (RingFailed(1, "late"), 0), (Addend(1, 0, b"efgh"), 1)]
        link._heard.extend(encode_event(event, generation) for event, generation in said)
        assert await link.receive() == Addend(1, 0, b"efgh")
        await client.close()

    run(work)


def test_an_unknown_kind_of_group_is_refused(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            link = await client.open_worker("run", "anna")
            link.cancel()
            part = RingPart(0, 2, "pigeons", b"", b"", (), 1, 1.0, 1.0)  # type: ignore[arg-type]
            await link.form_ring(part)
            with pytest.raises(UserError, match="'pigeons', which this version does not know"):
                await link.receive()
            await link.close()

    run(work)


def test_a_busy_node_says_for_whom_and_a_line_is_kept(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            first = await client.open_worker("brave-otter", "anna on Air")
            with pytest.raises(
                NodeRefused, match=r"Studio is busy: brave-otter for anna on Air since \d\d:\d\d"
            ) as caught:
                await client.open_worker("other", "ben")
            assert caught.value.kind == "busy"
            told: list[tuple[int, str]] = []
            in_line = [asyncio.Event(), asyncio.Event()]

            def queued(number: int) -> Callable[[int, Busy], None]:
                def tell(before: int, busy: Busy) -> None:
                    told.append((number, busy.run))
                    in_line[number].set()

                return tell

            second = asyncio.create_task(client.open_worker("second", "ben", wait=True, on_queue=queued(0)))
            await in_line[0].wait()
            third = asyncio.create_task(client.open_worker("third", "cleo", wait=True, on_queue=queued(1)))
            await in_line[1].wait()
            assert told == [(0, "brave-otter"), (1, "brave-otter")]
            await first.close()
            link = await second
            assert (await client.describe()).busy is not None
            third.cancel()  # gives its place up
            await asyncio.gather(third, return_exceptions=True)
            await link.close()
            last = await client.open_worker("last", "dora")
            await last.close()

    run(work)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, "paused"), ({"takes_jobs": False}, "files_only"), ({"waits_for": "rests"}, "idle_only")],
)
def test_refusals(tmp_path: Path, model: Path, changes: dict[str, object], kind: str) -> None:
    async def work() -> None:
        async with serving(tmp_path, model, **changes) as [(node, client)]:
            node.owner.pause(paused=kind == "paused")
            with pytest.raises(NodeRefused, match="Studio") as caught:
                await client.open_worker("run", "anna")
            assert caught.value.kind == kind

    run(work)


def test_another_version_is_told_so(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with serving(tmp_path, model, protocol=99) as [(_, client)]:
            with pytest.raises(NodeRefused, match=r"Studio runs mlx-tandem 1\.2\.3") as caught:
                await client.describe()
            assert caught.value.kind == "version"

    run(work)


def test_a_connection_that_breaks_frees_the_node_and_ends_the_worker(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            other = NodeClient(node.address)
            link = await other.open_worker("run", "anna")
            pid = worker_pid(node)
            await other.close()
            await ended(pid)
            again = await client.open_worker("next", "ben", wait=True)
            await again.close()
            with pytest.raises(NodeLost):
                await link.receive()

    run(work)


def test_a_worker_that_dies_is_a_loss_with_its_reason(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            os.kill(worker_pid(node), 9)
            with pytest.raises(WorkerLost, match="killed by SIGKILL"):
                await until(link, Ready)
            await link.close()
            again = await client.open_worker("run", "anna", wait=True)
            await again.close()

    run(work)


def test_a_worker_that_is_lost_leaves_its_log_and_nothing_large(tmp_path: Path, model: Path, tandem_home: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            path = tmp_path / "weights"
            path.write_bytes(b"large")
            await link.give(FileRef("weights", sha256_of(path), 5), path)
            os.kill(worker_pid(node), 9)
            with pytest.raises(WorkerLost):
                await until(link, Ready)
            await link.close()
            again = await client.open_worker("run", "anna", wait=True)  # when the first is cleared up
            await again.close()
            assert not list((tandem_home / "jobs").glob("*/*")), "a log that says nothing is not kept"

    run(work)


def test_a_node_that_goes_while_it_is_heard_and_spoken_to(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")

            async def speak() -> None:
                while True:
                    await link.send(Leave())
                    await asyncio.sleep(0)

            listening, speaking = asyncio.create_task(until(link, Ready)), asyncio.create_task(speak())
            await link.send(Leave())
            await node.server.stop(0)
            errors = await asyncio.gather(listening, speaking, return_exceptions=True)
            assert [type(error) for error in errors] == [NodeLost, NodeLost]
            await link.close()

    run(work)


def test_who_stops_listening_can_listen_again(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            for _ in range(2):
                listening = asyncio.create_task(until(link, Ready))
                await asyncio.sleep(0)
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
            await link.send(Setup(node.job()))
            assert (await until(link, Ready)).trainable_parameters > 0
            await link.close()

    run(work)


@pytest.mark.parametrize(
    ("request_of", "words"),
    [
        (lambda node: Fuse(ModelSpec("/etc", manifest=""), "x"), "never by paths"),
        (lambda node: Setup(node.job(model=ModelSpec("", "../other", manifest=node.manifest))), "never by paths"),
        (lambda node: Setup(node.job(model=ModelSpec("", manifest="0" * 64))), "not here in full"),
        (lambda node: Setup(node.job(tuning=TuningSpec(initial_weights="../../secret"))), "no name of a file"),
        (
            lambda node: Fuse(ModelSpec("", ".", manifest=node.manifest), "x", gguf_path="/tmp/x.gguf"),
            "no name of a file",
        ),
    ],
    ids=["path", "adapter", "unknown model", "weights", "gguf"],
)
def test_a_coordinator_names_no_places_of_the_node(
    tmp_path: Path, model: Path, request_of: Callable[[Node], Setup | Fuse], words: str
) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            await link.send(request_of(node))
            with pytest.raises(TandemError, match=words):
                await until(link, Ready)
            await link.close()

    run(work)


def test_files_are_checked_and_stay_in_the_jobs_folder(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            link = await client.open_worker("run", "anna")
            path = tmp_path / "some"
            path.write_bytes(secrets.token_bytes(3_000_000))
            right = FileRef("some", sha256_of(path), path.stat().st_size)
            for wrong in (
                replace(right, sha256="0" * 64),
                replace(right, size=right.size - 1),
                replace(right, size=right.size + 1),
            ):
                with pytest.raises(NodeError, match=r"some (did not arrive|is longer)"):
                    await link.give(wrong, path)
            await link.give(right, path)
            await link.fetch(right, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
            with pytest.raises(NodeError, match="did not arrive as it was sent"):
                await link.fetch(replace(right, sha256="0" * 64), tmp_path / "other")
            assert not (tmp_path / "other").exists()
            with pytest.raises(NodeError):
                await link.fetch(replace(right, name="none"), tmp_path / "other")
            with pytest.raises(NodeError, match="no folder"):
                await link.outputs("..")
            await link.close()
            stranger = RemoteWorker(client, None, "another-job")
            with pytest.raises(NodeError, match="does not work on that job"):
                await stranger.give(right, path)

    run(work)


def test_only_programs_of_the_same_home_may_pause(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(_, client)]:
            with pytest.raises(NodeError, match="only programs of this TANDEM_HOME"):
                await client.control("pause", "guessed, with an ö")
            assert (await client.control("pause", SECRET)).paused
            with pytest.raises(NodeRefused, match="paused by its owner"):
                await client.open_worker("run", "anna")
            assert not (await client.control("resume", SECRET)).paused

    run(work)


def test_a_node_that_is_not_there(tmp_path: Path) -> None:
    async def work() -> None:
        client = NodeClient("127.0.0.1:9", "Studio")
        with pytest.raises(NodeLost, match=r"^Studio cannot be reached"):
            await client.describe()
        with pytest.raises(NodeLost):
            await client.open_worker("run", "anna")
        await client.close()

    run(work)


def test_a_user_error_of_the_worker_comes_out_as_one(tmp_path: Path, model: Path) -> None:
    async def work() -> None:
        async with serving(tmp_path, model) as [(node, client)]:
            link = await client.open_worker("run", "anna")
            await link.send(Setup(node.job(tuning=TuningSpec(keys=("no.such.layer",)))))
            with pytest.raises(UserError):
                await until(link, Ready)
            await link.close()

    run(work)
