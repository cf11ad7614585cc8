"""Which nodes are there: by Bonjour, at addresses given by hand, and on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import math
import shlex
import socket
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zeroconf import BadTypeInNameException, DNSQuestionType, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from coordinator import addresses
from coordinator.addresses import Remembered, split_address
from coordinator.home import home as tandem_home
from node.advert import SERVICE_TYPE, BonjourOff, fleet, open_bonjour
from node.errors import NodeError, NodeLost, NodeRefused, UserError
from node.hardware import Facts, facts, installed_version
from node.identity import Credentials, credentials
from node.info import PROTOCOL, NodeInfo
from node.names import AUTO, LOCAL
from node.peers import Peers, certificate_of, fingerprint
from node.running import running_nodes
from node.trust import certificate_at

if TYPE_CHECKING:
    from node.client import NodeClient

LOOK_SECONDS = 1.4
"""Looking and asking together, so that a listing with its start-up stays below two seconds."""
LEAST_SECONDS = 1.2
"""Who has told everyone just now may wait for a second before telling again (RFC 6762, section 6)."""
QUIET_SECONDS = 0.3
"""Once so long nothing new has been heard, nothing more is expected."""
LISTING_PATIENCE_SECONDS = 0.3
PATIENCE_SECONDS = 2.0
"""For nodes that were seen and are slow to answer, where a training depends on them."""
SELECT_SECONDS = 2.4
SELECT_LEAST_SECONDS = 2.2
"""Before a training, which looks for nodes while it reads its model: long enough for a second question to be answered
by nodes that have spoken within the second before the first one and keep quiet therefore.
"""
FAREWELL_SECONDS = 0.6
"""From a node's farewell, which it repeats, until it answers no more."""
AGAIN_SECONDS = 0.5
"""For who has answered before to answer again."""
REMEMBERED_SECONDS = 1.0
"""For addresses that were given once: nobody says that somebody is there now."""

SILENT = "does not answer in time: it has ended without a word, sleeps, is overloaded, or a firewall is in the way"
WENT_AWAY = "went away"
NOT_PAIRED = "not paired"
"""Begins the problem of a node that only paired machines may use."""


def unpaired(name: str) -> str:
    """Why a machine that we are not paired with cannot be used, and what mends it."""
    return f"{NOT_PAIRED} with this machine: coordinator pair {shlex.quote(name)}"


@dataclass(frozen=True)
class SeenNode:
    """A node that was found.

    Attributes:
        name: what its owner calls it.
        id, home: of the node and its ``TANDEM_HOME``; "" while unknown.
        address: ``host:port`` where it answered, or should have.
        info: what it says about itself; None when it did not answer.
        problem: why it cannot be used, or "".
        own: it serves from this program's ``TANDEM_HOME``.
        label: its name, with a number where several have the same, in the order in which they began to serve.
        by_hand: the address as it was given or remembered, or "".
        since: when it began to serve: seconds since 1970; 0 unknown.
        pairing_port: where it can be paired, as its advert says; 0 nowhere.
        join: id of the token that it waits to be paired with, as its advert says, or "".
        hosts: its addresses, as its advert says.
        certificate: by which its ``TANDEM_HOME`` is known, in PEM; None of one that is not paired.
    """

    name: str
    id: str
    home: str
    address: str
    info: NodeInfo | None
    problem: str
    own: bool = False
    label: str = ""
    by_hand: str = ""
    since: int = 0
    pairing_port: int = 0
    join: str = ""
    hosts: tuple[str, ...] = ()
    certificate: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Found:
    """Who is there.

    Attributes:
        nodes: by name; those with a problem, too.
        seconds: how long it was looked.
        trouble: why Bonjour found nothing, or "".
    """

    nodes: tuple[SeenNode, ...]
    seconds: float
    trouble: str


class LeftOut(NamedTuple):
    """A node that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Whom to ask to train.

    Attributes:
        nodes: all have answered and fit; a node of this ``TANDEM_HOME`` among them if one serves, unless this machine
            is not to take part. Then only those that are named are.
        left_out: who is there, or should be, and cannot be used.
        looked_seconds: how long it was looked.
        trouble: why Bonjour found nothing, or "".
        giver: a node of this ``TANDEM_HOME``, which gives the model whether it trains or not; None where none serves.
        not_local: labels of those that ``auto`` would mean if this machine took part.
    """

    nodes: tuple[SeenNode, ...]
    left_out: tuple[LeftOut, ...]
    looked_seconds: float
    trouble: str = ""
    giver: SeenNode | None = None
    not_local: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """``--nodes``, taken apart.

    Attributes:
        auto: everyone who is there.
        local: this machine.
        names: of nodes, or their ids.
        addresses: ``host:port`` each.
    """

    auto: bool
    local: bool
    names: tuple[str, ...]
    addresses: tuple[str, ...]

    @property
    def searches(self) -> bool:
        """Whether nodes must be looked for on the network."""
        return self.auto or bool(self.names)


