"""What a node does for coordinators: one job at a time, in a worker process of its own.

The worker's requests and events pass through as bytes. Only those that name places on this machine (the model, the
job's folder) are put together here: a coordinator names models by their manifest and files by bare names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import re
import shutil
import time
import typing
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from node import links, rpc, wire
from node.awake import Awake
from node.doctor.finding import Diagnosis, Wanted
from node.errors import OutOfMemory, TandemError, UserError, WorkerError, WorkerLost
from node.events import Condition, Leaving
from node.files import replacing, sha256_of
from node.guard import caller, caller_address, caller_home
from node.home import holds, new_job_folder
from node.info import Backend, Busy, NodeInfo, RingPart, StoredFile
from node.listener import Listener
from node.manifest import is_sha256
from node.owner import Owner
from node.pairing.desk import OpenCode
from node.reducer import LOG_NAME as REDUCER_LOG
from node.relay import Relay
from node.ring_end import RingEnd
from node.room import Room
from node.spec import FileRef, Fuse, JobSpec, ModelSpec, Setup
from node.store import Hold, Store
from node.supervisor import LOG_NAME, LocalWorker
from node.trust import Standing, Trust
from tandem.v1 import node_pb2, node_pb2_grpc, worker_pb2

OPEN_SECONDS = 10.0
EVENTS_BYTES = 4 << 20
"""Of events that go up in one message; a larger one goes alone."""
MOST_MEASURED = 16
"""Addresses that one call has measured."""
MOST_REACHED = 32
"""Addresses that one diagnosis connects to."""
MOST_EXPECTED = 128
"""Nodes that one diagnosis listens for."""
MOST_LOGGED = 32
"""Jobs that were cut off whose logs are kept."""
MOST_WAITING = 16
"""Coordinators that stand in line."""
RESERVED = frozenset({LOG_NAME, REDUCER_LOG, "fused", "peft"})
FUSED, PEFT = "fused", "peft"
FOLDERS = ("", FUSED, PEFT)
# What a coordinator may ask of a worker as it is; the others are put together here, or not at all.
PASSED_ON = frozenset(
    {"restore", "train_step", "evaluate", "generate", "copy_state", "leave", "probe", "digest", "total"}
)  # fmt: skip

log = logging.getLogger(__name__)


@dataclass
class _Job:
    """The job at hand; ``released`` once its coordinator has all that it wants."""

    run: str
    caller: str
    """Fingerprint of the coordinator."""
    owner: str
    """Id of the coordinator's home; "" for our own."""
    name: str
    folder: Path
    worker: LocalWorker
    listener: Listener
    end: RingEnd
    room: Room
    model: str = ""
    """Digest of the manifest whose files the introduced may get."""
    awake: Awake = field(default_factory=Awake)
    released: bool = False
    held: Hold | None = None


