"""Drive the workers through the program, and go on when some are lost, come or leave.

Requests are sent a few steps ahead, so that no worker waits for the coordinator. A validation is a barrier: nothing is
sent past it before its result is known, so that early stopping and the best checkpoint are exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coordinator import generations
from coordinator.checkpoint import Checkpoint, Checkpoints, Progress
from coordinator.copies import Copies, Copy, Kept, worth_fetching
from coordinator.crew import Crew, Member, MemberFailed, StopRequested, Woken
from coordinator.ledger import Applied, Fault, Ledger, Tally, metrics_of
from coordinator.pace import Pace
from coordinator.planner import StepSplit, network_waits, says_slow_network
from coordinator.pressure import in_words, slowed
from coordinator.program import Action, Program
from coordinator.prompts import SamplePrompt
from coordinator.regroup import Excluded, Muster, Regroup, Trouble
from coordinator.row_homes import Homes
from coordinator.shares import Evaluation, StepSource
from coordinator.stream import Advanced, Noted, Reader, Sampled, StepFinished, Validated
from coordinator.summing import sum_losses
from coordinator.takeup import told_by
from coordinator.watch import Watch, patience, state_patience
from node import events
from node.errors import OutOfMemory, TandemError, UserError, WorkerLost
from node.listener import SLOWEST_COPY_BYTES_PER_SECOND, STATE_BYTES_PER_PARAMETER
from node.spec import CopyState, Digest, Evaluate, Generate, Request, RoundPart, Share, TrainStep

STEPS_AHEAD = 4
# So many losses without a new step in between end the run: something is wrong that starting again does not mend.
DEATHS_WITHOUT_PROGRESS = 5
# Steps between two comparisons of the ranks' states; the first of a group and the last of all are always among them.
CHECK_EVERY = 50
# Who differs so often is left out.
MOST_DIFFERENCES = 2
# How long the others may take to say where they are when Ctrl-C stops them.
RESCUE_SECONDS = 60.0
SILENT_SECONDS = 1.8
"""Who is late and has said nothing for so long is frozen or cut off: it is not asked."""
# More than what is predicted: for a group's first steps, whose shapes nobody has seen; for evaluations and texts.
FIRST_SECONDS = 20.0
EVALUATION_SECONDS = 20.0
GENERATE_SECONDS = 60.0
SUM_SECONDS = 0.25
"""What a sum takes, before any was measured."""
SUM_SMOOTHING = 0.2
ALONE_SECONDS = 60.0
"""More patience with the only machine: nobody could go on in its place. Who is cut off or dead is found sooner."""
LONE_STEP_SECONDS = 20.0
"""More than predicted for its steps: to begin anew costs it the model's loading, and steps."""
UNPREDICTED_SECONDS = 600.0
"""For each micro-batch of the only machine while nobody knows its pace."""
COPY_SECONDS = 30.0
"""For a state to be written beside the training, however small it is."""
# The worker's own limit on its wait for the others: for the day when nobody tells it.
LONGEST_WAIT_SECONDS = 120.0
FORM_SECONDS = 32.0
UNPREDICTED_STEPS = 3
# Relative differences of the state that different processors may bring about.
ROUNDING = 1e-5
# Of the batch: a share that has moved by this much is worth a line; single steps are noise.
MOVED_SHARE = 0.15
SHARE_SMOOTHING = 0.1
SHARES_TOLD_SECONDS = 20.0
SLOW_NETWORK_STEPS = 20

_E = TypeVar("_E", bound=events.Event)
_T = TypeVar("_T")