def parse_wanted(text: str) -> Wanted:
    """Take ``auto``, ``local``, names and addresses apart, as many as there are, between commas.

    Raises:
        UserError: nothing is named, or an address is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError("--nodes: name auto, local, nodes or host:port, with commas between them")
    at = [part for part in parts if split_address(part) is not None]
    names = [part for part in parts if part not in at and part not in {AUTO, LOCAL}]
    return Wanted(AUTO in parts, LOCAL in parts, tuple(dict.fromkeys(names)), tuple(dict.fromkeys(at)))


def mismatch(ours: Facts, theirs: NodeInfo) -> str:
    """Why a node's versions do not go with this machine's, and the command that mends it; "" when they do.

    ``mlx-lm`` must be the same, ``mlx`` the same but for its last part. What is unknown on our side is not compared.
    """
    for package, here, there, exact in (
        ("mlx-lm", ours.mlx_lm, theirs.facts.mlx_lm, True),
        ("mlx", ours.mlx, theirs.facts.mlx, False),
    ):
        if here is None or here == there:
            continue
        if there is None:
            return f"it has no {package}; on {theirs.name}: pip install '{package}=={here}'"
        if exact or here.split(".")[:2] != there.split(".")[:2]:
            return f"it has {package} {there}, here is {here}; on {theirs.name}: pip install '{package}=={here}'"
    return ""


def protocol_problem(name: str, version: str, protocol: int | None) -> str:
    """Why a node of another protocol cannot be talked to, and what mends it; "" for our own protocol."""
    if protocol == PROTOCOL:
        return ""
    ours = installed_version("mlx-tandem") or "unknown"
    if protocol is None or protocol < PROTOCOL:
        return f"runs mlx-tandem {version}, too old for {ours} here; on {name}: pip install 'mlx-tandem=={ours}'"
    return f"runs mlx-tandem {version}, too new for {ours} here; on this machine: pip install 'mlx-tandem=={version}'"


async def select(wanted: str, *, local: bool = True, home: Path | None = None, ours: Facts | None = None) -> Selection:
    """Whom a training may ask, for ``--nodes``. A node of this ``TANDEM_HOME`` that serves is always among them, unless
    this machine is not to take part: then it has to be named.

    Busy nodes are: whether to stand in line is decided when they are asked.

    Args:
        wanted: value of ``--nodes``.
        local: whether this machine takes part.
        home: the ``TANDEM_HOME``; None takes the program's.
        ours: this machine's facts, for its versions; None looks.

    Raises:
        UserError: a name that nobody has, or several; an address where nobody answers.
    """
    parsed = parse_wanted(wanted)
    found = await look(parsed, home=home, seconds=SELECT_SECONDS, patience=PATIENCE_SECONDS, least=SELECT_LEAST_SECONDS)
    here = ours if ours is not None else await asyncio.to_thread(facts)
    nodes, left_out, not_local = [], [], []
    giver: SeenNode | None = None
    asked = named(parsed, found)
    for seen in choose(parsed, found):
        reason = unusable(seen, here)
        if reason.startswith(NOT_PAIRED) and {seen.name, seen.label, seen.id} & set(parsed.names):
            raise UserError(f"--nodes {seen.label}: {reason}")
        if not reason and seen.own:
            giver = giver or seen
        if seen.own and not local and seen not in asked:
            not_local += [seen.label] if parsed.auto and not reason else []
        elif reason:
            left_out.append(LeftOut(seen.label, reason))
        else:
            nodes.append(seen)
    return Selection(tuple(nodes), tuple(left_out), found.seconds, found.trouble, giver, tuple(not_local))


def unusable(seen: SeenNode, ours: Facts) -> str:
    """Why this node cannot train with us now, or ""; that it is busy is no reason."""
    info = seen.info
    if seen.problem or info is None:
        return seen.problem or SILENT
    if not info.takes_jobs:
        return "it only gives files"
    if info.paused:
        return "its owner has paused it; `node resume` there ends that"
    return info.waits_for or mismatch(ours, info)


def choose(wanted: Wanted, found: Found) -> tuple[SeenNode, ...]:
    """Those of the nodes that ``--nodes`` means.

    Raises:
        UserError: a name that nobody has, or several; an address where nobody answers.
    """
    own = [seen for seen in found.nodes if seen.own]
    chosen = [*(found.nodes if wanted.auto else ()), *named(wanted, found)]
    if not any(seen.own for seen in chosen):
        chosen = own[:1] + chosen
    return tuple(dict.fromkeys(chosen))


def named(wanted: Wanted, found: Found) -> list[SeenNode]:
    """Those that ``--nodes`` calls by name, id or address.

    Raises:
        UserError: as ``choose``.
    """
    called = [_named(name, found) for name in wanted.names]
    for address in wanted.addresses:
        seen = next((seen for seen in found.nodes if address in seen.by_hand.split()), None)
        if seen is None or seen.problem == SILENT:
            raise UserError(f"--nodes {address}: nobody answers there; run `node serve` there, which shows its port")
        called.append(seen)
    return called


def _named(name: str, found: Found) -> SeenNode:
    """The one node of this name, label, or id."""
    same = [seen for seen in found.nodes if seen.name == name]
    exact = [seen for seen in found.nodes if name == seen.id or (name == seen.label and name != seen.name)]
    matching = exact or same or [seen for seen in found.nodes if seen.name.casefold() == name.casefold()]
    # Anybody on the network can call himself that.
    matching = [seen for seen in matching if _is_known(seen)] or matching
    if len(matching) == 1:
        return matching[0]
    if matching:
        several = ", ".join(f"{seen.label} at {seen.address} (id {seen.id})" for seen in matching)
        raise UserError(f"--nodes {name}: {len(matching)} nodes have this name: {several}; give an id or an address")
    names = [seen.label for seen in found.nodes]
    folded = {label.casefold(): label for label in names}
    near = difflib.get_close_matches(name.casefold(), folded, 1)
    meant = f"; did you mean {folded[near[0]]}?" if near else ""
    others = f"found: {', '.join(names)}" if names else f"none was found; {found.trouble or what_to_do()}"
    raise UserError(f"--nodes {name}: no node of this name answers{meant} ({others}; looked {found.seconds:.1f} s)")


def what_to_do() -> str:
    """For who finds no node."""
    return "run `node serve` on the other Mac, or give its address: --nodes HOST:PORT"


async def look(
    wanted: Wanted,
    *,
    home: Path | None = None,
    seconds: float = LOOK_SECONDS,
    patience: float = LISTING_PATIENCE_SECONDS,
    least: float = LEAST_SECONDS,
) -> Found:
    """Look for what ``--nodes`` may mean; remember the addresses given by hand that answer.

    Args:
        wanted: what is looked for.
        home: the ``TANDEM_HOME``; None takes the program's.
        seconds: as in ``find``.
        patience: as in ``find``.
        least: as in ``find``.
    """
    home = home or tandem_home()
    known = [entry.address for entry in addresses.load(home, fleet())] if wanted.searches else []
    found = await find(
        seconds,
        patience=patience,
        least=least,
        bonjour=wanted.searches,
        by_hand=wanted.addresses,
        known=[address for address in known if address not in wanted.addresses],
        own={node.id: node.address for node in running_nodes(home)},
        home=home,
    )
    now = time.time()
    answered = [
        Remembered(address, seen.id, seen.name, fleet(), now, seen.home)
        for seen in found.nodes
        if seen.info is not None
        for address in seen.by_hand.split()
    ]
    with contextlib.suppress(OSError):  # a convenience: who cannot keep it gives the address again
        addresses.remember(home, answered)
    return found


async def find(
    seconds: float = LOOK_SECONDS,
    *,
    patience: float = 0.0,
    least: float = LEAST_SECONDS,
    bonjour: bool = True,
    by_hand: Sequence[str] = (),
    known: Sequence[str] = (),
    own: dict[str, str] | None = None,
    home: Path | None = None,
) -> Found:
    """Look for nodes, and ask each what it is. Ends early when all have answered and nothing new is heard.

    Nodes of another ``TANDEM_FLEET`` are passed over.

    Args:
        seconds: the longest time to look.
        patience: so much longer for nodes that were seen, or given by hand, and have not answered.
        least: the shortest time to look by Bonjour.
        bonjour: whether to look by Bonjour.
        by_hand: ``host:port`` that must answer: listed with a problem if they do not.
        known: ``host:port`` that may answer.
        own: ids and addresses of nodes that serve from this program's ``TANDEM_HOME``.
        home: the ``TANDEM_HOME``, whose peers are asked; None takes the program's.
    """
    home = home or tandem_home()
    search = _Search(own or {}, Peers(home), await asyncio.to_thread(credentials, home), least=least)
    try:
        if bonjour:
            search.listen()
        search.ask_all(by_hand, known)
        await search.run(seconds, patience)
    finally:
        await search.close()
    return search.found()


@dataclass
class _Advert:
    """What is known of one advertised service."""

    task: asyncio.Task[None]
    seen: SeenNode | None = None


@dataclass
class _Search:
    """One look around.

    Attributes:
        own: id to address of nodes that serve from this ``TANDEM_HOME``.
        peers: who is paired; nobody else is asked.
        ours: what we prove ourselves with.
        least: the shortest time to look by Bonjour.
        trouble: why Bonjour does not work, or "".
        answered: by id.
        silent: by address given by hand.
        adverts: by service name, as long as they are not withdrawn.
        gone: nodes whose adverts were withdrawn, and that do not answer.
    """

    own: dict[str, str]
    peers: Peers
    ours: Credentials
    least: float = LEAST_SECONDS
    trouble: str = ""
    answered: dict[str, SeenNode] = field(default_factory=dict)
    silent: dict[str, SeenNode] = field(default_factory=dict)
    adverts: dict[str, _Advert] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    _doubted: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _optional: set[asyncio.Task[None]] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _bonjour: AsyncZeroconf | None = None
    _browser: AsyncServiceBrowser | None = None
    _began: float = field(default_factory=time.monotonic)
    _heard: float = 0.0
    _ended: float = 0.0

    def ask_all(self, by_hand: Sequence[str], known: Sequence[str]) -> None:
        """Begin to ask at addresses that need no looking for."""
        for address in self.own.values():
            self._start(self._ask_own(address))
        for address in by_hand:
            self.silent[address] = SeenNode(address, "", "", address, None, SILENT, by_hand=address)
            self._start(self._ask_by_hand(address, None))
        for address in known:
            self._optional.add(self._start(self._ask_by_hand(address, REMEMBERED_SECONDS)))

    def listen(self) -> None:
        """Begin to look by Bonjour."""
        try:
            self._bonjour = open_bonjour()
        except BonjourOff as error:
            self.trouble = str(error)
            return
        # Answers to this program alone would go to whoever shares port 5353 here: macOS's own Bonjour, above all.
        self._browser = AsyncServiceBrowser(
            self._bonjour.zeroconf, SERVICE_TYPE, handlers=[self._on_change], question_type=DNSQuestionType.QM
        )

    async def run(self, seconds: float, patience: float) -> None:
        """Wait for answers, until nothing more is to be expected or the time is over."""
        while (wait := self._time_left(time.monotonic(), seconds, patience)) > 0:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait)
            except TimeoutError:
                continue
        self._ended = time.monotonic()

    async def close(self) -> None:
        """End all that still asks or listens."""
        if self._browser is not None:
            await self._browser.async_cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._bonjour is not None:
            await self._bonjour.async_close()

    def found(self) -> Found:
        """What has come of it."""
        nodes = {seen.id: seen for seen in self.answered.values()}
        for advert in self.adverts.values():
            if advert.seen is not None:
                nodes.setdefault(advert.seen.id, advert.seen)
        for identity, seen in self.answered.items():
            host = _host(seen.address)
            # Anybody can advertise its id: what its own advert says is told by where it has answered.
            for advert in self.adverts.values():
                said = advert.seen
                if said is not None and said.id == identity and host in said.hosts:
                    nodes[identity] = replace(seen, pairing_port=said.pairing_port, join=said.join, hosts=(host,))
        listed = [self._as_listed(seen) for seen in (*nodes.values(), *self.silent.values())]
        listed.sort(key=_in_order)
        return Found(_labelled(listed), self._ended - self._began, self.trouble)

    def _as_listed(self, seen: SeenNode) -> SeenNode:
        # An own node is asked at its own address, too: a farewell on the network does not count.
        problem = WENT_AWAY if seen.id in self.gone and seen.id not in self.own else seen.problem
        return replace(seen, problem=problem, own=seen.id in self.own)

    def _time_left(self, now: float, seconds: float, patience: float) -> float:
        """How long to wait for news before looking again; 0: enough."""
        waiting = self._tasks
        passed = now - self._began
        limit = seconds + (patience if waiting - self._optional else 0.0)
        if waiting:
            return limit - passed
        if self._browser is None:
            return 0.0
        if not any(advert.seen for advert in self.adverts.values()):
            return limit - passed
        return min(limit - passed, max(self.least - passed, self._heard + QUIET_SECONDS - now))

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._news.set()

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        self._heard = time.monotonic()
        self._news.set()
        before = self.adverts.get(name)
        if state_change is ServiceStateChange.Removed:
            if before is not None and before.seen is not None:
                self._says_farewell(before.seen.id)
            return
        if before is not None and before.seen is not None:
            self.gone.discard(before.seen.id)
        if before is None or (before.task.done() and not (before.seen and before.seen.id in self.answered)):
            self.adverts[name] = _Advert(self._start(self._ask_advertised(zeroconf, service_type, name)))

    def _says_farewell(self, identity: str) -> None:
        """Somebody says on the network that this node leaves; anybody can: who has answered is asked again."""
        if identity not in self.answered:
            self.gone.add(identity)
        elif identity not in self._doubted and identity not in self.own:
            self._doubted.add(identity)
            self._start(self._ask_again(self.answered[identity]))

    async def _ask_again(self, seen: SeenNode) -> None:
        await asyncio.sleep(FAREWELL_SECONDS)
        try:
            if seen.certificate is None:
                raise NodeLost(f"{seen.name} is paired no more")
            info = await _describe(seen.address, seen.certificate, AGAIN_SECONDS)
            if info.id != seen.id:
                raise NodeLost(f"{seen.address} is another node")
        except NodeError:
            self.gone.add(seen.id)
        finally:
            self._doubted.discard(seen.id)

    async def _ask_advertised(self, zeroconf: Zeroconf, service_type: str, service: str) -> None:
        try:
            info = AsyncServiceInfo(service_type, service)
        except BadTypeInNameException:
            return  # a name that no node gives itself
        if not await info.async_request(zeroconf, LOOK_SECONDS * 1000, DNSQuestionType.QM):
            return
        text = {key: value or "" for key, value in info.decoded_properties.items()}
        at = [f"{address}:{info.port}" for address in info.parsed_addresses(IPVersion.V4Only)]
        if text.get("fleet", "") != fleet() or not text.get("id") or not at:
            return
        name = text.get("name") or service.removesuffix(f".{service_type}")
        protocol = text.get("protocol", "")
        problem = protocol_problem(
            name, text.get("version", "unknown"), int(protocol) if protocol.isdecimal() else None
        )
        since = text.get("since", "")
        seen = SeenNode(
            name,
            text["id"],
            text.get("home", ""),
            at[0],
            None,
            problem or SILENT,
            since=int(since) if since.isdecimal() else 0,
            pairing_port=_port(text.get("pair", "")),
            join=text.get("join", ""),
            hosts=tuple(info.parsed_addresses(IPVersion.V4Only)),
        )
        certificate = self._certificate(seen.home)
        if certificate is None:
            # It says nothing more to strangers, so nothing else can be wrong with it.
            seen = replace(seen, problem=unpaired(name))
        # It is told by its id from whoever has one of its addresses by chance, a loopback address above all.
        self.adverts[service].seen = seen
        if problem or certificate is None or seen.id in self.answered:
            return
        try:
            address, described = await _ask_any(dict.fromkeys(at, certificate), seen.id)
        except NodeRefused as error:
            self.adverts[service].seen = replace(seen, problem=str(error))
            return
        except NodeError:
            return
        self._note(address, described)

    def _certificate(self, home: str) -> bytes | None:
        """Of our own home, or a paired one."""
        return certificate_of(home, self.ours, self.peers)

    async def _ask_own(self, address: str) -> None:
        try:
            self._note(address, await _describe(address, self.ours.certificate, LOOK_SECONDS))
        except NodeError:
            return  # it is ending; whoever listens to Bonjour hears of it

    async def _ask_by_hand(self, given: str, timeout: float | None) -> None:
        split = split_address(given)
        assert split is not None, "only addresses are asked"
        try:
            known = await self._who_is_at(await _resolve(*split), timeout or LOOK_SECONDS + PATIENCE_SECONDS)
            if known is None and given in self.silent:
                self.silent[given] = replace(self.silent[given], problem=unpaired(given))
            address, info = await _ask_any(known or {}, "", timeout)
        except NodeRefused as error:
            if given in self.silent:
                hint = "; install the same version of mlx-tandem on both" if error.kind == "version" else ""
                problem = f"{error}{hint}"
                self.silent[given] = replace(self.silent[given], problem=problem)
            return
        except (NodeError, OSError):
            return
        self.silent.pop(given, None)
        self._note(address, info, given)

    async def _who_is_at(self, at: Sequence[str], timeout: float) -> dict[str, bytes] | None:
        """The certificates of the machines at these addresses, as far as they are known; None when only strangers are
        there.
        """
        answers = await asyncio.gather(*(certificate_at(address, timeout) for address in at), return_exceptions=True)
        found = {at: seen for at, seen in zip(at, answers, strict=True) if isinstance(seen, bytes)}
        ours, trusted = self.ours.certificate, [peer.certificate.encode() for peer in self.peers.all()]
        known = {}
        for address, seen in found.items():
            same = [mine for mine in (ours, *trusted) if fingerprint(mine) == fingerprint(seen)]
            if same:
                known[address] = same[0]
        return known if known or not found else None

    def _note(self, address: str, info: NodeInfo, by_hand: str = "") -> None:
        """Keep an answer; one node may be found in several ways."""
        before = self.answered.get(info.id)
        given = " ".join(filter(None, [before.by_hand if before else "", by_hand]))
        first = self.own.get(info.id) or (before.address if before else address)
        self.answered[info.id] = SeenNode(
            info.name,
            info.id,
            info.home,
            first,
            info,
            "",
            by_hand=given,
            since=info.since,
            certificate=self._certificate(info.home),
        )
        if info.id in self.gone:
            self.gone.discard(info.id)  # it has answered since; or just before
            self._says_farewell(info.id)


def _is_known(seen: SeenNode) -> bool:
    """Whether it is ours or paired: it has proven who it is, or has to before it is talked to."""
    return seen.own or seen.certificate is not None


def _in_order(seen: SeenNode) -> tuple[str, bool, float, str]:
    """By name; of several with one name, who has served longest keeps it to itself, and every look finds the same.

    Those that we know come first: what others say of themselves nobody has proven.
    """
    return seen.name.casefold(), not _is_known(seen), seen.since or math.inf, seen.id


def _labelled(nodes: Sequence[SeenNode]) -> tuple[SeenNode, ...]:
    """Give nodes of one name numbers, but none that another node is called by."""
    names = {seen.name for seen in nodes}
    counts: dict[str, int] = {}
    labelled = []
    for seen in nodes:
        label, number = seen.name, counts.get(seen.name, 0) + 1
        while number > 1 and (label := f"{seen.name} ({number})") in names:
            number += 1
        counts[seen.name] = number
        labelled.append(replace(seen, label=label))
    return tuple(labelled)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _port(text: str) -> int:
    """A port that an advert names; 0 for none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) < 65536 else 0


