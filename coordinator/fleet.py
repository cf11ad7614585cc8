"""Several machines for one run: found, reserved, given the model, probed, measured and planned, then one crew."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import getpass
import math
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from coordinator.alone import load
from coordinator.config import TrainConfig
from coordinator.copies import Kept
from coordinator.crew import Crew, Member, StopRequested, unless_stopped
from coordinator.data.padding import positions_at_once
from coordinator.data.tokenset import TokenSet
from coordinator.discovery import SeenNode, Selection, parse_wanted, select, unusable
from coordinator.distribution import distribute
from coordinator.finish import FusingNode
from coordinator.groups import Means, group_parts, unencrypted
from coordinator.home import home
from coordinator.ledger import Fault, Tally
from coordinator.links import Paths, measure_links
from coordinator.models import ResolvedModel
from coordinator.pace import Pace, Speed
from coordinator.planner import Candidate, JobFacts, LeftOut, Plan, describe, plan
from coordinator.preflight import SHORT_ROW, check_memory, fitting_tokens, least_bytes, memory_limit
from coordinator.pressure import in_words
from coordinator.program import Program
from coordinator.recruits import NotWorth, Recruiter
from coordinator.regroup import Excluded
from coordinator.ring_order import best_order, ring_seconds, streams_seconds
from coordinator.shares import StepSource, halved
from coordinator.stream import Advanced, FleetFormed, FleetMember, Noted, Reader
from coordinator.takeup import Source, fetch
from coordinator.watch import state_patience
from coordinator.workers import wait_for
from node.client import NodeClient, RemoteWorker
from node.daemon import Daemon
from node.errors import NodeError, NodeRefused, OutOfMemory, TandemError, TooFewNodes, UserError, WorkerError
from node.events import Probed, Ready
from node.hardware import Facts, facts
from node.hardware import describe as describe_machine
from node.identity import credentials
from node.info import Busy, GradientDtype, Manifest, NodeInfo, RingPart
from node.manifest import manifest_of
from node.owner import Owner
from node.peers import fingerprint
from node.running import running_nodes
from node.sizes import show_size
from node.spec import FileRef, JobSpec, Probe, Share
from node.store import Store
from node.trust import Trust

__all__ = ["Ahead", "Fleet", "Selection", "Wanted", "looking"]

PROBE_REPEATS = 2
PROBE_SECONDS = 0.5
"""For each share: long enough for a machine that does other things now and then to show it."""
LINK_SECONDS = 0.2
KEPT_SECONDS = 5.0
"""For a machine to see its lost worker out and to say what it keeps of it, when nobody holds the newest state."""
STEPS_LOOKED_AT = 16
UNPAIRED = "paired with this machine no more"
NOT_LOCAL = "it is on this machine, which --no-local leaves out; --nodes with its name has it train"


@dataclass(frozen=True)
class Ahead:
    """What is known of a job before its data is read.

    Attributes:
        config: all options.
        model: that is trained.
        job: the run's id.
    """

    config: TrainConfig
    model: ResolvedModel
    job: str


@dataclass(frozen=True)
class Wanted:
    """What the fleet is for.

    Attributes:
        config: all options.
        model: that is trained.
        job: what every worker is to know.
        given: files that a job's folder must hold before.
        steps: the rows of each step.
        train: the training data.
        program: which batches form which step.
    """

    config: TrainConfig
    model: ResolvedModel
    job: JobSpec
    given: dict[FileRef, Path]
    steps: StepSource
    train: TokenSet
    program: Program


@dataclass
class _Node:
    """A machine on its way into the fleet."""

    seen: SeenNode
    client: NodeClient
    info: NodeInfo
    link: RemoteWorker | None = None
    ready: Ready | None = None
    speed: Speed | None = None
    member: Member | None = None
    problem: str = ""

    @property
    def found(self) -> Facts:
        """Its facts, with its owner's limit on memory."""
        limit = self.info.max_memory_bytes
        if not limit:
            return self.info.facts
        total, gpu = self.info.facts.total_memory_bytes, self.info.facts.gpu_memory_bytes
        return dataclasses.replace(
            self.info.facts,
            total_memory_bytes=min(limit, total or limit),
            gpu_memory_bytes=min(limit, gpu) if gpu else None,
        )