@dataclass
class _Slot:
    """Who has the node, and who waits for it."""

    busy: Busy | None = None
    owner: str = ""
    waiting: deque[object] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wake all who wait."""
        self.changed.set()
        self.changed = asyncio.Event()


class NodeService(node_pb2_grpc.NodeServicer):
    """The ``Node`` service of node.proto.

    Args:
        describe: the node as it is now, without ``busy``.
        owner: what the machine's owner allows.
        store: where models are.
        relay: carries groups.
        trust: told who takes part in the job at hand.
        secret: of the ``TANDEM_HOME``, for its own programs.
        stop: ends the daemon.
        pair: shows a new pairing code.
        diagnose: looks at this machine and its network, for a caller at an address.
    """

    def __init__(
        self,
        describe: Callable[[], NodeInfo],
        owner: Owner,
        store: Store,
        relay: Relay,
        trust: Trust,
        secret: str,
        stop: Callable[[], Awaitable[None]] | None = None,
        pair: Callable[[], Awaitable[OpenCode]] | None = None,
        diagnose: Callable[[Wanted, IPv4Address | None], Awaitable[Diagnosis]] | None = None,
    ) -> None:
        self._describe = describe
        self._owner = owner
        self._store = store
        self._relay = relay
        self._trust = trust
        self._secret = secret
        self._stop = stop
        self._pair = pair
        self._diagnose = diagnose
        self._diagnosing = asyncio.Lock()
        self._slot = _Slot()
        self._job: _Job | None = None
        self._leaving = False
        self._condition = Condition()
        self._holds = holds()
        self._logged: deque[Path] = deque()
        self._seeing_out: set[asyncio.Task[None]] = set()

    async def leave(self, seconds: float) -> None:
        """Take no job any more, and ask the coordinator of the present one to do without this node.

        Returns when it does, or after so many seconds.
        """
        self._leaving = True
        if self._job is not None:
            job = self._job
            job.listener.say(wire.encode_event(Leaving(), job.worker.generation))
        slot = self._slot
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while slot.busy is not None:
                    await slot.changed.wait()

    def is_now(self, condition: Condition) -> None:
        """Take note of how the machine is; the coordinator whose job this is hears of what has changed."""
        if condition == self._condition:
            return
        self._condition = condition
        if self._job is not None:
            self._job.listener.wake()

    @property
    def busy(self) -> Busy | None:
        """Who has the node."""
        return self._slot.busy

    async def Describe(self, request: Any, context: Any) -> node_pb2.NodeInfo:  # noqa: N802 - the name is the protocol's
        """See node.proto."""
        del request, context
        return rpc.encode_info(self._described())

    def _described(self) -> NodeInfo:
        return dataclasses.replace(self._describe(), busy=self.busy)

    # --- one job ----------------------------------------------------------------------------------------------------

    async def Work(  # type: ignore[override]  # noqa: N802 - it reads and writes by the context
        self, request_iterator: Any, context: Any
    ) -> None:
        """See node.proto."""
        del request_iterator
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                first = await context.read()
        except TimeoutError:
            await _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing was asked within {OPEN_SECONDS:.0f} s")
        if first is grpc.aio.EOF or first.WhichOneof("body") != "open":
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message must open a job")
        wanted = first.open
        refused = self._refusal(wanted)
        if refused is not None:
            await context.write(node_pb2.WorkEvent(refused=refused))
            return
        async with self._taken(wanted, context) as refused:
            if refused is not None:
                log.info("refused run %s of %s: %s", _clean(wanted.run), _clean(wanted.owner), refused.message)
                await context.write(node_pb2.WorkEvent(refused=refused))
                return
            await self._work(wanted, context)

    def _refusal(self, wanted: node_pb2.Open) -> node_pb2.Refused | None:
        """Why no job is taken whoever asks; None when one is."""
        info = self._describe()
        if wanted.protocol != rpc.PROTOCOL:
            message = f"{info.name} runs mlx-tandem {info.version}, which talks another version of the protocol"
            return node_pb2.Refused(kind="version", message=message)
        if not info.takes_jobs:
            return node_pb2.Refused(kind="files_only", message=f"{info.name} gives files only")
        if self._leaving:
            return node_pb2.Refused(kind="leaving", message=f"{info.name} is about to leave")
        if info.paused:
            return node_pb2.Refused(kind="paused", message=f"{info.name} is paused by its owner (node resume ends it)")
        if info.waits_for:
            return node_pb2.Refused(kind="idle_only", message=f"{info.name} {info.waits_for}")
        return None

    @contextlib.asynccontextmanager
    async def _taken(self, wanted: node_pb2.Open, context: Any) -> AsyncIterator[node_pb2.Refused | None]:
        """Have the node for one job; waits in line when that was asked for."""
        slot, ticket = self._slot, object()
        busy = slot.busy
        if (busy is not None or slot.waiting) and not wanted.wait:
            name = self._describe().name
            message = f"{name} is busy: others stand in line"
            if busy is not None:
                since = time.strftime("%H:%M", time.localtime(busy.since))
                message = f"{name} is busy: {busy.run} for {busy.owner} since {since}"
            yield node_pb2.Refused(kind="busy", message=message, busy=_busy_message(busy) if busy else None)
            return
        if len(slot.waiting) >= MOST_WAITING:
            message = f"{self._describe().name} is busy, and {len(slot.waiting)} others stand in line; try again later"
            yield node_pb2.Refused(kind="busy", message=message, busy=_busy_message(busy) if busy else None)
            return
        slot.waiting.append(ticket)
        try:
            while slot.busy is not None or slot.waiting[0] is not ticket:
                before = slot.waiting.index(ticket)
                queued = node_pb2.Queued(before=before, busy=_busy_message(slot.busy) if slot.busy else None)
                changed = slot.changed
                await context.write(node_pb2.WorkEvent(queued=queued))
                await changed.wait()
            slot.busy, slot.owner = Busy(_clean(wanted.run), _clean(wanted.owner), time.time()), self._owner_of(context)
        finally:
            slot.waiting.remove(ticket)
            slot.tell()
        try:
            # The owner may have changed his mind while this one stood in line.
            yield self._refusal(wanted)
        finally:
            slot.busy = None
            slot.tell()

    def _owner_of(self, context: Any) -> str:
        """The id of the home that a call comes from, by its certificate; "" for our own."""
        return "" if self._trust.standing(caller(context)) is Standing.OWN else caller_home(context)

    async def _work(self, wanted: node_pb2.Open, context: Any) -> None:
        owner = self._owner_of(context)
        folder = new_job_folder(re.sub(r"[^A-Za-z0-9_-]", "-", wanted.run)[:48] or "job", owner)
        worker = await LocalWorker.start(folder, self._owner.environment())
        end = RingEnd(worker, self._relay)
        job = self._job = _Job(
            wanted.run, caller(context), owner, folder.name, folder, worker, Listener(worker), end, Room(folder)
        )
        try:
            job.awake.start()
            if job.awake.trouble:
                log.warning("%s", job.awake.trouble)
            await context.write(node_pb2.WorkEvent(opened=node_pb2.Opened(job=job.name)))
            log.info("job %s begins: run %s of %s", job.name, _clean(wanted.run), _clean(wanted.owner))
            await self._pump(job, context)
        finally:
            self._job = None
            log.info("job %s ends", job.name)
            seeing_out = asyncio.create_task(self._see_out(job))
            self._seeing_out.add(seeing_out)
            seeing_out.add_done_callback(self._seeing_out.discard)
            self._trust.introduce([])
            await _to_the_end(seeing_out)

    async def settle(self) -> None:
        """Wait until no job is being ended any more."""
        while self._seeing_out:
            await asyncio.wait(self._seeing_out)

    async def _see_out(self, job: _Job) -> None:
        """End a job; unless its coordinator has all that it wants, what the worker has computed is held here."""
        try:
            await self._end_worker(job)
        finally:
            job.awake.stop()

    async def _end_worker(self, job: _Job) -> None:
        if not job.released and not await job.listener.save_state():
            # It has nothing, or does not answer: then its last copy is the newest there is.
            job.worker.kill()
        await job.listener.close()
        job.end.close()
        await asyncio.to_thread(self._settle_hold, job)
        await job.worker.close()
        if job.held is not None:
            job.held.close()
        await asyncio.to_thread(_empty, job.folder, keep_log=not job.released)
        self._logged.append(job.folder)
        while len(self._logged) > MOST_LOGGED:
            await asyncio.to_thread(shutil.rmtree, self._logged.popleft(), ignore_errors=True)

    def _settle_hold(self, job: _Job) -> None:
        if not job.listener.trained:
            return  # what is held of an earlier sitting may be wanted yet
        try:
            if job.released:
                self._holds.drop(job.run, job.owner)
            else:
                self._holds.take(job.run, job.folder, owner=job.owner)
        except (OSError, UserError) as error:
            log.warning("the state of %s could not be kept: %s", _clean(job.run), _words(error))

    async def _pump(self, job: _Job, context: Any) -> None:
        """Carry requests down and events up until either side ends."""
        down = asyncio.create_task(self._carry_down(job, context))
        up = asyncio.create_task(self._carry_up(job, context))
        try:
            await asyncio.wait({down, up}, return_when=asyncio.FIRST_COMPLETED)
            error = up.exception() if up.done() else down.exception()
        finally:
            for task in (down, up):
                task.cancel()
            # Only one may write at a time.
            await asyncio.gather(down, up, return_exceptions=True)
        if error is not None:
            await context.write(node_pb2.WorkEvent(lost=_lost(error)))

    async def _carry_down(self, job: _Job, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            match message.WhichOneof("body"):
                case "requests":
                    for data in message.requests.requests:
                        # A request that was cut short could be followed by none: the worker would not save its state.
                        await asyncio.shield(job.worker.send_bytes(*self._for_worker(job, data)))
                case "form_ring":
                    await self._form_ring(job, message.form_ring)
                case "release":
                    job.released = True
                case other:
                    raise UserError(f"a message of kind {other} where requests are expected")

    async def _carry_up(self, job: _Job, context: Any) -> None:
        """Send what the worker says, and how the machine is when that has changed.

        All that the worker has said while the message before was on its way goes together.
        """
        told = Condition()
        while True:
            if self._condition != told:
                told = self._condition
                await context.write(node_pb2.WorkEvent(condition=rpc.encode_condition(told)))
            batch = await job.listener.batch(EVENTS_BYTES)
            if batch:
                await context.write(node_pb2.WorkEvent(events=node_pb2.WorkerEvents(events=batch)))

    def _for_worker(self, job: _Job, data: bytes) -> tuple[bytes, int]:
        """A request as the worker gets it, and its generation: places are filled in here."""
        message = worker_pb2.Request.FromString(data)
        kind, generation = message.WhichOneof("body"), message.generation
        if kind in PASSED_ON:
            return data, generation
        _, request = wire.decode_request(data)
        match request:
            case Setup(spec):
                return wire.encode_request(Setup(self._placed_job(job, spec)), generation), generation
            case Fuse():
                if request.gguf_path:
                    _check_bare(request.gguf_path)
                placed = dataclasses.replace(
                    request,
                    model=self._placed_model(job, request.model),
                    save_path=str(job.folder / FUSED),
                    peft_path=str(job.folder / PEFT) if request.peft_path else "",
                )
                return wire.encode_request(placed, generation), generation
        raise UserError(f"a coordinator cannot ask a worker for {kind}")

    def _placed_job(self, job: _Job, spec: JobSpec) -> JobSpec:
        if spec.tuning is not None and spec.tuning.initial_weights:
            _check_bare(spec.tuning.initial_weights)
        return dataclasses.replace(spec, folder=str(job.folder), model=self._placed_model(job, spec.model))

    def _placed_model(self, job: _Job, model: ModelSpec) -> ModelSpec:
        if model.path or model.adapter_path not in ("", "."):
            raise UserError("a coordinator names models by their manifest and files by bare names, never by paths")
        if not is_sha256(model.manifest):
            raise UserError("a model's manifest is named by its SHA-256")
        if job.held is not None:
            job.held.close()
        # Before it is looked at: nobody may prune it from here on.
        job.held = self._store.hold(model.manifest)
        folder = self._store.folder_of(model.manifest)
        if folder is None:
            raise UserError(f"the model {model.manifest[:12]} is not here in full; send it first")
        adapter = str(job.folder) if model.adapter_path else ""
        trusted = model.trust_remote_code and self._owner.trusts_code  # it takes both
        return dataclasses.replace(
            model, path=str(folder), adapter_path=adapter, trust_remote_code=trusted, manifest=""
        )

    async def _form_ring(self, job: _Job, plan: node_pb2.FormRing) -> None:
        """Open our end of a group, and have the worker join it."""
        backend = next((known for known in typing.get_args(Backend) if known == plan.backend), None)
        if backend is None:
            raise UserError(f"a group that adds up by {plan.backend!r}, which this version does not know")
        part = RingPart(
            plan.rank,
            plan.size,
            backend,
            plan.route,
            plan.next_route,
            tuple(plan.next),
            plan.token,
            plan.form_seconds,
            plan.wait_seconds,
            tuple(plan.devices),
            plan.leader,
            plan.next_certificate,
            plan.previous_certificate,
            plan.next_in_clear,
            plan.previous_in_clear,
            # Whoever means something else than this version knows differs in what the ranks prove to each other.
            "bf16" if plan.gradient_dtype == "bf16" else "fp32",
        )
        await job.end.form(part, plan.generation)

    # --- files of the job -------------------------------------------------------------------------------------------

    async def PutFile(self, request_iterator: Any, context: Any) -> node_pb2.FileInfo:  # noqa: N802
        """See node.proto."""
        parts = aiter(request_iterator)
        first = await anext(parts, None)
        if first is None:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "a file without parts")
        try:
            target = self._place(first.job, "", first.file.name, context)
            assert self._job is not None
            ref = FileRef(first.file.name, first.file.sha256, first.file.size)
            if ref.name.casefold() in RESERVED:
                raise UserError(f"{ref.name} is a name that the node keeps for itself")
            with self._job.room.reserved(ref) as arrival, replacing(target) as partial:
                arrival.partial = partial
                with partial.open("wb") as file:
                    data: bytes = first.data
                    while True:
                        if arrival.written + len(data) > ref.size:
                            raise UserError(f"{ref.name} is longer than was said ({ref.size} bytes)")
                        file.write(data)
                        arrival.written += len(data)
                        if (part := await anext(parts, None)) is None:
                            break
                        data = part.data
                found = await asyncio.to_thread(sha256_of, partial)
                if found != ref.sha256 or partial.stat().st_size != ref.size:
                    await _abort(context, grpc.StatusCode.DATA_LOSS, f"{ref.name} did not arrive as it was sent")
        except (TandemError, OSError) as error:
            await _abort(context, _code(error), _words(error))
        stored: node_pb2.FileInfo = first.file
        return stored

    async def GetFile(self, request: Any, context: Any) -> AsyncIterator[node_pb2.FilePart]:  # noqa: N802
        """See node.proto."""
        try:
            if request.held_run:
                path = self._holds.path(request.held_run, request.name, self._owner_of(context))
            else:
                path = self._inside(self._place(request.job, request.folder, request.name, context))
            if request.offset < 0:
                raise UserError(f"{request.name} has no byte {request.offset}")
            with path.open("rb") as file:
                file.seek(request.offset)
                while data := await asyncio.to_thread(file.read, rpc.PART_BYTES):
                    yield node_pb2.FilePart(offset=file.tell() - len(data), data=data)
        except (TandemError, OSError) as error:
            await _abort(context, _code(error), _words(error))

    async def ListFiles(self, request: Any, context: Any) -> node_pb2.FileList:  # noqa: N802
        """See node.proto."""
        try:
            folder = self._inside(self._folder(request.job, request.folder, context))
        except TandemError as error:
            await _abort(context, _code(error), _words(error))

        def look() -> list[node_pb2.FileInfo]:
            paths = sorted(path for path in folder.glob("*") if path.is_file() and not path.is_symlink())
            return [
                rpc.encode_file(StoredFile(path.name, sha256_of(path), path.stat().st_size, request.folder))
                for path in paths
            ]

        return node_pb2.FileList(files=await asyncio.to_thread(look))

    def _folder(self, job: str, folder: str, context: Any) -> Path:
        if self._job is None or self._job.name != job or self._job.caller != caller(context):
            raise UserError("this node does not work on that job")
        if folder not in FOLDERS:
            raise UserError(f"a job has no folder {folder!r}")
        return self._job.folder / folder

    def _place(self, job: str, folder: str, name: str, context: Any) -> Path:
        _check_bare(name)
        return self._folder(job, folder, context) / name

    async def Introduce(self, request: Any, context: Any) -> node_pb2.Introduced:  # noqa: N802
        """See node.proto."""
        try:
            self._folder(request.job, "", context)
            if request.manifest and not is_sha256(request.manifest):
                raise UserError("a model's manifest is named by its SHA-256")
            assert self._job is not None
            self._trust.introduce(request.certificates)
            self._job.model = request.manifest
        except TandemError as error:
            await _abort(context, _code(error), _words(error))
        return node_pb2.Introduced()

    def model_for(self, context: Any) -> str | None:
        """See ``FileService``: the introduced get the model of the job at hand, the paired whatever is here."""
        if self._trust.standing(caller(context)) in (Standing.OWN, Standing.PAIRED):
            return None
        return self._job.model if self._job is not None else ""

    def _inside(self, path: Path) -> Path:
        """A file or folder of the job, followed to where it is.

        Raises:
            UserError: it leads out of the job's folder, or is something that one could wait at for ever.
        """
        assert self._job is not None
        real = path.resolve()
        if not real.is_relative_to(self._job.folder.resolve()):
            raise UserError(f"{path.name} leads out of the job's folder")
        if real.exists() and not (real.is_file() or real.is_dir()):
            raise UserError(f"{path.name} is no ordinary file")
        return real

    async def Held(self, request: Any, context: Any) -> node_pb2.HeldState:  # noqa: N802
        """See node.proto."""
        slot, run, owner = self._slot, _clean(request.run), self._owner_of(context)
        # Who asks has started anew: that job is about to end, whatever its connection says, and its state to be held.
        while not request.now and slot.busy is not None and (slot.busy.run, slot.owner) == (run, owner):
            await slot.changed.wait()
        try:
            return rpc.encode_held(await asyncio.to_thread(self._holds.find, request.run, owner))
        except TandemError as error:
            await _abort(context, _code(error), _words(error))

    # --- links and the owner ----------------------------------------------------------------------------------------

    async def Measure(self, request: Any, context: Any) -> node_pb2.MeasureReply:  # noqa: N802
        """See node.proto."""
        del context
        reply = node_pb2.MeasureReply()
        for address in request.addresses[:MOST_MEASURED]:
            found = await asyncio.to_thread(links.measure, address, request.seconds, self._trust, request.certificate)
            wire.fill(found, reply.results.add())
        return reply

    async def Diagnose(self, request: Any, context: Any) -> node_pb2.DiagnoseReply:  # noqa: N802
        """See node.proto."""
        if request.protocol != rpc.PROTOCOL:
            return node_pb2.DiagnoseReply(info=rpc.encode_info(self._described()))
        if self._diagnose is None:
            await _abort(context, grpc.StatusCode.UNIMPLEMENTED, "this program gives no diagnosis")
        wanted = Wanted(tuple(request.reach[:MOST_REACHED]), tuple(request.expect[:MOST_EXPECTED]))
        try:
            async with self._diagnosing:  # one at a time, whoever asks
                return rpc.encode_diagnosis(await self._diagnose(wanted, caller_address(context)))
        except (TandemError, OSError) as error:
            await _abort(context, _code(error), _words(error))

    async def Control(self, request: Any, context: Any) -> node_pb2.ControlReply:  # noqa: N802
        """See node.proto."""
        own = self._trust.standing(caller(context)) is Standing.OWN
        if not (own and hmac.compare_digest(request.secret.encode(), self._secret.encode())):
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, "only programs of this TANDEM_HOME may ask that")
        reply = node_pb2.ControlReply()
        match request.action:
            case "pause" | "resume":
                self._owner.pause(paused=request.action == "pause")
            case "stop" if self._stop is not None:
                await self._stop()
            case "pair" if self._pair is not None:
                try:
                    wire.fill(await self._pair(), reply.code)
                except UserError as error:
                    await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, _words(error))
            case other:
                await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"nothing is known of {other}")
        reply.info.CopyFrom(rpc.encode_info(self._described()))
        return reply


async def _to_the_end(task: asyncio.Task[None]) -> None:
    """Wait until a task has ended, however often we are cancelled: gRPC may do so while we are ending already."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