async def _resolve(host: str, port: int) -> list[str]:
    """Addresses of a host, IPv4 first. The system is asked: gRPC's own resolver does not know ``.local`` names."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    texts = [f"[{entry[4][0]}]:{port}" if entry[0] == socket.AF_INET6 else f"{entry[4][0]}:{port}" for entry in ordered]
    return list(dict.fromkeys(texts))


async def _ask_any(at: Mapping[str, bytes], wanted_id: str, timeout: float | None = None) -> tuple[str, NodeInfo]:
    """The first answer of a node from any of its addresses.

    Args:
        at: ``host:port`` each, with the certificate of the machine there; all are asked at once.
        wanted_id: another node's answer does not count; "" takes anyone's.
        timeout: seconds; None takes the usual.

    Raises:
        NodeError: none answers.
    """

    async def ask(address: str) -> tuple[str, NodeInfo]:
        info = await _describe(address, at[address], timeout or LOOK_SECONDS + PATIENCE_SECONDS)
        if wanted_id not in ("", info.id):
            raise NodeLost(f"{address} is another node")
        return address, info

    asking = [asyncio.ensure_future(ask(address)) for address in at]
    error: NodeError = NodeLost("it has no address")
    try:
        for answer in asyncio.as_completed(asking):
            try:
                return await answer
            except NodeError as failed:
                error = failed if not isinstance(error, NodeRefused) else error
        raise error
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _describe(address: str, certificate: bytes, timeout: float) -> NodeInfo:
    client = (await asyncio.to_thread(_client_class))(address, certificate=certificate)
    try:
        return await client.describe(timeout)
    finally:
        await client.close()


def _client_class() -> type[NodeClient]:
    """Import gRPC, which takes a third of a second: beside the loop, so that Bonjour's question goes out meanwhile."""
    from node.client import NodeClient

    return NodeClient
