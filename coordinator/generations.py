"""What becomes of the ranks when some are lost, come, or leave. Decides only: no I/O, no clock.

A generation is one set of ranks with one group. It is made in three phases: *gathering*, in which the ranks say which
step they hold; *levelling*, in which who lacks the newest state is given it; *forming*, in which they form their group.
Then it is *running*, until somebody is lost, comes or leaves. Starting, resuming and going on after a fault are all
this.

``next_state`` takes what has happened and says what is to be done. Whatever names a generation that is no more is
passed over.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

# A ring that hangs so often, with nobody lost, is not used any more in this job.
MOST_HANGS = 2
# So many failures to form in a row, with nobody lost: with a ring the streams come next, with these it is the end.
MOST_TRIES = 3
DISK = ""
"""Stands for the newest state on the coordinator's disk where a source is named."""


class Phase(enum.Enum):
    """Where a generation stands."""

    EMPTY = "empty"
    GATHERING = "gathering"
    LEVELLING = "levelling"
    FORMING = "forming"
    RUNNING = "running"
    FAILED = "failed"


@dataclass(frozen=True)
class Limits:
    """The longest that each phase may take, in seconds.

    Attributes:
        gather: for ranks to say where they are; a step that is under way comes before.
        level: for a state to be brought.
        form: for a group to form.
    """

    gather: float
    level: float
    form: float


@dataclass(frozen=True)
class Rank:
    """One rank of a generation in the making.

    Attributes:
        id: of its machine.
        step: that it holds the state of, or None where it has not said.
        joined: whether it is in the group.
        unable: whether it could not give its state.
        leaves: whether it goes with the next group: until then it may give its state.
    """

    id: str
    step: int | None = None
    joined: bool = False
    unable: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class State:
    """Everything that decisions depend on.

    Attributes:
        ranks: in their order.
        step: the last one that the run has recorded.
        saved: the newest one whose state is on the coordinator's disk.
        generation: the present one.
        phase: of it.
        base: the step that all ranks hold when it runs.
        source: who gives its state in levelling; ``DISK`` for the disk.
        deadline: of the phase.
        recruits: machines that wait to be taken in, with the model loaded and no step applied.
        hangs: groups that failed with nobody lost.
        tries: failures to form in a row.
        broken: why the group before failed while nobody was known to be lost, or "".
        streams: whether sums go over the streams from now on.
        looked: whether machines were asked, for this generation, for what they keep of lost workers.
    """

    ranks: tuple[Rank, ...] = ()
    step: int = 0
    saved: int = 0
    generation: int = 0
    phase: Phase = Phase.EMPTY
    base: int = 0
    source: str = DISK
    deadline: float = math.inf
    recruits: tuple[str, ...] = ()
    hangs: int = 0
    tries: int = 0
    broken: str = ""
    streams: bool = False
    looked: bool = False

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the ranks."""
        return tuple(rank.id for rank in self.ranks)

    def rank(self, machine: str) -> Rank | None:
        """The rank on this machine, or None."""
        return next((rank for rank in self.ranks if rank.id == machine), None)


# --- what happens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Came:
    """A machine is ready: its model is loaded, and it has applied no step."""

    id: str


@dataclass(frozen=True)
class Lost:
    """A machine is gone, or is given up."""

    id: str


@dataclass(frozen=True)
class Leaves:
    """A machine's owner wants it back; it works on until it is let go."""

    id: str


@dataclass(frozen=True)
class Broke:
    """The group failed or did not form, and nobody is known to be lost for it."""

    generation: int
    reason: str


@dataclass(frozen=True)
class Holds:
    """A rank says which step it holds the state of."""

    id: str
    generation: int
    step: int


@dataclass(frozen=True)
class Levelled:
    """A rank has been given the state of ``base``."""

    id: str
    generation: int


@dataclass(frozen=True)
class Unable:
    """The source could not give its state."""

    generation: int


@dataclass(frozen=True)
class Joined:
    """A rank is in the group."""

    id: str
    generation: int


@dataclass(frozen=True)
class Applied:
    """All ranks have applied this step, and it is recorded."""

    step: int


@dataclass(frozen=True)
class Saved:
    """The state of a step is on the coordinator's disk."""

    step: int


@dataclass(frozen=True)
class Looked:
    """Whatever machines keep of lost workers, and is newer than what the disk had, is on the disk now."""

    generation: int