def _empty(folder: Path, *, keep_log: bool) -> None:
    """Remove a job's folder, or all but the logs in it: models and copies are large."""
    if not keep_log or not any(log.stat().st_size for log in folder.glob("*.log")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in (LOG_NAME, REDUCER_LOG):
            path.unlink(missing_ok=True)


def _check_bare(name: str) -> None:
    """Refuse a name that leads out of its folder."""
    FileRef(name, "", 0)


def _busy_message(busy: Busy) -> node_pb2.Busy:
    message = node_pb2.Busy()
    wire.fill(busy, message)
    return message


def _clean(text: str) -> str:
    """A stranger's words on one short line."""
    return "".join(character for character in text if character.isprintable())[:80]


def _lost(error: BaseException | None) -> node_pb2.Lost:
    """What ends a job, for its coordinator."""
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (UserError, "user"),
        (OutOfMemory, "memory"),
        (WorkerLost, "lost"),
        (WorkerError, "worker"),
    )
    kind = next((kind for cls, kind in kinds if isinstance(error, cls)), "disk")
    return node_pb2.Lost(kind=kind, message=_words(error))


def _words(error: BaseException | None) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror}"
    return " ".join(str(error).split())


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, FileNotFoundError):
        return grpc.StatusCode.NOT_FOUND
    return grpc.StatusCode.RESOURCE_EXHAUSTED if isinstance(error, OSError) else grpc.StatusCode.INVALID_ARGUMENT


async def _abort(context: Any, code: grpc.StatusCode, words: str) -> NoReturn:
    await context.abort(code, words)
    raise AssertionError("abort raises")