class GroupBroken(Exception):
    """The ranks' sum failed or somebody is late, and nobody is known to be lost.

    Args:
        reason: for people.
        hang: whether the group itself is to blame if everybody turns out to be there.
    """

    def __init__(self, reason: str, *, hang: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hang = hang


class Regrouping(Exception):
    """Nothing is under way: those who wait are taken in now, those who leave let go."""


class Text(Protocol):
    """Turns token ids into text."""

    def __call__(self, tokens: list[int]) -> str:
        """The text of these tokens."""


@dataclass(frozen=True)
class Work:
    """What the engine is to do.

    Attributes:
        folder: where the workers of this machine put their copies, and fetched ones are put.
        program: the order of things.
        steps: the rows of each step.
        validation: the rows of each validation, or None.
        samples: prompts to continue at each validation.
        decode: for their answers.
        early_stop: validations without a better one before stopping; None never.
        save_best: whether each best validation makes a checkpoint.
        data_digest: of the training data.
        reuse_prefix: whether machines keep what the frozen layers make of a row.
    """

    folder: Path
    program: Program
    steps: StepSource
    validation: Evaluation | None
    samples: tuple[SamplePrompt, ...]
    decode: Text
    early_stop: int | None
    save_best: bool
    data_digest: str
    reuse_prefix: bool = False


@dataclass
class _WentOn:
    """A new generation whose beginning has not been told yet.

    Attributes:
        trouble: what it comes from.
        base: the step that it began from.
        replayed: steps that were computed again so far.
    """

    trouble: Trouble
    base: int
    replayed: int = 0


class Engine:
    """One run of a program.

    Args:
        work: what to do.
        muster: brings the workers.
        checkpoints: where states are kept.
        reader: takes what happens.
        resumed: the checkpoint to go on from, or None.
        stop: set by Ctrl-C.
    """

    def __init__(
        self,
        work: Work,
        muster: Muster,
        checkpoints: Checkpoints,
        reader: Reader,
        resumed: Checkpoint | None,
        stop: asyncio.Event,
    ) -> None:
        self._work = work
        self._muster = muster
        self._checkpoints = checkpoints
        self._reader = reader
        self._stop = stop
        self._assembled: Crew | None = None
        self._regroup: Regroup | None = None
        self._copies = Copies(work.folder, resumed)
        self._fetching: asyncio.Task[None] | None = None
        self._ledger = Ledger(1)
        self._watch = Watch(1)
        self._rows: dict[int, dict[str, int]] = {}
        self._homes = Homes()
        self._largest: dict[str, int] = {}
        self._local: dict[int, int] = {}  # in an open round, by member: the last step that it has done
        self._parts: dict[int, RoundPart] = {}  # by step that several were asked for
        self._summed: int | None = None  # the last step that a sum of this group was asked for
        self._round_seconds: dict[str, float] = {}  # of computing, by machine
        self._predicted = 0.0
        self._sum_seconds = SUM_SECONDS
        self._network_seconds = 0.0  # of a sum of the present group, by its links
        self._applied = self._first = resumed.progress.step if resumed else 0
        self._asked = self._applied
        self._went_on: _WentOn | None = None
        self._differences: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._regrouped = False
        self._save_lost = False
        self._fetch_failed = False
        self._measured: dict[int, events.EvalDone] = {}
        self._measuring: tuple[int, str] = (0, "")
        self._chunk_limit: int | None = None
        self._shares: list[float] = []
        self._told_shares: list[float] = []
        self._shares_told_at = 0.0
        self._splits: deque[StepSplit] = deque(maxlen=SLOW_NETWORK_STEPS)
        self._slow_network_told = False
        self._group_began = 0
        self._saving: asyncio.Task[None] | None = None
        self._pending: deque[Action] = deque()
        self._in_flight: list[Action] = []
        self._deaths = 0
        self._chunk = 0
        self._began = time.monotonic()
        self.progress = resumed.progress if resumed else Progress(0, 0, data_digest=work.data_digest)
        self.saved_step = self.progress.step
        self.replayed_steps = 0
        self.faults: list[Fault] = []
        self.stopped_early = False
        self.final_digest = ""
        self.tally = Tally()
        self._seconds_before = self.progress.seconds
        self._pending.extend(work.program.actions(self.progress.step, self.progress.validated_step))

    async def prepare(self) -> list[Member]:
        """Have the workers load the model; another one where a single one dies of that.

        Raises:
            TandemError: they could not.
        """
        while True:
            try:
                self._assembled = await self._muster.assemble()
            except WorkerLost as error:
                self._die(error)
                self._note("worker_lost", f"{error}; starting another", "warning", step=self.progress.step)
            else:
                return self._assembled.members

    def _die(self, error: TandemError, workers: int = 1) -> None:
        """Count a loss; too many in a row are not mended by going on."""
        self._deaths += 1
        if self._deaths >= DEATHS_WITHOUT_PROGRESS * workers:
            step = self.progress.step + 1
            raise TandemError(
                f"{error}; it died {self._deaths} times at step {step}, perhaps for want of memory:"
                " close other programs or take a smaller --batch-size"
            ) from error

    async def run(self) -> None:
        """Do everything that is left to do.

        Raises:
            StopRequested: Ctrl-C; the state is saved.
            TandemError: the run cannot go on.
        """
        self._began = time.monotonic()
        crew, step = self._crew, self.progress.step
        self._regroup = Regroup(crew, self._muster, self._copies, step, step, self._note, self._recover)
        self._muster.attend(crew.wake)
        await self._survive(self._follow)

    async def evaluate_at(self, checkpoint: Checkpoint | None, evaluation: Evaluation, task: str) -> tuple[float, int]:
        """Evaluate after ``run``, with the weights of a checkpoint or, if None, the last ones.

        Raises:
            StopRequested, TandemError: as ``run``.
        """

        async def measure() -> tuple[float, int]:
            if checkpoint is not None:
                step, ref = checkpoint.progress.step, checkpoint
                copy = Copy(step, ref.folder, ref.weights, ref.optimizer)
                for index in range(len(self._crew)):
                    request = await self._copies.give(self._crew, index, copy)
                    limit = UNPREDICTED_SECONDS + _moving_seconds(self._crew)
                    self._watch.asked(index, events.Restored.__name__, limit, time.monotonic())
                    await self._crew.send(index, request)
                await self._hear_all(events.Restored)
            return await self.evaluate(evaluation, task)

        return await self._survive(measure)

    async def _survive(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do this with workers in the state of the last step, and again with others when some are lost."""
        regroup = self._generations
        while True:
            try:
                self._tell_limits()
                went = await self._settled()
                if went is not None:
                    self._go_on(went)
                result = await work()
                self._tell_fault()
                return result
            except StopRequested:
                await self._save_and_stop()
                raise
            except MemberFailed as failed:
                self._tell_limits()
                self._lose(failed)
            except GroupBroken as broken:
                self._tell_limits()
                regroup.broke(broken.reason, hang=broken.hang)
            except Regrouping:
                self._tell_limits()
                regroup.happened(generations.Drained(regroup.state.generation, self._applied))

    async def _settled(self) -> generations.Go | None:
        """See ``Regroup.settle``; when there is no way to go on, the newest state is saved first."""
        try:
            return await self._generations.settle(self._take, self._lose)
        except TandemError:
            if self.progress.step > self.saved_step:
                await self._save_and_stop()
            raise

    def _lose(self, failed: MemberFailed) -> None:
        """A worker is gone; whether and how to go on."""
        error, alone = failed.error, len(self._crew.ids) == 1 and failed.member.here
        # What is not the machine's fault would befall the next one, too.
        if isinstance(error, UserError):
            raise error
        if isinstance(error, OutOfMemory):
            if alone and not self._work.steps.shrink():
                raise error
            if alone and self._work.validation is not None:
                self._work.validation.limit_tokens(self._work.steps.token_limit)
            self._note("memory", f"{error}; going on with smaller micro-batches", "warning")
        else:
            self._die(error, max(len(self._crew.ids), 1))
        self._generations.lost(failed)

    def _tell_limits(self) -> None:
        """How long the phases of a new generation may take just now."""
        crew, pending = self._crew, self._predicted
        early = FIRST_SECONDS if self.progress.step - self._group_began < UNPREDICTED_STEPS else 0.0
        everyone = dict.fromkeys([*crew.ids, *self._generations.state.recruits])
        # A state goes the way of a sum, or twice that by way of this machine.
        network = 2 * state_patience(self._predicted_sum(list(everyone)))
        moving = 15.0 + 2 * _moving_seconds(crew) + network
        gather = patience(pending, early if len(crew) > 1 else ALONE_SECONDS)
        self._generations.limits(generations.Limits(gather, moving, FORM_SECONDS), dict(self._largest))

    def _predicted_sum(self, ids: Sequence[str]) -> float:
        return self._muster.sum_seconds(ids, streams=self._generations.state.streams)

    def _go_on(self, went: generations.Go) -> None:
        """A generation runs: whatever was under way is asked for again, from the step that all ranks hold."""
        self._close_ledger(went.base)
        crew = self._crew
        self._ledger, self._watch = Ledger(len(crew)), Watch(len(crew))
        self._rows.clear()
        self._local.clear()
        self._parts.clear()
        self._summed = None
        self._round_seconds.clear()
        self._splits.clear()
        self._shares, self._told_shares = [], []
        self._group_began = self._applied = went.base
        self._network_seconds = self._predicted_sum(crew.ids)
        if len(crew) == 1 and crew.members[0].name:
            self._work.steps.token_limit = crew.members[0].token_limit
        self._fit_validations()
        again = [action for action in self._pending if action.kind != "train" or action.step > self.progress.step]
        self._pending = deque(again)
        self._put_back()
        self._pending.extendleft(Action("train", step) for step in range(self.progress.step, went.base, -1))
        trouble, self._generations.trouble = self._generations.trouble, Trouble(time.monotonic())
        if self._went_on is not None:  # lost again, while steps were computed again
            self._went_on.trouble.reasons += trouble.reasons
            self._went_on.trouble.lost += trouble.lost
        else:
            self._went_on = _WentOn(trouble, went.base)
        if went.base == self.progress.step:
            self._tell_fault()

    def _fit_validations(self) -> None:
        """Chunks go to anyone: none is larger than what the smallest machine has memory for."""
        limits = [member.token_limit for member in self._crew.members if member.token_limit is not None]
        least, validation = min(limits, default=None), self._work.validation
        if validation is None or least is None or (self._chunk_limit is not None and least >= self._chunk_limit):
            return
        self._chunk_limit = least
        validation.limit_tokens(least)
        self._measured = {}

    def _tell_fault(self) -> None:
        """Say once what has happened and that it is over, when the step is reached again that was lost."""
        if self._went_on is None:
            return
        went, self._went_on = self._went_on, None
        trouble, seconds = went.trouble, time.monotonic() - went.trouble.began
        step, names = self.progress.step, [member.name for member in self._crew.members if member.name]
        if not trouble.reasons:
            if len(names) > 1:
                came = f"{', '.join(trouble.came)} joins: " if trouble.came and self._regrouped else ""
                left = f"{', '.join(trouble.left)} has left: " if trouble.left else ""
                line = f"{left}{came}{', '.join(names)} form a group ({seconds:.1f} s)"
                self._note("generation", line, step=step)
            elif trouble.left:
                self._note("generation", f"{', '.join(trouble.left)} has left: {names[0]} goes on alone", step=step)
            self._regrouped = True
            return
        self._regrouped = True
        on = f" on {', '.join(names)}" if names else ""
        line = f"{'; '.join(trouble.reasons)}; went on from step {went.base}{on}, {seconds:.1f} s lost"
        if went.replayed:
            line += f"; {went.replayed} steps computed again"
        self.faults.append(Fault(line, seconds, went.replayed))
        details = {"replayed_steps": went.replayed, "step": step, "seconds": seconds, "nodes": names}
        self._note("restarted", line, "warning" if names else "info", lost=list(trouble.lost), **details)

    async def evaluate(self, evaluation: Evaluation, task: str) -> tuple[float, int]:
        """Sum of losses and number of target tokens of a data set, added in chunk order.

        What was measured before a loss is kept for the next try.
        """
        if self._measuring != (self.progress.step, task) or any(chunk >= len(evaluation) for chunk in self._measured):
            self._measuring, self._measured = (self.progress.step, task), {}
        first = self._chunk
        self._chunk += len(evaluation)

        async def send(index: int, request: Evaluate) -> None:
            pace, rows = self._crew.members[index].pace, request.rows
            predicted = pace.predict(len(rows.ids) * rows.padded_length) if pace is not None else 0.0
            limit = patience(predicted, EVALUATION_SECONDS if pace is not None else UNPREDICTED_SECONDS)
            self._watch.asked(index, ("chunk", request.chunk), limit, time.monotonic())
            await self._crew.send(index, request)

        async def receive() -> tuple[int, events.Event]:
            index, event = await self._next()
            if isinstance(event, events.EvalDone):
                self._watch.done(index, ("chunk", event.chunk), time.monotonic())
            return index, event

        return await sum_losses(
            evaluation,
            first,
            send,
            receive,
            workers=len(self._crew),
            advance=lambda done, total: self._reader.handle(Advanced(task, done, total)),
            pass_on=self._take,
            sums=self._measured,
        )

    async def close(self) -> None:
        """Let the workers go."""
        for task in (self._saving, self._fetching):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._saving = self._fetching = None
        await self._muster.rest()
        if self._assembled is not None:
            crew, self._assembled = self._assembled, None
            await crew.close()

    # --- following the program ------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while self._pending or self._in_flight:
            while self._may_send():
                action = self._pending.popleft()
                self._in_flight.append(action)
                if action.kind == "train":
                    await self._train(action.step)
                else:
                    await self._copy(action.step)
            if self._in_flight:
                await self._take(*await self._next())
                continue
            if self._generations.draining:
                raise Regrouping
            await self._settle()
            await self._validate(self._pending[0].step)
            self._pending.popleft()
            if self.stopped_early:
                self._pending.clear()
                if self.saved_step != self.progress.step:
                    self._pending.append(Action("checkpoint", self.progress.step))
        await self._settle()
        await self._save_the_end()
        await self._compare()

    def _may_send(self) -> bool:
        return (
            bool(self._pending)
            and self._pending[0].kind != "validate"
            and self._ahead() < STEPS_AHEAD
            # Who comes or leaves waits for a round's end: in the midst of it nobody has a state for others.
            and (self._round_open or not self._generations.draining)
        )

    @property
    def _round_open(self) -> bool:
        """Whether the step that was asked for last is not the end of its round."""
        return next(reversed(self._parts.values()), "") == "open"

    def _ahead(self) -> int:
        """What was asked for and is not done; of an open round's steps, what somebody has not done."""
        done = min(self._local.values()) if len(self._local) == len(self._crew) else 0
        return sum(action.kind != "train" or action.step > done for action in self._in_flight)

    async def _save_the_end(self) -> None:
        """Save the last step once more where its checkpoint did not come from the machine that it was asked of."""
        for _ in range(len(self._crew)):
            if not self._save_lost or self.saved_step >= self.progress.step:
                return
            self._save_lost = False
            await self._copy(self.progress.step)
            await self._hear_copy(scheduled=True)
            await self._settle()

    async def _train(self, step: int) -> None:
        """Send everyone's share of a step."""
        crew, steps, now = self._crew, self._work.steps, time.monotonic()
        self._asked = max(self._asked, step)
        # Who is lost before the step is done is still to be told by name.
        self._names |= {member.id: member.name or member.called for member in crew.members}
        if len(crew) == 1:
            share = steps.share(step)
            if self._work.reuse_prefix:
                self._homes.settle(steps.row_ids(step), crew.ids[0], crew.ids)
            self._rows[step] = {crew.ids[0]: sum(len(part.ids) for part in share.micro_batches)}
            limit = self._lone_limit(share, step)
            self._watch.step(step, [limit], limit, now)
            await crew.send(0, TrainStep(share))
            return
        members = crew.members
        paces = [slowed(_pace(member), member.condition_factor) for member in members]
        row_ids = steps.row_ids(step) if self._work.reuse_prefix else None
        affinity = self._homes.wishes(row_ids, crew.ids) if row_ids is not None else None
        shares = steps.shares(step, paces, [member.token_limit for member in members], affinity)
        seconds = [pace.predict(share.positions) for pace, share in zip(paces, shares, strict=True)]
        early = FIRST_SECONDS if step - self._group_began <= UNPREDICTED_STEPS else 0.0
        more = early + _moving_seconds(crew)
        self._predicted = max(seconds)
        part = self._parts[step] = self._round_part(step)
        check = self._compares(step)
        settle = self._work.program.saves(step)
        # Who turns out to have another state is given the others' within the sum.
        moving = state_patience(self._network_seconds) if check or (part and settle) else 0.0
        sum_limit = patience(max(self._sum_seconds, self._network_seconds), more + moving)
        summed = sum_limit if part != "open" else None
        self._watch.step(step, [patience(predicted, more) for predicted in seconds], summed, now)
        self._rows[step] = {}
        for member, share in zip(members, shares, strict=True):
            if row_ids is not None:
                positions = [position for part in share.micro_batches for position in part.ids.tolist()]
                self._homes.settle(row_ids[positions], member.id, crew.ids)
            self._rows[step][member.id] = sum(len(part.ids) for part in share.micro_batches)
            sizes = [len(part.ids) * part.padded_length for part in share.micro_batches]
            self._largest[member.id] = max(sizes, default=self._largest.get(member.id, 0))
        # Their own limit comes into play only where nobody tells them that it is over. Over a round they drift apart.
        apart = self._work.program.local_steps if part else 1
        wait = LONGEST_WAIT_SECONDS + apart * patience(self._predicted, more) + sum_limit
        # What goes on from a checkpoint lacks nothing that rounding kept back, nor what ranks have for themselves.
        for index, share in enumerate(shares):
            told = dataclasses.replace(share, check=check, wait_seconds=wait, settle=settle, round=part)
            await crew.send(index, TrainStep(told))

    def _round_part(self, step: int) -> RoundPart:
        program = self._work.program
        if program.local_steps == 1:
            return ""
        # Who comes or leaves does not wait for the rest of a round.
        return "close" if program.closes_round(step) or self._generations.draining else "open"

    def _compares(self, step: int) -> bool:
        """Whether the ranks' states are compared at this step: where a group begins, at the end, and now and then."""
        if self._parts[step] == "open":
            return False
        before, self._summed = self._summed, step
        first = before is None
        return first or step == self._work.program.total_steps or step // CHECK_EVERY > (before or 0) // CHECK_EVERY

    def _lone_limit(self, share: Share, step: int) -> float:
        """How long the only machine may take for a step."""
        pace = self._crew.members[0].pace
        if pace is None or step - self._group_began <= UNPREDICTED_STEPS:
            return UNPREDICTED_SECONDS * max(1, len(share.micro_batches))
        self._predicted = pace.predict(share.positions)
        return patience(self._predicted, LONE_STEP_SECONDS + _moving_seconds(self._crew))

    async def _copy(self, step: int) -> None:
        """Have the state after a step copied, when the copy before it is saved."""
        await self._settle()
        crew = self._crew
        keeper = crew.keeper
        self._watch.copy_asked(keeper, step, COPY_SECONDS + 2 * _moving_seconds(crew), time.monotonic())
        await crew.send(keeper, CopyState(step))

    async def _take(self, index: int, event: events.Event) -> None:
        """Account for one event of a member."""
        member = self._crew.members[index]
        match event:
            case events.StepDone():
                self._watch.done(index, event.step, time.monotonic())
                self._local.pop(index, None)
                applied = self._ledger.report(member.id, event)
                if applied is not None:
                    self._finished(applied)
            case events.LocalStepDone(step, seconds, positions):
                self._watch.done(index, step, time.monotonic())
                self._local[index] = step
                member.worked(positions, seconds)  # shares follow in the midst of a round, too
            case events.RingFailed(step, reason):
                raise GroupBroken(f"{member.name}: {reason} (in step {step})", hang=True)
            case events.Leaving():
                self._generations.leaves(member)
            case events.Condition():
                line = member.is_now(event)
                if line is not None:
                    self._note("condition", line, "warning", node=member.name, now=in_words(event))
            case events.Synchronised(step, difference):
                self._synchronised(member, step, difference)
            case events.Copied(requested=False):
                self._fetch(index, event)
            case events.Copied():
                self._watch.copied(index)
                if self._arrived("checkpoint", event.step):
                    await self._save(index, event)
                else:
                    self._take_no_state()
            case events.CopyFailed():
                if event.requested:
                    self._watch.copied(index)
                    self._arrived("checkpoint", event.step)
                    self._save_lost = True
                self._cannot_save(member, event)

    def _take_no_state(self) -> None:
        """A state of another step came than was asked for: as good as none."""
        left = [action for action in self._in_flight if action.kind != "checkpoint"]
        self._save_lost |= len(left) < len(self._in_flight)
        self._in_flight = left

    def _cannot_save(self, member: Member, failed: events.CopyFailed) -> None:
        """Say so once, until it can again: copies are made every few steps."""
        if member.saves:
            member.saves = False
            who = f"{member.name}: " if member.name else ""
            message = f"{who}state of step {failed.step} not saved: {failed.reason}"
            self._note("copy_failed", message, "warning", node=member.name, step=failed.step)

    def _can_save(self, member: Member) -> None:
        if not member.saves:
            member.saves = True
            self._note("copied_again", f"{member.name or 'the worker'} can save its state again", node=member.name)

    def _synchronised(self, member: Member, step: int, difference: float) -> None:
        """A member took another state from the others; who does so again is left out."""
        message = f"{member.name} had other weights before step {step} (by {difference:.1g}); put right from the others"
        # Different processors round differently: only more than that is worth a person's attention.
        level = "info" if difference <= ROUNDING else "warning"
        self._note("synchronised", message, level, node=member.name, step=step, difference=difference)
        if difference > ROUNDING:
            self._differences[member.id] = self._differences.get(member.id, 0) + 1
            if self._differences[member.id] >= MOST_DIFFERENCES:
                raise MemberFailed(member, Excluded("its weights differed from the others' again; it is left out"))

    def _fetch(self, index: int, copied: events.Copied) -> None:
        """Have a periodic copy at hand for the day when all workers die at once."""
        member = self._crew.members[index]
        self._can_save(member)
        if member.here:
            self._copies.here(copied)
            self._generations.happened(generations.Saved(copied.step))
        elif index == self._crew.keeper and self._fetching is None and worth_fetching(copied):
            self._fetching = asyncio.create_task(self._bring_home(member, copied))

    async def _bring_home(self, member: Member, copied: events.Copied) -> None:
        try:
            await self._copies.fetch(member.link, copied)
        except TandemError:
            pass  # its machine may be lost, and its files gone: then there will be another copy
        except OSError as error:
            if not self._fetch_failed:
                self._fetch_failed = True
                line = f"the state of step {copied.step} could not be copied to this machine: {error.strerror}"
                self._note("copy_failed", f"{line}; it is tried again every few steps", "warning", step=copied.step)
        else:
            self._generations.happened(generations.Saved(copied.step))
            if self._fetch_failed:
                self._fetch_failed = False
                self._note("copied_again", "states can be copied to this machine again", step=copied.step)
        finally:
            self._fetching = None

    def _finished(self, applied: Applied, *, whole: bool = True) -> None:
        """A step is done; ``whole`` is false where only some of its ranks are left to say so."""
        done = applied.first
        self._arrived("train", done.step)
        if done.step != self._applied + 1:
            raise TandemError(f"the worker reported step {done.step} after step {self._applied}")
        self._applied = done.step
        members = {member.id: member for member in self._crew.members}
        part = self._parts.pop(done.step, "")
        for machine, report in applied.reports.items():
            if machine in members and part != "open":
                members[machine].worked(report.padded_tokens, report.compute_seconds)
        if done.step <= self.progress.step:
            # Computed again: it stands in the metrics already.
            self._rows.pop(done.step, None)
            self.replayed_steps += 1
            if self._went_on is not None:
                self._went_on.replayed += 1
            if done.step == self.progress.step:
                self._tell_fault()
            return
        loss = done.loss_sum / max(done.tokens, 1)
        # A gradient that is not finite has spoilt the weights already: no checkpoint is taken of them.
        norm = applied.grad_norm
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient norm became {norm}"
            raise TandemError(
                f"the {what} at step {done.step}: lower --learning-rate or set --max-grad-norm"
                + ("; the checkpoints before it are good" if self.saved_step else "")
            )
        program = self._work.program
        self._deaths = 0
        self.progress = dataclasses.replace(
            self.progress, step=done.step, iteration=program.last_iter(done.step), seconds=self._seconds()
        )
        self._generations.happened(generations.Applied(done.step))
        rows = {self._named(machine): count for machine, count in self._rows.pop(done.step, {}).items()}
        reports = {self._named(machine): report for machine, report in applied.reports.items()}
        self.tally.add(rows, max(report.seconds for report in reports.values()))
        metrics = {
            "step": done.step,
            "iter": self.progress.iteration,
            "loss": loss,
            "tokens": done.tokens,
            "learning_rate": done.learning_rate,
            "grad_norm": norm,
            **metrics_of(reports, rows),
        }
        self._reader.handle(StepFinished(metrics, program.reports(done.step)))
        if len(members) > 1 and whole:
            settled = part == "close" and program.saves(done.step)  # a sum of much more than a change of weights
            if part != "open" and not settled:
                self._expect_sums(min(report.wait_seconds for report in reports.values()))
            self._tell_shares([rows.get(member.name, 0) for member in members.values()])
            self._tell_slow_network(applied, whole=part != "open", settled=settled)

    def _expect_sums(self, seconds: float) -> None:
        """Learn from how long one took: at once when the network has become slow, bit by bit that it is fast again."""
        if seconds > self._sum_seconds:
            self._sum_seconds = seconds
            self._watch.sums_may_take(patience(seconds))
        else:
            self._sum_seconds += SUM_SMOOTHING * (seconds - self._sum_seconds)

    def _named(self, machine: str) -> str:
        """What people call a machine that is, or was, a rank."""
        member = self._crew.find(machine)
        return (member.name or member.called) if member is not None else self._names.get(machine, machine)

    def _tell_shares(self, rows: list[int]) -> None:
        """Say who does how much when that has changed by more than a little."""
        now = [count / max(sum(rows), 1) for count in rows]
        before = self._shares if len(self._shares) == len(now) else now
        self._shares = [a + SHARE_SMOOTHING * (b - a) for a, b in zip(before, now, strict=True)]
        self._told_shares = self._told_shares if len(self._told_shares) == len(now) else now
        moved = max(abs(a - b) for a, b in zip(self._shares, self._told_shares, strict=True))
        if moved > MOVED_SHARE and time.monotonic() - self._shares_told_at > SHARES_TOLD_SECONDS:
            self._shares_told_at = time.monotonic()
            parts = [
                f"{member.name} {100 * share:.0f} %"
                for member, share in zip(self._crew.members, self._shares, strict=True)
            ]
            self._note("shares", f"shares of the rows now: {', '.join(parts)}", step=self.progress.step)
            self._told_shares = self._shares

    def _tell_slow_network(self, applied: Applied, *, whole: bool, settled: bool) -> None:
        """Say once that the network takes too much of a step, or of a round, and what would help.

        Args:
            applied: a step.
            whole: whether it ends what is summed at once.
            settled: whether more than usual was summed.
        """
        for machine, report in applied.reports.items():
            self._round_seconds[machine] = self._round_seconds.get(machine, 0.0) + report.compute_seconds
        if not whole:
            return
        computed, self._round_seconds = self._round_seconds, {}
        if settled:
            return
        waits = [report.wait_seconds for report in applied.reports.values()]
        self._splits.append(network_waits([computed[machine] for machine in applied.reports], waits))
        if self._slow_network_told or len(self._splits) < SLOW_NETWORK_STEPS:
            return
        line = says_slow_network(list(self._splits))
        if line is not None:
            self._slow_network_told = True
            self._note("slow_network", line, "warning", step=applied.step)

    async def _save(self, index: int, copied: events.Copied, *, scheduled: bool = True) -> None:
        """Make a checkpoint of a copy; the training of several goes on meanwhile."""
        self._can_save(self._crew.members[index])
        progress = dataclasses.replace(
            self.progress,
            step=copied.step,
            iteration=self._work.program.last_iter(copied.step),
            seconds=self._seconds(),
        )
        if len(self._crew) == 1:
            await self._store(index, copied, progress, scheduled=scheduled)
            return
        await self._settle()
        self._saving = asyncio.create_task(self._store(index, copied, progress, scheduled=scheduled))

    async def _settle(self) -> None:
        """Wait until the last copy is saved."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving

    async def _store(self, index: int, copied: events.Copied, progress: Progress, *, scheduled: bool) -> None:
        member = self._crew.members[index]
        try:
            copies = self._work.folder if member.here else (await self._copies.fetch(member.link, copied)).folder
            checkpoint = await asyncio.to_thread(self._checkpoints.save, copied, copies, progress, scheduled=scheduled)
            removed = self._checkpoints.prune(self.progress.best_step)
        except (OSError, TandemError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            self._save_lost = isinstance(error, TandemError)
            self._note("checkpoint_failed", f"checkpoint of step {copied.step} not written: {why}", "warning")
            return
        self.saved_step = copied.step
        self._copies.saved(checkpoint)
        self._generations.happened(generations.Saved(copied.step))
        self._note("checkpoint", f"saved checkpoint {checkpoint.folder.name}", step=copied.step, removed=removed)

    async def _compare(self) -> None:
        """See that all members ended with the same weights."""
        crew = self._crew
        if len(crew) == 1:
            return
        digests = {index: answer.sha256 for index, answer in (await self._ask_all(Digest(), events.Digested)).items()}
        kept = digests[crew.keeper]
        different = [crew.members[index].name for index, found in digests.items() if found != kept]
        self.final_digest = "" if different else kept
        if different:
            message = f"{', '.join(different)} ended with weights that differ from {crew.members[crew.keeper].name}'s"
            self._note("different", message, "warning")

    async def _validate(self, step: int) -> None:
        # A worker that dies after the result and before the samples gives no second result.
        if self.progress.validated_step < step:
            await self._measure(step)
        for prompt in self._work.samples:
            text = self._work.decode(await self._generate(prompt))
            self._reader.handle(Sampled(step, prompt.text, text))
        best = step > 0 and self.progress.best_step == step
        follows = len(self._pending) > 1 and self._pending[1] == Action("checkpoint", step)
        if best and self._work.save_best and not follows:
            await self._copy(step)
            await self._hear_copy(scheduled=False)
            await self._settle()
        if self._work.early_stop is not None and self.progress.stale_validations >= self._work.early_stop:
            self.stopped_early = True
            count = self.progress.stale_validations
            message = f"stopped: no better validation than step {self.progress.best_step}'s in {count} tries"
            self._note("early_stop", message, step=step)

    async def _measure(self, step: int) -> None:
        assert self._work.validation is not None
        began = time.monotonic()
        loss_sum, tokens = await self.evaluate(self._work.validation, "validating")
        loss = loss_sum / max(tokens, 1)
        best = math.isfinite(loss) and (self.progress.best_loss is None or loss < self.progress.best_loss)
        self.progress = dataclasses.replace(self.progress, validated_step=step)
        # The loss before any update is a reference, not a result: it neither is the best nor uses up patience.
        if step > 0:
            self.progress = dataclasses.replace(
                self.progress,
                best_loss=loss if best else self.progress.best_loss,
                best_step=step if best else self.progress.best_step,
                stale_validations=0 if best else self.progress.stale_validations + 1,
            )
        metrics = {"step": step, "val_loss": loss, "val_tokens": tokens, "seconds": time.monotonic() - began}
        self._reader.handle(Validated(metrics, best and step > 0))

    async def _generate(self, prompt: SamplePrompt) -> list[int]:
        self._chunk += 1
        name, keeper = ("text", self._chunk), self._crew.keeper
        limit = GENERATE_SECONDS if len(self._crew) > 1 else UNPREDICTED_SECONDS
        self._watch.asked(keeper, name, limit, time.monotonic())
        await self._crew.send(keeper, Generate(self._chunk, prompt.tokens, prompt.stop, prompt.max_tokens))
        tokens: list[int] = []
        while True:
            index, event = await self._next()
            if isinstance(event, events.TokensGenerated) and event.id == self._chunk:
                tokens += event.tokens.tolist()
                self._watch.moved(index, time.monotonic())
                if event.finished:
                    self._watch.done(index, name, time.monotonic())
                    return tokens
            else:
                await self._take(index, event)

    # --- losing and going on ----------------------------------------------------------------------------------------

    def _put_back(self) -> None:
        """Ask again for what was in flight; a checkpoint whose step has passed is taken of the present step."""
        lost, self._in_flight = self._in_flight, []
        again = [action for action in lost if action.kind == "train" and action.step > self.progress.step]
        missed = [action for action in lost if action.kind == "checkpoint" and action.step <= self.progress.step]
        later = [action for action in lost if action.kind == "checkpoint" and action.step > self.progress.step]
        order = sorted(again + later, key=lambda action: (action.step, action.kind == "checkpoint"))
        if missed:
            program, rounds = self._work.program, len(self._crew) > 1
            ends = range(self.progress.step, program.total_steps + 1)
            step = next((end for end in ends if not rounds or program.closes_round(end)), program.total_steps)
            if step == self.progress.step:
                order.insert(0, Action("checkpoint", step))
            elif not program.saves(step):
                self._pending_checkpoint(order, step)
        self._pending.extendleft(reversed(order))

    def _pending_checkpoint(self, first: list[Action], step: int) -> None:
        """A checkpoint at the end of a round that is open at the present step; in the midst nobody has that state."""
        for actions in (first, self._pending):
            for place, action in enumerate(actions):
                if action == Action("train", step):
                    actions.insert(place + 1, Action("checkpoint", step))
                    return

    async def _save_and_stop(self) -> None:
        """Have the newest state that anybody holds saved, and nothing more begun."""
        self._stop = asyncio.Event()  # a second Ctrl-C is the command line's to handle
        crew, applied = self._crew, dict[str, int]()
        crew.cancel()
        ends = time.monotonic() + RESCUE_SECONDS
        if self._saving is None and len(crew) == 1:
            applied[crew.members[0].id] = self.progress.step
        else:
            for index in crew.present:
                await self._ask_quietly(index, Digest(weights=False))
        # Nobody waits for who is frozen: a worker that runs says something every second.
        while time.monotonic() < ends and any(
            crew.members[index].id not in applied and crew.silence(index) < SILENT_SECONDS for index in crew.present
        ):
            heard, event = await self._hear_quietly()
            if isinstance(event, events.Digested) and heard is not None:
                applied[crew.members[heard].id] = event.step
        self._close_ledger(max(applied.values(), default=0))
        try:
            await self._settle()
            for machine in sorted(applied, key=lambda machine: applied[machine], reverse=True):
                if machine in crew.ids and applied[machine] >= self._applied and await self._save_from(machine):
                    return
        except (TandemError, OSError) as error:
            self._note("worker_lost", f"{error}; the checkpoint of step {self.saved_step} is the last", "warning")

    def _close_ledger(self, most: int) -> None:
        """Take in the steps that only some have reported: whoever has applied a step had everybody's sum."""
        for step in self._ledger.close():
            if self._applied < step.step <= most:
                self._finished(step, whole=False)

    def _recover(self, kept: Kept) -> bool:
        """Record what a worker had applied before it was lost and could not tell; whether its state is of use."""
        step = kept.copy.step
        if step > self._asked:
            return False  # of another sitting
        try:
            told = told_by(kept.copy)
        except TandemError:
            return False
        missing = range(self.progress.step + 1, step + 1)
        if not all(number in told and _finite(told[number]) for number in missing):
            return False
        for number in missing:
            self._applied = number - 1
            self._finished(Applied(number, {kept.machine: told[number]}), whole=False)
        return True

    async def _ask_quietly(self, index: int, request: Request) -> None:
        """Ask a member that may be gone; that is noticed when it is listened to."""
        with contextlib.suppress(MemberFailed, TimeoutError):
            async with asyncio.timeout(SILENT_SECONDS):
                await self._crew.send(index, request)

    async def _hear_quietly(self) -> tuple[int | None, events.Event | None]:
        """The next event, if there is one within a second; who is lost is not missed."""
        try:
            index, event = await self._crew.next(stoppable=False, until=time.monotonic() + 1.0)
            if not isinstance(event, events.RingFailed | events.Copied | events.CopyFailed):
                await self._take(index, event)
        except (MemberFailed, TimeoutError, Woken):
            return None, None
        return index, event

    async def _save_from(self, machine: str) -> bool:
        """Save the state that this member holds, whatever becomes of the others; whether there is no more to do."""
        crew = self._crew
        if self._applied < self.progress.step:
            return True  # in the midst of computing again: what is saved is no older
        lost = ""
        await self._ask_quietly(crew.index(machine), CopyState(self.progress.step))
        ends = time.monotonic() + RESCUE_SECONDS + _moving_seconds(crew)
        while time.monotonic() < ends:
            try:
                index, event = await crew.next(stoppable=False, until=time.monotonic() + 1.0)
            except (TimeoutError, Woken):
                continue
            except MemberFailed as failed:
                if failed.member.id == machine:
                    lost = str(failed.error)
                    break
                continue
            if crew.members[index].id == machine and isinstance(event, events.Copied) and event.requested:
                if event.step > self.saved_step:
                    await self._save(index, event, scheduled=self._work.program.saves(event.step))
                    await self._settle()
                if event.step == self.progress.step:
                    return True
            elif not isinstance(event, events.RingFailed | events.Copied):
                await self._take(index, event)
                if isinstance(event, events.CopyFailed) and event.requested:
                    return False
        self._note(
            "worker_lost", f"{lost or 'no answer'}; the checkpoint of step {self.saved_step} is the last", "warning"
        )
        return False

    # --- talking to the workers -----------------------------------------------------------------------------------

    @property
    def _crew(self) -> Crew:
        assert self._assembled is not None
        return self._assembled

    @property
    def _generations(self) -> Regroup:
        assert self._regroup is not None
        return self._regroup

    async def _next(self) -> tuple[int, events.Event]:
        """The next event that is no sign of life only.

        Raises:
            As ``Crew.next``; GroupBroken: somebody is late.
        """
        crew = self._crew
        while True:
            try:
                index, event = await crew.next(until=self._watch.deadline())
            except Woken:
                self._generations.arrived()
                continue
            except TimeoutError:
                self._late()
                continue
            now = time.monotonic()
            match event:
                case events.Progress(task, done, total):
                    self._reader.handle(Advanced(task, done, total))
                case events.ReduceEntered(step):
                    self._watch.entered(index, step, now)
                case events.ComputeStarted():
                    self._watch.moved(index, now)
                case events.Heartbeat():
                    pass
                case _:
                    return index, event

    def _late(self) -> None:
        """Say what follows from the watch's deadline.

        Raises:
            MemberFailed: somebody is frozen or cut off.
            GroupBroken: somebody is late, or all wait for a sum that does not come.
        """
        crew, late = self._crew, self._watch.late(time.monotonic())
        if late is None:
            return
        if isinstance(late.duty, tuple) and late.duty[0] == "copy":
            assert late.member is not None
            line = f"it has not written the state of step {late.duty[1]} in {late.seconds:.0f} s"
            raise MemberFailed(crew.members[late.member], WorkerLost(line))
        if len(crew) == 1:
            # Nobody can be asked who has got further: it begins anew from its last copy.
            line = f"the worker is alive, but has not finished {_named_duty(late.duty)} after {late.seconds:.0f} s"
            raise MemberFailed(crew.members[0], WorkerLost(line))
        silent = max(crew.present, key=crew.silence)
        if late.member is not None:
            member = crew.members[late.member]
            if crew.silence(late.member) >= SILENT_SECONDS:
                raise MemberFailed(member, WorkerLost(f"silent for {crew.silence(late.member):.0f} s"))
            what = _named_duty(late.duty)
            # It may only have become slow: then its share shrinks, and it goes on.
            if member.pace is not None:
                member.pace = member.pace.slowed(late.seconds / max(self._predicted, 1e-9))
            raise GroupBroken(f"{member.name} has not finished {what} after {late.seconds:.1f} s", hang=False)
        if crew.silence(silent) >= SILENT_SECONDS:
            member = crew.members[silent]
            raise MemberFailed(member, WorkerLost(f"silent for {crew.silence(silent):.0f} s"))
        # If nobody is lost, it may only have become slow.
        self._expect_sums(late.seconds)
        raise GroupBroken(f"no sum of step {late.duty} after {late.seconds:.1f} s", hang=True)

    async def _hear_all(self, answer: type[_E]) -> dict[int, _E]:
        """Wait for the same answer of every member."""
        answers: dict[int, _E] = {}
        while len(answers) < len(self._crew):
            index, event = await self._next()
            if isinstance(event, answer):
                self._watch.done(index, answer.__name__, time.monotonic())
                answers[index] = event
            else:
                await self._take(index, event)
        return answers

    async def _ask_all(self, request: Request, answer: type[_E]) -> dict[int, _E]:
        """Ask every member the same, and wait for the answer of each."""
        limit = patience(0.0, EVALUATION_SECONDS + _moving_seconds(self._crew))
        for index in range(len(self._crew)):
            self._watch.asked(index, answer.__name__, limit, time.monotonic())
            await self._crew.send(index, request)
        return await self._hear_all(answer)

    async def _hear_copy(self, *, scheduled: bool) -> None:
        """Wait for the copy that was asked for, and make a checkpoint of it."""
        while True:
            index, event = await self._next()
            if isinstance(event, events.Copied) and event.requested:
                self._watch.copied(index)
                await self._save(index, event, scheduled=scheduled)
                return
            await self._take(index, event)
            if isinstance(event, events.CopyFailed) and event.requested:
                return

    def _arrived(self, kind: str, step: int) -> bool:
        """Whether this was under way; it is no more."""
        left = [action for action in self._in_flight if (action.kind, action.step) != (kind, step)]
        was = len(left) < len(self._in_flight)
        self._in_flight = left
        return was

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _note(self, kind: str, message: str, level: str = "info", **details: Any) -> None:
        self._reader.handle(Noted(kind, message, level, details))


def _moving_seconds(crew: Crew) -> float:
    """For writing the trainable state. In full fine-tuning a rank waits while it does."""
    parameters = max((member.ready.trainable_parameters for member in crew.members), default=0)
    return STATE_BYTES_PER_PARAMETER * parameters / SLOWEST_COPY_BYTES_PER_SECOND


def _named_duty(duty: Hashable) -> str:
    return f"step {duty}" if isinstance(duty, int) else "its part of an evaluation"


def _finite(done: events.StepDone) -> bool:
    return math.isfinite(done.loss_sum) and math.isfinite(done.grad_norm)


def _pace(member: Member) -> Pace:
    assert member.pace is not None, "members of a group have been probed"
    return member.pace