@contextlib.asynccontextmanager
async def looking(
    config: TrainConfig, reader: Reader, *, plan_only: bool
) -> AsyncIterator[Awaitable[Selection | None]]:
    """Look for nodes meanwhile; what is awaited is whom the options and the network give, None for here alone.

    Raises:
        UserError, TooFewNodes: when awaited.
    """
    task = asyncio.create_task(_look(config, reader, plan_only=plan_only))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _look(config: TrainConfig, reader: Reader, *, plan_only: bool) -> Selection | None:
    if config.nodes == "local" and not plan_only:
        return None
    selection = await select(config.nodes, local=config.local)
    able = selection.nodes
    names = ", ".join(node.label or node.name for node in able)
    looked = f"looked {selection.looked_seconds:.1f} s"
    here = 1 if config.local and not (able and running_nodes(home())) else 0
    count = len(able) + here
    if count < max(config.min_nodes, 1):
        raise TooFewNodes(
            f"{count} of --min-nodes {config.min_nodes} machines {'is' if count == 1 else 'are'} there ({looked}):"
            f" {_reasons([*selection.left_out, *((name, NOT_LOCAL) for name in selection.not_local)])}"
        )
    for name in selection.not_local:  # as was asked for: no warning
        reader.handle(Noted("left_out", f"{name} is left out: {NOT_LOCAL}", details={"node": name}))
    for name, reason in selection.left_out:
        reader.handle(_left_out(name, reason))
    if able:
        reader.handle(Noted("nodes", f"found {names} ({looked})", details={"nodes": [node.name for node in able]}))
        return selection
    if config.nodes != "local":
        reader.handle(Noted("nodes", f"no other node found ({looked}): training on this machine alone until one comes"))
    return selection if plan_only else None


def _left_out(name: str, reason: str) -> Noted:
    return Noted("left_out", f"{name} is left out: {reason}", "warning", {"node": name})


def _reasons(left_out: Sequence[tuple[str, str]]) -> str:
    """Why there are no more machines."""
    return "; ".join(f"{name}: {reason}" for name, reason in left_out) or "no other was found"