@dataclass(frozen=True)
class Drained:
    """Nothing is under way: all ranks hold this step."""

    generation: int
    step: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Came | Lost | Leaves | Broke | Holds | Levelled | Unable | Joined | Applied | Saved | Looked | Drained | Tick


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Have these say which step they hold; whatever they wait for in an older generation ends."""

    generation: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """Nobody holds the newest state: see whether a machine keeps one of a worker that is no more."""

    generation: int


@dataclass(frozen=True)
class Bring:
    """Give these the state of a step that the source holds."""

    generation: int
    source: str
    ids: tuple[str, ...]
    step: int


@dataclass(frozen=True)
class Form:
    """Have these form a group, in this order."""

    generation: int
    ids: tuple[str, ...]
    streams: bool


@dataclass(frozen=True)
class Go:
    """All ranks hold ``base``: train on from there."""

    generation: int
    base: int


@dataclass(frozen=True)
class Drain:
    """Begin nothing new, and say when nothing is under way any more."""

    generation: int


@dataclass(frozen=True)
class Keep:
    """The last machine is about to leave: have its state on the disk before."""

    generation: int
    source: str


@dataclass(frozen=True)
class Dismiss:
    """Let this machine go; it may come again.

    Attributes:
        reason: for people, "" where it wanted to go.
    """

    id: str
    reason: str


@dataclass(frozen=True)
class Wait:
    """Nobody is left: wait for somebody to come."""


@dataclass(frozen=True)
class Fail:
    """Nothing more can be tried."""

    reason: str


Action = Ask | Look | Bring | Form | Go | Drain | Keep | Dismiss | Wait | Fail


def next_state(state: State, event: Event, now: float, limits: Limits) -> tuple[State, list[Action]]:
    """What follows from an event.

    Args:
        state: before it.
        event: what happened.
        now: any clock that does not jump, in seconds.
        limits: of the phases.

    Returns:
        The state after it, and what is to be done, in order.
    """
    if state.phase is Phase.FAILED:
        return state, []
    match event:
        case Came(machine):
            return _came(state, machine, now, limits)
        case Lost(machine):
            return _lost(state, machine, now, limits)
        case Leaves(machine):
            return _leaves(state, machine)
        case Applied(step):
            return dataclasses.replace(state, step=max(state.step, step), tries=0), []
        case Saved(step):
            state = dataclasses.replace(state, saved=max(state.saved, step))
            return _form(state, now, limits) if _all_leave(state) else (state, [])
        case Tick():
            return _tick(state, now, limits)
    if event.generation != state.generation:
        return state, []
    match event:
        case Broke(_, reason):
            return _broke(state, reason, now, limits)
        case Drained(_, step) if state.phase is Phase.RUNNING:
            ranks = [dataclasses.replace(rank, step=step, joined=False) for rank in state.ranks]
            return _gather(dataclasses.replace(state, step=max(state.step, step)), ranks, now, limits)
        case Holds(machine, _, step) if state.phase is Phase.GATHERING:
            return _level(_changed(state, machine, step=step), now, limits)
        case Looked() if state.phase is Phase.GATHERING:
            return _level(state, now, limits)
        case Levelled(machine) if state.phase is Phase.LEVELLING:
            return _form(_changed(state, machine, step=state.base), now, limits)
        case Unable() if state.phase is Phase.LEVELLING and state.source != DISK:
            return _level(_changed(state, state.source, unable=True), now, limits)
        case Joined(machine) if state.phase is Phase.FORMING:
            return _go(_changed(state, machine, joined=True))
    return state, []


def gather(state: State, now: float, limits: Limits) -> tuple[State, list[Action]]:
    """Begin: the first generation, of all the recruits."""
    return _gather(state, [], now, limits)


def _changed(state: State, machine: str, **values: object) -> State:
    ranks = (dataclasses.replace(r, **values) if r.id == machine else r for r in state.ranks)  # type: ignore[arg-type]
    return dataclasses.replace(state, ranks=tuple(ranks))


def _came(state: State, machine: str, now: float, limits: Limits) -> tuple[State, list[Action]]:
    if machine in state.ids or machine in state.recruits:
        return state, []
    state = dataclasses.replace(state, recruits=(*state.recruits, machine))
    match state.phase:
        case Phase.EMPTY:
            return _gather(state, [], now, limits)
        case Phase.RUNNING:
            return state, [Drain(state.generation)]
    return state, []  # taken in when this generation runs and can be ended in peace


def _lost(state: State, machine: str, now: float, limits: Limits) -> tuple[State, list[Action]]:
    if machine in state.recruits:
        return dataclasses.replace(state, recruits=tuple(r for r in state.recruits if r != machine)), []
    if machine not in state.ids:
        return state, []
    left = [rank for rank in state.ranks if rank.id != machine]
    return _gather(dataclasses.replace(state, broken=""), _asked_again(state, left), now, limits)


def _leaves(state: State, machine: str) -> tuple[State, list[Action]]:
    if machine in state.recruits:
        left = tuple(recruit for recruit in state.recruits if recruit != machine)
        return dataclasses.replace(state, recruits=left), [Dismiss(machine, "")]
    rank = state.rank(machine)
    if rank is None or rank.leaves:
        return state, []
    state = _changed(state, machine, leaves=True)
    return state, [Drain(state.generation)] if state.phase is Phase.RUNNING else []


def _broke(state: State, reason: str, now: float, limits: Limits) -> tuple[State, list[Action]]:
    if state.phase is Phase.FORMING:
        return _not_formed(state, reason, now, limits)
    if state.phase is not Phase.RUNNING:
        return state, []
    state = dataclasses.replace(state, broken=reason)
    return _gather(state, _asked_again(state, state.ranks), now, limits)


def _asked_again(state: State, ranks: Iterable[Rank]) -> list[Rank]:
    """Ranks as they enter another gathering: what they hold is known only where nothing has been trained meanwhile."""

    def known(rank: Rank) -> bool:
        # Who is being given another state may have it by now.
        level = state.phase is not Phase.LEVELLING or rank.step == state.base
        return state.phase is not Phase.RUNNING and level

    return [
        dataclasses.replace(rank, joined=False, unable=False, step=rank.step if known(rank) else None) for rank in ranks
    ]


def _not_formed(state: State, reason: str, now: float, limits: Limits) -> tuple[State, list[Action]]:
    """All are asked anew, as one that hangs and one that waits for it look alike; tried often enough, another way."""
    tries, streams = state.tries + 1, state.streams
    if tries >= MOST_TRIES:
        if streams:
            return _failed(state, reason)
        tries, streams = 0, True
    state = dataclasses.replace(state, tries=tries, streams=streams, broken="")
    again = [dataclasses.replace(rank, joined=False, unable=False, step=None) for rank in state.ranks]
    return _gather(state, again, now, limits)


def _failed(state: State, reason: str) -> tuple[State, list[Action]]:
    state = dataclasses.replace(state, phase=Phase.FAILED, deadline=math.inf)
    return state, [Fail(f"the machines do not come together as a group: {reason}")]


def _gather(state: State, ranks: list[Rank], now: float, limits: Limits) -> tuple[State, list[Action]]:
    """A new generation of these ranks, and of the recruits."""
    ranks = [*ranks, *(Rank(recruit, 0) for recruit in state.recruits)]
    if not ranks:
        state = dataclasses.replace(state, ranks=(), phase=Phase.EMPTY, deadline=math.inf, broken="")
        return dataclasses.replace(state, generation=state.generation + 1), [Wait()]
    state = dataclasses.replace(
        state,
        ranks=tuple(ranks),
        recruits=(),
        generation=state.generation + 1,
        phase=Phase.GATHERING,
        deadline=now + limits.gather,
        looked=False,
    )
    asked: list[Action] = [Ask(state.generation, tuple(rank.id for rank in ranks if rank.step is None))]
    state, actions = _level(state, now, limits)
    return state, asked + actions


def _level(state: State, now: float, limits: Limits) -> tuple[State, list[Action]]:
    """Once all have said what they hold: give the newest to who lacks it."""
    held = [rank.step for rank in state.ranks if rank.step is not None]
    if len(held) < len(state.ranks):
        return state, []
    if state.broken:
        # All of them answer, so it was the group itself.
        hangs, tries, reason = state.hangs + 1, state.tries + 1, state.broken
        if state.streams and tries >= MOST_TRIES:
            return _failed(state, reason)
        streams = state.streams or hangs >= MOST_HANGS
        state = dataclasses.replace(state, broken="", hangs=hangs, tries=tries, streams=streams)
    newest = max(held)
    if max(newest, state.saved) < state.step and not state.looked:
        return dataclasses.replace(state, looked=True), [Look(state.generation)]
    # Nobody holds what the disk has: all have died since.
    if state.saved > newest:
        source, base = DISK, state.saved
    else:
        holders = [rank for rank in state.ranks if rank.step == newest]
        able = [rank.id for rank in holders if not rank.unable]
        source, base = able[0] if able else DISK, newest
        if not able and len(holders) < len(state.ranks):
            # The state cannot be moved: who has it goes on, the others may come again.
            reason = f"no machine could give it the state of step {newest}"
            late = [rank.id for rank in state.ranks if rank.step != newest]
            state = dataclasses.replace(state, ranks=tuple(holders))
            state, actions = _form(dataclasses.replace(state, phase=Phase.LEVELLING, base=base), now, limits)
            return state, [*(Dismiss(machine, reason) for machine in late), *actions]
    lacking = tuple(rank.id for rank in state.ranks if rank.step != base and not rank.leaves)
    deadline = now + limits.level
    state = dataclasses.replace(state, phase=Phase.LEVELLING, base=base, source=source, deadline=deadline)
    if lacking:
        return state, [Bring(state.generation, source, lacking, base)]
    return _form(state, now, limits)


def _form(state: State, now: float, limits: Limits) -> tuple[State, list[Action]]:
    """Once all hold the same: form the group, without those that leave."""
    staying = [rank for rank in state.ranks if not rank.leaves]
    if any(rank.step != state.base for rank in staying):
        return state, []
    leaving = [rank for rank in state.ranks if rank.leaves]
    if not staying and state.saved < state.base:
        # The last one to leave takes the state with it, unless it is on the disk before; ``Saved`` and ``Tick`` follow.
        state = dataclasses.replace(state, deadline=now + limits.level)
        return state, [Keep(state.generation, leaving[0].id)]
    gone: list[Action] = [Dismiss(rank.id, "") for rank in leaving]
    if not staying:
        state, actions = _gather(dataclasses.replace(state, ranks=()), [], now, limits)
        return state, gone + actions
    state = dataclasses.replace(
        state,
        ranks=tuple(dataclasses.replace(rank, joined=len(staying) == 1) for rank in staying),
        phase=Phase.FORMING,
        deadline=now + limits.form,
    )
    if len(staying) > 1:
        return state, [*gone, Form(state.generation, state.ids, state.streams)]
    state, actions = _go(state)
    return state, gone + actions


def _go(state: State) -> tuple[State, list[Action]]:
    """Once all have joined: train."""
    if not all(rank.joined for rank in state.ranks):
        return state, []
    state = dataclasses.replace(state, phase=Phase.RUNNING, deadline=math.inf)
    actions: list[Action] = [Go(state.generation, state.base)]
    if state.recruits or any(rank.leaves for rank in state.ranks):
        actions.append(Drain(state.generation))
    return state, actions


def _all_leave(state: State) -> bool:
    """Whether all that is waited for is that the last machine's state is kept."""
    return state.phase is Phase.LEVELLING and all(rank.leaves for rank in state.ranks) and state.saved >= state.base


def _tick(state: State, now: float, limits: Limits) -> tuple[State, list[Action]]:
    if now < state.deadline:
        return state, []
    match state.phase:
        case Phase.GATHERING:
            silent = [rank for rank in state.ranks if rank.step is None]
            left = [rank for rank in state.ranks if rank.step is not None]
            reason = f"it did not answer within {limits.gather:.0f} s"
            # Whoever was silent broke the group: it did not hang by itself.
            state = dataclasses.replace(state, broken="")
            state, actions = _gather(state, left, now, limits)
            return state, [*(Dismiss(rank.id, reason) for rank in silent), *actions]
        case Phase.LEVELLING:
            late = [rank for rank in state.ranks if rank.step != state.base and not rank.leaves]
            left = [rank for rank in state.ranks if rank not in late]
            if not late:  # its last state could not be kept
                late, left = list(state.ranks), []
            reason = f"it did not have the state of step {state.base} within {limits.level:.0f} s"
            state, actions = _gather(state, left, now, limits)
            return state, [*(Dismiss(rank.id, reason) for rank in late), *actions]
        case Phase.FORMING:
            return _not_formed(state, f"not within {limits.form:.0f} s", now, limits)
    return state, []