class Fleet:
    """Brings the workers of several machines, at first and later; see ``regroup.Muster``.

    Args:
        ahead: what is known of the job before its data is read; ``want`` tells the rest.
        selection: whom to ask.
        reader: takes what happens.
        stop: set by Ctrl-C.

    Attributes:
        plan: who does what, once assembled.
        reduce: by what means the next group adds up; a value of ``TrainConfig.reduce``.
        gradient_dtype: as what gradients are sent, in all of the run; ``auto`` until the plan has said it.
    """

    def __init__(self, ahead: Ahead, selection: Selection, reader: Reader, stop: asyncio.Event) -> None:
        self._ahead = ahead
        self._told: Wanted | None = None
        self._coming: asyncio.Task[None] | None = None
        self._closed = False
        self._selection = selection
        self._reader = reader
        self._stop = stop
        self._trust = Trust(home())
        self._watching: asyncio.Task[None] | None = None
        self._nodes: list[_Node] = []
        self._daemon: Daemon | None = None
        self._giver: tuple[str, NodeInfo] | None = None  # this machine's own node service
        self._links: Paths | None = None
        self._manifest = ""
        self._model: Manifest | None = None
        self._left_out: list[tuple[str, str]] = list(selection.left_out)
        self._limits: dict[str, int] = {}  # input positions of a micro-batch, where memory has run out
        self._recruiter: Recruiter | None = None
        self._ready: dict[str, _Node] = {}
        self._preparing: list[_Node] = []
        self._introducing = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._known: dict[str, SeenNode] = {}  # all that have had a worker in a generation
        self.plan: Plan | None = None
        self.reduce = ahead.config.reduce
        self.gradient_dtype: GradientDtype | Literal["auto"] = ahead.config.gradient_dtype  # type: ignore[assignment]

    # --- coming together ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Meet the machines, have them start workers and get the model, while the data is read."""
        self._watch_trust()
        if self._coming is None:
            self._coming = asyncio.create_task(unless_stopped(self._come_together(), self._stop))

    def want(self, wanted: Wanted) -> None:
        """Say what it is for, now that the data is read; before ``assemble``."""
        self._told = wanted

    @property
    def _wanted(self) -> Wanted:
        assert self._told is not None, "the data is read before anybody trains"
        return self._told

    async def assemble(self) -> Crew:
        """See ``regroup.Muster``."""
        self.begin()
        return await unless_stopped(self._assemble(), self._stop)

    def _watch_trust(self) -> None:
        """From now on do without whoever is paired no more."""
        if self._watching is None:
            self._trust.on_revoked(self._cut_off)
            self._watching = asyncio.create_task(self._trust.watch())

    def _cut_off(self, mark: str) -> None:
        """End all that we have with a machine that is paired no more."""
        gone = [
            node
            for node in self._present
            if node.seen.certificate is not None and fingerprint(node.seen.certificate) == mark
        ]
        for node in gone:
            node.problem = UNPAIRED
            if node.link is not None:
                node.link.kill()
        self._later(self._introduce())
        for node in gone:
            line = f"{node.info.name} is {UNPAIRED}; going on without it"
            self._reader.handle(Noted("unpaired", line, "warning", {"node": node.info.name}))

    @property
    def _present(self) -> list[_Node]:
        """All that we have to do with, those that are being prepared among them."""
        return [*self._nodes, *self._ready.values(), *self._preparing]

    def _check_paired(self, seen: SeenNode) -> None:
        """See that a machine is trusted still.

        Raises:
            NodeError: it is not.
        """
        if self._trust.certificate_of(seen.home) != seen.certificate:
            raise NodeError(f"{seen.label or seen.name} is {UNPAIRED}")

    def _later(self, work: Coroutine[None, None, None]) -> None:
        """Do something meanwhile; ``rest`` waits for its end."""
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _come_together(self) -> None:
        """All that needs no data."""
        await self._meet()
        config = self._ahead.config
        await self._check_memory(config, min(SHORT_ROW, config.max_seq_length))
        await self._reserve()
        await self._bring_the_model()
        # Where this machine takes part, its links would be measured while it is busy with the data.
        if not any(node.seen.own for node in self._nodes):
            await self._measure_links()

    async def _assemble(self) -> Crew:
        assert self._coming is not None, "it has begun"
        await self._coming
        await self._check_memory(self._largest(), self._wanted.train.longest)
        await self._load()
        await self._probe()
        await self._decide()
        return Crew([self._member(node) for node in self._nodes], self._stop)

    async def _meet(self) -> None:
        """Clients for all that were selected, and this machine among them."""
        own = home()
        giver = self._selection.giver
        if giver is not None and giver.info is not None:
            self._giver = (giver.address, giver.info)
        for seen in self._selection.nodes:
            assert seen.info is not None, "nodes that did not answer are not selected"
            info = dataclasses.replace(seen.info, name=seen.label or seen.name)
            self._nodes.append(_Node(seen, NodeClient(seen.address, info.name, seen.certificate), info))
        if self._giver is None:
            # It gives the model even where it does not train.
            # A node that serves here and was left out has its owner's reasons: then this machine gives files only.
            trains = self._ahead.config.local and not running_nodes(own)
            daemon = await self._host({node.info.name for node in self._nodes}, takes_jobs=trains)
            if trains:
                self._nodes.insert(0, _own_node(daemon, daemon.info()))

    async def _host(self, taken: Set[str], *, takes_jobs: bool) -> Daemon:
        """Have a node service of this very program, which gives the model.

        Args:
            taken: names of other machines.
            takes_jobs: whether it trains, too.
        """
        name = own_name()
        if name in taken:
            name = f"{name} (here)"
        # To train on the own machine's battery, or with a model's own code, is the person's own wish.
        owner = Owner(home(), allow_battery=True, trusts_code=self._ahead.config.trust_remote_code)
        daemon = Daemon(home(), name, takes_jobs=takes_jobs, advertise=False, owner=owner)
        await daemon.start()
        self._daemon, self._giver = daemon, (daemon.address, daemon.info())
        return daemon

    async def _check_memory(self, config: TrainConfig, longest: int) -> None:
        """Leave out whom the model does not fit, before it is sent and before it is loaded.

        Args:
            config: the options, with the largest batch there may be.
            longest: tokens of the longest row, as far as that is known.

        Raises:
            UserError: it fits nobody; the message says what would fit the largest.
        """
        model = self._ahead.model
        needs = least_bytes(config, model, longest)
        short = []
        for node in self._nodes:
            limit = memory_limit(node.found)
            if limit is not None and limit < needs and not config.force:
                node.problem = f"the model needs {show_size(needs)} of memory, it has {show_size(limit)} for it"
                short.append(node)
        if short and len(short) == len(self._nodes):
            largest = max(short, key=lambda node: memory_limit(node.found) or 0)
            check_memory(config, model, longest, rows_at_once=1, found=largest.found)
        await self._drop_problems()

    def _token_limit(self, node: _Node) -> int | None:
        """Most input positions of a micro-batch that fit into its memory; None when whole batches do."""
        fitting = fitting_tokens(self._largest(), self._ahead.model, self._wanted.train.longest, node.found)
        known = self._limits.get(node.info.id)
        return fitting if known is None else min(known, fitting or known)

    @property
    def token_limit(self) -> int | None:
        """Most input positions that fit everywhere at once; for evaluations, whose chunks go to anyone."""
        limits = [limit for node in self._nodes if (limit := self._token_limit(node)) is not None]
        return min(limits, default=None)

    def _largest(self) -> TrainConfig:
        """The options with a batch that is no larger than the data."""
        config = self._ahead.config
        return dataclasses.replace(config, batch_size=min(config.batch_size, len(self._wanted.train)))

    async def _reserve(self) -> None:
        """Open a worker on each node; in one order everywhere, so that two coordinators never wait for each other."""
        config = self._ahead.config
        owner = _owner()
        for node in sorted(self._nodes, key=lambda node: node.info.id):

            def queued(before: int, busy: Busy, name: str = node.info.name) -> None:
                line = f"waiting for {name}: it works on {busy.run} for {busy.owner}; {before} before us"
                self._reader.handle(Noted("queued", line))

            try:
                node.link = await node.client.open_worker(self._ahead.job, owner, wait=config.wait, on_queue=queued)
                self._check_paired(node.seen)  # it may have stood in line for long
            except NodeError as error:
                hint = "; --wait stands in line" if isinstance(error, NodeRefused) and error.kind == "busy" else ""
                node.problem = f"{error}{hint}"
        await self._drop_problems()

    async def _bring_the_model(self) -> None:
        """Have the model's files where they are lacking; each link carries them once."""
        await self._read_the_model()
        await self._send_model(self._nodes)
        await self._drop_problems()

    async def _read_the_model(self) -> None:
        """See which files make up the model, and have the store of this machine give them."""
        model, own = self._ahead.model, home()

        def advance(done: int, total: int) -> None:
            if self._stop.is_set() or self._closed:
                raise StopRequested
            self._reader.handle(Advanced("reading the model", done, total, in_bytes=True))

        def describe_and_adopt() -> tuple[Manifest, str]:
            manifest = manifest_of(
                model.path,
                model.name,
                model.revision or "",
                own / "cache" / "digests.json",
                advance,
                with_code=self._ahead.config.trust_remote_code,
            )
            return manifest, Store(own / "store").adopt(manifest, model.path)

        self._model, self._manifest = await asyncio.to_thread(describe_and_adopt)

    async def _send_model(self, nodes: Sequence[_Node]) -> None:
        """Have these nodes get what they lack of the model."""
        assert self._giver is not None
        assert self._model is not None
        await self._introduce()
        troubles = await distribute(
            self._model,
            {node.info.id: (node.client, node.info) for node in nodes},
            self._giver,
            self._trust.certificate_of,
            progress=lambda done, total: self._reader.handle(Advanced("sending the model", done, total, in_bytes=True)),
            note=lambda line: self._reader.handle(Noted("model_sent", line)),
        )
        for node in nodes:
            node.problem = node.problem or troubles.get(node.info.id, "")

    async def _introduce(self) -> None:
        """Make all machines of the job known to each other: we are paired with all, they need not be."""
        async with self._introducing:  # what is told replaces what was told before
            present = self._present
            certificates = {node.info.home: self._trust.certificate_of(node.info.home) for node in present}

            async def one(node: _Node) -> None:
                if node.link is None:
                    return  # let go, or not asked yet
                others = [known for home, known in certificates.items() if home != node.info.home and known is not None]
                try:
                    await node.client.introduce(node.link.job, others, self._manifest)
                except NodeError as error:
                    if node.member is None:
                        node.problem = node.problem or str(error)
                    # Of those that train, whatever is wrong shows when they are needed.

            await asyncio.gather(*(one(node) for node in present))

    async def _load(self) -> None:
        """Have all workers load the model, at the same time."""

        async def one(node: _Node) -> None:
            try:
                await self._load_on(node)
            except UserError:
                raise  # the model or the options: no machine would do better
            except TandemError as error:
                node.problem = str(error)

        await asyncio.gather(*(one(node) for node in self._nodes))
        await self._drop_problems()

    async def _load_on(self, node: _Node) -> None:
        assert node.link is not None
        job = self._wanted.job
        job = dataclasses.replace(job, model=dataclasses.replace(job.model, manifest=self._manifest))
        node.ready = await load(node.link, job, self._wanted.given, self._reader, self._stop)

    async def _probe(self) -> None:
        """Measure each machine on rows of the first step, all at the same time as in training."""

        async def one(node: _Node) -> None:
            try:
                await self._probe_on(node)
            except (WorkerError, NodeError) as error:  # too little memory among them
                node.problem = str(error)

        self._reader.handle(Advanced("measuring the machines", 0, 0))
        await asyncio.gather(*(one(node) for node in self._nodes))
        await self._drop_problems()

    async def _probe_on(self, node: _Node) -> None:
        assert node.link is not None
        samples: list[tuple[int, float]] = []
        for share in _probe_shares(self._wanted.steps.share(1), self._token_limit(node)):
            await node.link.send(Probe(share, PROBE_REPEATS, PROBE_SECONDS))
            probed = await wait_for(node.link, Probed, self._reader)
            # The mean: what a machine does beside this belongs to its speed.
            samples.append((probed.positions, statistics.fmean(probed.seconds)))
        node.speed = Speed.fitted(samples)

    async def _measure_links(self) -> None:
        clients = {node.info.id: (node.client, node.info) for node in self._nodes}
        self._links = await measure_links(clients, self._certificates(), LINK_SECONDS)

    async def _decide(self) -> None:
        """Plan, with the links measured by then; who is not in the plan is let go."""
        config = self._ahead.config
        if self._links is None:
            await self._measure_links()
        assert self._links is not None
        candidates = [self._candidate(node) for node in self._nodes]
        chosen = plan(
            candidates, self._facts(), self._links.between(), min_nodes=config.min_nodes, force_all=config.force_all
        )
        before = tuple(LeftOut("", name, reason) for name, reason in self._left_out)
        self.plan = dataclasses.replace(chosen, left_out=before + chosen.left_out)
        self.gradient_dtype = chosen.gradient_dtype
        order = {member.candidate.id: rank for rank, member in enumerate(self.plan.members)}
        for node in self._nodes:
            if node.info.id not in order:
                await self._let_go(node)
        self._nodes = sorted((n for n in self._nodes if n.info.id in order), key=lambda n: order[n.info.id])
        in_clear: list[str] = []
        if len(self._nodes) > 1:
            # What is lacking is said now, lest it be found out when the group forms.
            in_clear = unencrypted(self._means(), [node.info.id for node in self._nodes], self._infos(), self._links)
            if config.ring_encryption == "off" and in_clear:
                line = "--ring-encryption off: what the machines add up crosses the network unencrypted"
                self._reader.handle(Noted("unencrypted", line, "warning"))
        self._tell_plan(self.plan, in_clear)

    def _tell_plan(self, chosen: Plan, in_clear: Sequence[str] = ()) -> None:
        found = {node.info.id: node.info for node in self._nodes}
        members = [(found[member.candidate.id], member.rows) for member in chosen.members]
        self._reader.handle(
            FleetFormed(
                members=tuple(
                    FleetMember(info.name, info.facts.chip, info.facts.total_memory_bytes, rows)
                    for info, rows in members
                ),
                step_rows=chosen.step_rows,
                lines=(*describe(chosen), *in_clear),
                links=self._links.told() if self._links is not None else (),
            )
        )

    def _candidate(self, node: _Node) -> Candidate:
        member = node.member
        return Candidate(
            id=node.info.id,
            name=node.info.name,
            memory_bytes=memory_limit(node.found),
            needs_bytes=least_bytes(self._largest(), self._ahead.model, self._wanted.train.longest),
            token_limit=self._token_limit(node),
            speed=member.pace.now if member is not None and member.pace is not None else node.speed,
        )

    def _facts(self) -> JobFacts:
        """What a plan must know of the job."""
        config, wanted = self._ahead.config, self._wanted
        last = min(wanted.program.total_steps, STEPS_LOOKED_AT)
        return JobFacts(
            steps=tuple(wanted.steps.lengths(step) for step in range(1, last + 1)),
            max_seq_length=config.max_seq_length,
            batch_size=config.batch_size,
            accumulation=config.grad_accumulation_steps,
            gradient_bytes=self._gradient_bytes,
            streams=self.reduce == "grpc",
            hub=self._hub,
            gradient_dtype=self.gradient_dtype,
            local_steps=config.local_steps,
            at_once=positions_at_once(config.fine_tune_type),
        )

    @property
    def _hub(self) -> str:
        """Id of this machine, where it takes part."""
        return next((node.info.id for node in self._nodes if node.seen.own), "")

    @property
    def _gradient_bytes(self) -> int:
        ready = next((node.ready for node in self._nodes if node.ready is not None), None)
        return 4 * ready.trainable_parameters if ready is not None else 0

    def _member(self, node: _Node) -> Member:
        assert node.link is not None
        assert node.ready is not None
        assert node.speed is not None
        node.member = Member(
            node.info.id,
            node.info.name,
            node.link,
            node.ready,
            Pace(node.speed),
            self._token_limit(node),
            keeps=node.seen.own,
        )
        # What its node said while the model was loaded and measured.
        line = node.member.is_now(node.link.condition)
        if line is not None:
            details = {"node": node.info.name, "now": in_words(node.link.condition)}
            self._reader.handle(Noted("condition", line, "warning", details))
        return node.member

    async def _drop_problems(self) -> None:
        """Let go whoever turned out not to be able to, with a word; fail when too few are left."""
        dropped = [node for node in self._nodes if node.problem]
        for node in dropped:
            self._left_out.append((node.info.name, node.problem))
            await self._let_go(node)
        left = len(self._nodes)
        fewest = self._ahead.config.min_nodes
        if left < max(1, fewest):
            why = _reasons(self._left_out)
            if left == 0 and fewest == 1:
                raise TandemError(f"no machine can take part: {why}")
            raise TooFewNodes(f"{left} of --min-nodes {fewest} machines can take part: {why}")
        for node in dropped:
            self._reader.handle(_left_out(node.info.name, node.problem))

    async def _let_go(self, node: _Node) -> None:
        if node in self._nodes:
            self._nodes.remove(node)
        if node.link is not None:
            await node.link.close()
        await node.client.close()

    # --- while it trains ------------------------------------------------------------------------------------------

    awaited = "waiting for a machine to come back (Ctrl-C stops)"

    def attend(self, wake: Callable[[], None]) -> None:
        """See ``regroup.Muster``."""
        self._watch_trust()
        away = [seen for seen in self._selection.nodes if seen.id not in {node.info.id for node in self._nodes}]
        self._recruiter = Recruiter(
            parse_wanted(self._ahead.config.nodes),
            self._prepare,
            wake,
            taking_part=lambda: {node.info.id for node in self._nodes} | self._ready.keys(),
            passed_over={seen.id for seen in away},
        )
        self._known |= {node.info.id: node.seen for node in self._nodes}
        self._recruiter.start()

    def arrivals(self) -> list[Member]:
        """See ``regroup.Muster``."""
        arrived, self._ready = list(self._ready.values()), {}
        self._nodes += arrived
        self._known |= {node.info.id: node.seen for node in arrived}
        return [self._member(node) for node in arrived]

    def lost(self, member: Member, error: TandemError | None, largest: int) -> None:
        """See ``regroup.Muster``."""
        node = next((node for node in self._nodes if node.member is member), None)
        if node is None:
            return
        self._nodes.remove(node)
        self._later(node.client.close())
        assert self._recruiter is not None
        if isinstance(error, OutOfMemory):
            limit = halved(member.token_limit or largest, self._wanted.train.longest)
            if limit is None:
                error = Excluded(str(error))
            else:
                self._limits[member.id] = limit
        self._recruiter.lost(node.seen, for_good=isinstance(error, Excluded))

    async def kept(self) -> list[Kept]:
        """See ``regroup.Muster``; all are asked at the same time, and have a moment."""
        found = await asyncio.gather(*(self._kept_by(machine, seen) for machine, seen in self._known.items()))
        return [kept for kept in found if kept is not None]

    async def _kept_by(self, machine: str, seen: SeenNode) -> Kept | None:
        run, name = self._ahead.job, seen.label or seen.name
        # Who works for us again has seen its old worker out; others may be about to.
        again = machine in {node.info.id for node in (*self._nodes, *self._ready.values())}
        client = NodeClient(seen.address, name, seen.certificate)
        try:
            copy = await client.held(run, KEPT_SECONDS, now=again)
        except NodeError:
            return None  # away, or of a version that keeps nothing
        finally:
            await client.close()
        if copy is None:
            return None
        return Kept(machine, name, copy, partial(fetch, run, Source(copy, name, seen.address, seen.certificate)))

    async def _prepare(self, seen: SeenNode) -> None:
        """Have a machine ready to take part, if a step is the shorter for it.

        Raises:
            NotWorth: it is not.
            TandemError: it cannot.
        """
        self._check_paired(seen)
        client = NodeClient(seen.address, seen.label or seen.name, seen.certificate)
        info = dataclasses.replace(await client.describe(), name=seen.label or seen.name)
        node = _Node(dataclasses.replace(seen, info=info), client, info)
        self._preparing.append(node)
        try:
            reason = unusable(node.seen, facts())
            if reason:
                raise NodeError(f"{info.name}: {reason}")
            # Only we are in line, if anybody: what it still does is clearing up our own worker.
            self._check_worth(node)
            node.link = await client.open_worker(self._ahead.job, _owner())
            await self._be_ready_for(node)
            await self._make_ready(node)
        except BaseException:
            await self._let_go(node)
            raise
        finally:
            self._preparing.remove(node)
        self._ready[info.id] = node

    async def _make_ready(self, node: _Node) -> None:
        """Have a machine that is ours do all that takes part in a training, and say how it ended."""
        name = node.info.name
        details = {"node": name}
        self._reader.handle(Noted("preparing", f"preparing {name} to take part", details=details))
        try:
            await self._send_model([node])
            if node.problem:
                raise NodeError(node.problem)
            await self._load_on(node)
            await self._probe_on(node)
            await self._weigh(node)
            self._check_paired(node.seen)
        except NotWorth as error:
            self._reader.handle(Noted("stays_out", str(error), details=details))
            raise
        except (TandemError, OSError) as error:
            self._reader.handle(Noted("not_ready", f"{name} cannot take part yet: {error}", details=details))
            raise

    def _check_worth(self, node: _Node) -> None:
        """See that a machine may be of use, before anything is sent there.

        Raises:
            NotWorth: the model does not fit it.
        """
        needs = least_bytes(self._largest(), self._ahead.model, self._wanted.train.longest)
        limit = memory_limit(node.found)
        if limit is not None and limit < needs and not self._ahead.config.force:
            raise NotWorth(f"{node.info.name} stays out: the model needs {show_size(needs)}, it has {show_size(limit)}")

    async def _be_ready_for(self, node: _Node) -> None:
        """Have ready here what another machine needs; called when it is ours."""

    async def _weigh(self, node: _Node) -> Plan | None:
        """See whether a machine makes a step shorter; with nobody left, any does.

        Returns:
            The plan with it; None with nobody left.
        """
        present = [*self._nodes, *self._ready.values()]
        clients = {other.info.id: (other.client, other.info) for other in (*present, node)}
        certificates = self._certificates(node)
        measured = await measure_links(clients, certificates, LINK_SECONDS, only=node.info.id)
        self._links = self._links.joined(measured) if self._links is not None else measured
        if measured.found:
            told = measured.told()
            details = {"node": node.info.name, "links": [dataclasses.asdict(link) for link in told]}
            self._reader.handle(Noted("links", "; ".join(link.text for link in told), details=details))
        if not present:
            return None
        candidates = [self._candidate(other) for other in (*present, node)]
        force = self._ahead.config.force_all
        chosen = plan(candidates, self._facts(), self._links.between(), force_all=force)
        if node.info.id not in {member.candidate.id for member in chosen.members}:
            reason = next((left.reason for left in chosen.left_out if left.id == node.info.id), "not worth it")
            raise NotWorth(f"{node.info.name} stays out: {reason}")
        return chosen

    async def rest(self) -> None:
        """See ``regroup.Muster``."""
        if self._recruiter is not None:
            await self._recruiter.stop()
        ready, self._ready = list(self._ready.values()), {}
        for node in ready:
            await self._let_go(node)
        await asyncio.gather(*self._closing, return_exceptions=True)

    # --- as a group -----------------------------------------------------------------------------------------------

    def order(self, ids: tuple[str, ...]) -> list[str]:
        """See ``regroup.Muster``."""
        assert self._links is not None
        return best_order(list(ids), self._links.between(), self._gradient_bytes)

    def ring(self, crew: Crew, *, streams: bool) -> list[RingPart]:
        """See ``regroup.Muster``: routes and proofs are made anew for each group."""
        assert self._links is not None
        means = dataclasses.replace(self._means(), reduce="grpc") if streams else self._means()
        longest = state_patience(self.sum_seconds(crew.ids, streams=streams))
        return group_parts(means, crew.ids, self._infos(), self._links, self._certificates(), longest)

    def sum_seconds(self, ids: Sequence[str], *, streams: bool) -> float:
        """See ``regroup.Muster``."""
        links, size = self._links.between() if self._links is not None else {}, self._gradient_bytes
        if streams or self.reduce == "grpc":
            return streams_seconds(ids, links, self._hub, size, 0.0)
        seconds = ring_seconds(best_order(list(ids), links, size), links, size, 0.0)
        # With no ring there are streams, whose links nobody has measured.
        return seconds if math.isfinite(seconds) else streams_seconds(ids, {}, "", size, 0.0)

    def _means(self) -> Means:
        dtype = self.gradient_dtype
        assert dtype != "auto", "there is a plan before there is a group"
        return Means(self.reduce, self._ahead.config.ring_encryption, dtype)

    def _certificates(self, *others: _Node) -> dict[str, bytes]:
        """By which the machines are known, those of one home by the same."""
        present = (*self._nodes, *self._ready.values(), *others)
        return {node.info.id: node.seen.certificate or b"" for node in present}

    def _infos(self) -> dict[str, NodeInfo]:
        return {node.info.id: node.info for node in self._nodes}

    # --- for people -----------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """Who takes part, for a run's header."""
        return [describe_machine(dataclasses.replace(node.info.facts, name=node.info.name)) for node in self._nodes]

    def receipt(self, tally: Tally, digest: str, faults: Sequence[Fault]) -> tuple[tuple[str, str], ...]:
        """Lines at the end: who did how much, that all have the same weights, and how fast it was.

        Args:
            tally: of this sitting.
            digest: of the weights that all ended with, or "".
            faults: that were survived.
        """
        if self.plan is None or not tally.steps or (len(tally.rows) < 2 and not faults):
            return ()
        total = max(sum(tally.rows.values()), 1)
        shares = ", ".join(f"{name} {100 * rows / total:.0f} %" for name, rows in tally.rows.items())
        same = f"; all ended with the same weights ({digest[:12]})" if digest else ""
        seconds = tally.seconds / tally.steps
        alone = self.plan.alone_seconds
        ratio = f"{alone / seconds:.1f} times as fast"
        speed = f"{seconds:.3g} s a step; {self.plan.alone} alone about {alone:.3g} s: {ratio}"
        lines = [("nodes", f"{shares} of the rows{same}"), ("speed", speed)]
        if faults:
            lost, again = sum(fault.seconds for fault in faults), sum(fault.replayed for fault in faults)
            lines.append(("faults", f"{len(faults)}: {lost:.1f} s lost, {again} steps computed again"))
            lines += [("fault", fault.line) for fault in faults]
        return tuple(lines)

    def best_for_fusing(self) -> FusingNode | None:
        """The machine with the most memory; None where this one is as good as any."""

        def memory(node: _Node) -> tuple[int, bool]:
            return memory_limit(node.found) or 0, node.seen.own

        best = max(self._nodes, key=memory, default=None)
        if best is None or best.seen.own:
            return None
        return FusingNode(best.info.name, best.seen.address, best.seen.certificate, self._manifest, _owner())

    def keep_states(self) -> None:
        """Have the nodes keep what their workers hold when these are let go: it could not be saved here."""
        for node in self._nodes:
            if node.link is not None:
                node.link.keep_state = True

    async def close(self) -> None:
        """Let all nodes go, and end what was hosted here."""
        self._closed = True  # a thread may be reading the model still
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.rest()
        for node in list(self._nodes):
            await self._let_go(node)
        if self._daemon is not None:
            await self._daemon.stop()
            self._daemon = None


def own_name() -> str:
    """What this machine is called among others where no other is called so."""
    return facts().name or "this machine"


def _own_node(daemon: Daemon, info: NodeInfo) -> _Node:
    """This machine, as one of the fleet."""
    ours = credentials(home()).certificate
    seen = SeenNode(info.name, info.id, info.home, daemon.address, info, "", own=True, certificate=ours)
    return _Node(seen, NodeClient(seen.address, seen.name, ours), info)


def _owner() -> str:
    """Who asks, for the people of other machines."""
    return f"{getpass.getuser()} on {facts().name or 'a machine without a name'}"


def _probe_shares(step: Share, token_limit: int | None) -> list[Share]:
    """A small share and a large one of a step's rows: what starting costs, and what each position costs."""
    largest = max(step.micro_batches, key=lambda rows: len(rows.ids) * rows.padded_length)
    count = len(largest.ids)
    if token_limit is not None:
        count = max(1, min(count, token_limit // largest.padded_length))
    wanted = [1, count] if count > 1 else [1]
    return [
        Share(step.step, (largest.take(list(range(rows)), largest.padded_length),)) for rows in dict.fromkeys(wanted)
    ]
