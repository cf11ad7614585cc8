"""The engine with several workers that follow scripts: steps of all, groups, losses, and what is saved then."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coordinator import engine as module
from coordinator import watch
from coordinator.checkpoint import Checkpoints
from coordinator.copies import Kept
from coordinator.crew import Crew, Member, StopRequested
from coordinator.engine import Engine, Work
from coordinator.pace import Pace, Speed
from coordinator.program import Program
from coordinator.runfolder import RunFolder
from coordinator.stream import StepFinished
from node import events, wire
from node.copies import StateCopy
from node.errors import NodeLost, TandemError
from node.files import link_or_copy
from node.info import RingPart, StoredFile
from node.spec import CopyState, Digest, Evaluate, Leave, Request, Restore, Share, TrainStep
from tests.coordinator.test_engine import COPY_EVERY, CURVE, Chunks, FakeWorker, Script, Told, as_said

READY = events.Ready("cpu", "llama", 2, 2, 10, 1, False, 0.0, 0)
NAMES = ("ada", "ben", "cleo")


@dataclass
class FakeRank(FakeWorker):
    """A worker that also knows groups; the sums are the same on all of them."""

    parts: list[RingPart] = field(default_factory=list)
    digest: str = "same"
    fails_to_join: int = 0
    generations: int = 0
    frozen: bool = False
    local: int = 0  # steps of an open round

    async def form_ring(self, part: RingPart) -> None:
        self.parts.append(part)
        self.local = 0
        if self.fails_to_join:
            self.fails_to_join -= 1
            self.answers.append(events.RingFailed(0, "nobody came"))
        else:
            self.answers.append(events.Joined(part.rank, part.size, 0.1))
        self.arrived.set()

    def cancel(self) -> None:
        super().cancel()
        self.generations += 1

    async def receive(self) -> events.Event:
        # As in a real one, the answer to a cancelled request may still come; a silent request never has one.
        while True:
            while not self.answers:
                if self.waiting and not self.frozen:
                    self._begin(self.waiting.popleft())
                else:
                    self.arrived.clear()
                    try:
                        async with asyncio.timeout(None if self.frozen else 0.01):
                            await self.arrived.wait()
                    except TimeoutError:
                        return events.Heartbeat("waiting", self.step, 1)
            answer = self.answers.popleft()
            if isinstance(answer, TandemError):
                raise answer
            if answer is not None:
                return answer
            self.frozen = True

    def _do(self, request: Request) -> list[Any]:
        if isinstance(request, Digest):
            return [events.Digested(self.step, self.digest if request.weights else "")]
        if isinstance(request, Leave):
            self.local = 0
            return []
        if isinstance(request, TrainStep) and request.share.round:
            return self._in_round(request.share)
        return super()._do(request)

    def _in_round(self, share: Share) -> list[Any]:
        """As a real one: what it holds is a round's end, and all of a round is reported then."""
        self.local += 1
        assert share.step == self.step + self.local, "a worker is never asked for a step that it is not at"
        if share.round == "open":
            return [events.LocalStepDone(share.step, 0.01, 8)]
        steps, self.local = self.local, 0
        answers: list[Any] = []
        for _ in range(steps):
            self.step += 1
            answers.append(self.done())
        return [*answers, self.copy(requested=False)]


class Shares:
    """Shares without rows, one for each member."""

    token_limit: int | None = None

    def share(self, step: int) -> Share:
        return Share(step, ())

    def shares(
        self, step: int, paces: list[Pace], limits: list[int | None], affinity: dict[int, int] | None
    ) -> list[Share]:
        assert affinity is None
        return [Share(step, ()) for _ in paces]


class Fleet:
    """A muster of fake ranks; those that are lost come again as often as ``again`` says."""

    awaited = "waiting for a machine to come back"
    network_seconds = 0.0

    def __init__(self, ranks: list[FakeRank], stop: asyncio.Event, again: int = 0) -> None:
        self.ranks = ranks
        self.stop = stop
        self.groups: list[tuple[list[str], bool]] = []
        self.again = again
        self.losses: list[tuple[str, str]] = []
        self.ready: list[Member] = []
        self.keeps: list[Kept] = []

    async def assemble(self) -> Crew:
        return Crew([self._member(name, rank) for name, rank in zip(NAMES, self.ranks, strict=False)], self.stop)

    def _member(self, name: str, rank: FakeRank) -> Member:
        return Member(f"id of {name}", name, rank, READY, Pace(Speed(0.0, 1e-3)), keeps=name == "ben")

    def attend(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def arrivals(self) -> list[Member]:
        arrived, self.ready = self.ready, []
        return arrived

    def lost(self, member: Member, error: TandemError | None, largest: int) -> None:
        self.losses.append((member.name, str(error) if error is not None else ""))
        if self.again:
            self.again -= 1
            self.come(member.name)

    def come(self, name: str) -> None:
        """A worker of this machine is ready: another one, or its first."""
        folder = self.ranks[0].folder.parent / name
        folder.mkdir(exist_ok=True)
        self.ranks.append(FakeRank(folder, self.ranks[0].script, {}))
        self.ready.append(self._member(name, self.ranks[-1]))
        self.wake()

    def sum_seconds(self, ids: Sequence[str], *, streams: bool) -> float:
        return self.network_seconds if len(ids) > 1 else 0.0

    async def kept(self) -> list[Kept]:
        return self.keeps

    async def rest(self) -> None:
        for member in self.ready:
            await member.link.close()

    def order(self, ids: tuple[str, ...]) -> list[str]:
        return sorted(ids)

    def ring(self, crew: Crew, *, streams: bool) -> list[RingPart]:
        self.groups.append(([member.name for member in crew.members], streams))
        size = len(crew)
        return [RingPart(rank, size, "ring", b"r", b"n", ("a:1",), 1, 1.0, 1.0) for rank in range(size)]


class Bench:
    """An engine with ranks."""

    def __init__(self, tmp_path: Path, script: Script = as_said, size: int = 3, again: int = 0, **program: Any) -> None:
        self.told = Told()
        self.again = again
        self.folder = RunFolder(tmp_path / "adapters")
        self.ranks = []
        for name in NAMES[:size]:
            (tmp_path / name).mkdir()
            self.ranks.append(FakeRank(tmp_path / name, script, {}))
        self.here = tmp_path / "here"
        self.here.mkdir()
        intervals = {"total_iters": 12, "save_every": 5, "steps_per_eval": 6, **program}
        self.program = Program(**{"accumulation": 1, "steps_per_report": 1, "validates": True, **intervals})

    def go(self) -> Engine:
        async def run() -> Engine:
            self.stop = asyncio.Event()
            self.fleet = Fleet(self.ranks, self.stop, self.again)
            work = Work(
                folder=self.here,
                program=self.program,
                steps=Shares(),  # type: ignore[arg-type]
                validation=Chunks(),  # type: ignore[arg-type]
                samples=(),
                decode=lambda _: "",
                early_stop=None,
                save_best=False,
                data_digest="digest",
            )
            checkpoints = Checkpoints(self.folder, None)
            self.engine = Engine(work, self.fleet, checkpoints, self.told, None, self.stop)
            try:
                await self.engine.prepare()
                async with asyncio.timeout(30):
                    await self.engine.run()
            finally:
                await self.engine.close()
            return self.engine

        engine = asyncio.run(run())
        assert all(rank.closed for rank in self.ranks)
        return engine

    @property
    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.checkpoints.glob("[0-9]*"))

    def asked(self, kind: type) -> list[int]:
        """How often each rank was asked for this."""
        return [sum(isinstance(request, kind) for request in rank.requests) for rank in self.ranks]


def on(name: str, condition: Callable[[Request], bool], answer: Any) -> Script:
    """One rank answers so, the first time that it is asked."""
    done = False

    def script(worker: FakeWorker, request: Request) -> Any:
        nonlocal done
        if not done and worker.folder.name == name and condition(request):
            done = True
            return answer
        return True

    return script


def trains(step: int) -> Callable[[Request], bool]:
    return lambda request: isinstance(request, TrainStep) and request.share.step == step


def test_a_step_is_done_when_all_have_applied_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert [found[0] for found in bench.told.validations] == [0, 6, 12]
    assert bench.asked(TrainStep) == [12, 12, 12]
    assert sum(bench.asked(Evaluate)) == 6, "each chunk once, whoever computes it"
    assert bench.asked(CopyState) == [0, 3, 0], "from the coordinator's own machine"
    assert bench.saved == [5, 10, 12]
    assert engine.final_digest == "same"
    assert engine.tally.steps == 12
    metrics = [event.metrics for event in bench.told.events if isinstance(event, StepFinished)]
    assert {entry["nodes"] for entry in metrics} == {3}
    assert set(metrics[0]["per_node"]) == set(NAMES)


def test_states_are_compared_at_a_groups_first_step_and_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY", 5)
    bench = Bench(tmp_path)
    bench.go()
    for rank in bench.ranks:
        checked = [r.share.step for r in rank.requests if isinstance(r, TrainStep) and r.share.check]
        assert checked == [1, 5, 10, 12], "and before the end"


def test_nothing_that_rounding_kept_back_is_missing_in_a_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.go()
    for rank in bench.ranks:
        settled = [r.share.step for r in rank.requests if isinstance(r, TrainStep) and r.share.settle]
        assert settled == [5, 10, 12] == bench.saved


ROUNDS = {"local_steps": 4}
LONG = {"total_iters": 100, "save_every": 100, "steps_per_eval": 100, "local_steps": 50}
ROUND_ENDS = (0, 4, 5, 6, 8, 10, 12)


def test_rounds_of_local_steps_end_where_all_must_have_one_state(tmp_path: Path) -> None:
    bench = Bench(tmp_path, total_iters=24, save_every=10, steps_per_eval=14, **ROUNDS)
    bench.go()
    for rank in bench.ranks:
        shares = [request.share for request in rank.requests if isinstance(request, TrainStep)]
        assert [share.step for share in shares] == list(range(1, 25))
        closing = [share.step for share in shares if share.round == "close"]
        assert closing == [4, 8, 10, 12, 14, 16, 20, 24]
        assert {share.round for share in shares} == {"open", "close"}
        assert [share.step for share in shares if share.check] == [4, 24]
        assert [share.step for share in shares if share.settle] == [10, 20, 24] == bench.saved
    assert [step for step, _ in bench.told.steps] == list(range(1, 25))


def test_in_a_round_requests_run_a_few_steps_ahead_of_the_slowest(tmp_path: Path) -> None:
    ahead: list[int] = []
    done = dict.fromkeys(NAMES, 0)

    def script(worker: FakeWorker, request: Request) -> bool:
        if isinstance(request, TrainStep):
            done[worker.folder.name] = request.share.step - 1  # it begins with it now
            asked = max(r.share.step for r in worker.requests if isinstance(r, TrainStep))
            ahead.append(asked - min(done.values()))
        return True

    bench = Bench(tmp_path, script, total_iters=60, save_every=60, validates=False, local_steps=30)
    bench.go()
    # One more than without rounds: that a step is done is heard of after the next has begun.
    assert module.STEPS_AHEAD <= max(ahead) <= module.STEPS_AHEAD + 1


def test_a_single_machine_has_no_rounds(tmp_path: Path) -> None:
    bench = Bench(tmp_path, size=1, **ROUNDS)
    bench.go()
    assert {r.share.round for r in bench.ranks[0].requests if isinstance(r, TrainStep)} == {""}
    assert bench.told.steps == CURVE


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("name", ["ada", "ben"])
def test_a_round_with_a_loss_is_done_again(name: str, step: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path, on(name, trains(step), NodeLost(f"{name} is gone")), **ROUNDS)
    engine = bench.go()
    assert bench.told.steps == CURVE, "every step stands once"
    assert [found[0] for found in bench.told.validations] == [0, 6, 12]
    assert engine.saved_step == 12
    assert engine.replayed_steps == 0, "what stands in the metrics is a whole round"
    (note,) = bench.told.notes("restarted")
    # Sums of these ranks wait for nobody: the others may have gone further.
    base = int(note.message.partition("went on from step ")[2].split()[0])
    assert base in [end for end in ROUND_ENDS if end >= max(other for other in ROUND_ENDS if other < step)]


@pytest.mark.parametrize("comes", [False, True], ids=["leaves", "comes"])
def test_a_long_round_is_closed_for_who_comes_or_leaves(comes: bool, tmp_path: Path) -> None:
    bench: Bench

    def script(worker: FakeWorker, request: Request) -> Any:
        if worker is bench.ranks[1] and trains(3)(request):
            if comes:
                bench.fleet.come("cleo")
            else:
                worker.answers.append(events.Leaving())
        return True

    bench = Bench(tmp_path, script, size=2 if comes else 3, **LONG)
    bench.go()
    assert [step for step, _ in bench.told.steps] == list(range(1, 101))
    shares = [request.share for request in bench.ranks[0].requests if isinstance(request, TrainStep)]
    closing = [share.step for share in shares if share.round == "close"]
    assert 3 < closing[0] <= 3 + module.STEPS_AHEAD + 2, "not at the round's end, fifty steps on"
    assert closing[1:] == [50, 100]
    asked = [request.share.step for request in bench.ranks[1].requests if isinstance(request, TrainStep)]
    assert asked[-1] == (100 if comes else closing[0])
    (_,) = [note for note in bench.told.notes("generation") if ("joins" if comes else "has left") in note.message]
    assert len(bench.fleet.groups[-1][0]) == (3 if comes else 2)


def test_a_checkpoint_that_was_missed_waits_for_the_rounds_end(tmp_path: Path) -> None:
    """The only machine is lost with its copy unwritten; of the several after it nobody has a state within a round."""
    bench: Bench

    def script(worker: FakeWorker, request: Request) -> Any:
        first = worker is bench.ranks[0]
        if first and isinstance(request, CopyState):
            return events.Heartbeat("busy", worker.step, 1)
        if first and trains(8)(request):
            bench.fleet.come("ben")
            return NodeLost("ada is gone")
        return True

    bench = Bench(tmp_path, script, size=1, again=1, save_every=5, steps_per_eval=100, local_steps=16)
    bench.go()
    assert [step for step, _ in bench.told.steps] == list(range(1, 13))
    assert bench.saved == [10, 12]


def test_a_state_of_another_step_than_was_asked_for_is_as_good_as_none(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Any:
        if isinstance(request, CopyState) and request.step == 5:
            worker.step -= 1
            worker.answers.append(worker.copy(requested=True))
            worker.step += 1
            return events.Heartbeat("copied", worker.step, 1)
        return True

    bench = Bench(tmp_path, script)
    bench.go()
    assert bench.told.steps == CURVE
    assert bench.saved == [10, 12]


def test_in_rounds_states_are_compared_at_ends_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_EVERY", 30)
    bench = Bench(tmp_path, **{**LONG, "local_steps": 8})
    bench.go()
    for rank in bench.ranks:
        checked = [r.share.step for r in rank.requests if isinstance(r, TrainStep) and r.share.check]
        assert checked == [8, 32, 64, 96, 100]


def test_only_sums_of_rounds_tell_how_long_the_network_takes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, **{**LONG, "local_steps": 4})
    seen: list[float] = []

    def script(worker: FakeWorker, request: Request) -> Any:
        seen.append(bench.engine._sum_seconds)
        return True

    def done(rank: FakeRank) -> Callable[..., events.StepDone]:
        plain = rank.done
        return lambda: dataclasses.replace(plain(), wait_seconds=1.0 if rank.step % 4 == 0 else 0.0)

    for rank in bench.ranks:
        rank.script = script
        rank.done = done(rank)  # type: ignore[method-assign]
    bench.go()
    assert set(seen) == {module.SUM_SECONDS, 1.0}, "steps in between do not make it forget"
    # One rank's part of the time is the network's in each round, however it is spread over its steps.
    (warning,) = bench.told.notes("slow_network")
    assert "the network takes 71 % of a step" in warning.message


def test_a_group_that_does_not_form_is_formed_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.ranks[2].fails_to_join = 2
    bench.go()
    assert len(bench.fleet.groups) == 3
    assert bench.told.steps == CURVE


def test_groups_that_never_form_are_tried_over_streams_and_end_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.ranks[1].fails_to_join = 99
    with pytest.raises(TandemError, match="do not come together as a group: ben: nobody came"):
        bench.go()
    assert [streams for _, streams in bench.fleet.groups] == [False] * 3 + [True] * 3
    assert bench.told.steps == []


@pytest.mark.parametrize("step", [1, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("name", NAMES)
def test_the_others_go_on_without_a_lost_node(name: str, step: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path, on(name, trains(step), NodeLost(f"{name} is gone")))
    engine = bench.go()
    assert bench.told.steps == CURVE, "every step stands once"
    assert [found[0] for found in bench.told.validations] == [0, 6, 12]
    assert engine.saved_step == 12
    assert 12 in bench.saved
    assert engine.replayed_steps == 0
    (note,) = bench.told.notes("restarted")
    others = ", ".join(other for other in NAMES if other != name)
    assert note.message.startswith(f"{name} is gone; went on from step ")
    assert f" on {others}, " in note.message
    assert note.details["lost"] == [f"id of {name}"]
    assert len(engine.faults) == 1
    assert bench.fleet.losses == [(name, f"{name} is gone")]


def test_the_last_of_them_trains_alone(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Any:
        name = worker.folder.name
        return NodeLost(f"{name} is gone") if name != "ada" and trains(4)(request) else True

    bench = Bench(tmp_path, script)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert engine.replayed_steps == 0
    assert bench.asked(Leave)[0] == 1, "it leaves the group that it was in"
    metrics = [event.metrics for event in bench.told.events if isinstance(event, StepFinished)]
    names = [sorted(entry["per_node"]) for entry in metrics]
    assert names[:3] == [sorted(NAMES)] * 3, "also of a step that not all could report"
    assert names[4:] == [["ada"]] * 8
    assert set(engine.tally.rows) == set(NAMES), "who is lost before all have done a step keeps its name"


@pytest.mark.parametrize("step", [1, 2, 7, 9])
def test_when_all_are_lost_the_last_copy_is_taken_up(step: int, tmp_path: Path) -> None:
    lost: set[str] = set()

    def script(worker: FakeWorker, request: Request) -> Any:
        if trains(step)(request) and worker.folder.name not in lost:
            lost.add(worker.folder.name)
            return NodeLost(f"{worker.folder.name} is gone")
        return True

    bench = Bench(tmp_path, script, again=3)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert engine.replayed_steps <= COPY_EVERY
    assert engine.saved_step == 12


@pytest.mark.parametrize("most", [6, 7, 8], ids=["known", "unknown to the coordinator", "of another sitting"])
def test_when_all_are_lost_a_machine_that_still_holds_more_is_asked(most: int, tmp_path: Path) -> None:
    lost: set[str] = set()
    bench = Bench(tmp_path, again=3, validates=False, save_every=12)
    worker = FakeRank(tmp_path / "ada", as_said, {}, step=most)

    async def fetch(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for ref in (copied.weights, copied.optimizer):
            link_or_copy(tmp_path / "ada" / ref.name, folder / ref.name)

    def script(rank: FakeWorker, request: Request) -> Any:
        name = rank.folder.name
        if trains(7)(request) and name not in lost:
            lost.add(name)
            if len(lost) == 3:
                bench.fleet.keeps = [Kept("id of ada", "ada", kept, fetch)]
            return NodeLost(f"{name} is gone")
        return True

    copied = worker.copy(requested=False)
    files = [StoredFile(ref.name, ref.sha256, ref.size) for ref in (copied.weights, copied.optimizer)]
    told = []
    for step in range(1, most + 1):
        worker.step = step
        told.append(wire.encode_event(worker.done(), 1))
    kept = StateCopy(most, files[0], files[1], 0.0, tuple(told) if most < 8 else ())
    for rank in bench.ranks:
        rank.script = script
    engine = bench.go()
    assert bench.told.steps == CURVE, "every step stands once, also the one that only ada knew of"
    restored = {request.step for rank in bench.ranks for request in rank.requests if isinstance(request, Restore)}
    assert restored == ({most} if most < 8 else {COPY_EVERY})
    assert engine.replayed_steps == (0 if most < 8 else 6 - COPY_EVERY)


def test_who_comes_later_is_taken_in_with_the_state_of_the_others(tmp_path: Path) -> None:
    lost = False

    def script(worker: FakeWorker, request: Request) -> Any:
        nonlocal lost
        if worker.folder.name == "cleo" and trains(3)(request) and not lost:
            lost = True
            return NodeLost("cleo is gone")
        return True

    bench = Bench(tmp_path, script, again=1, total_iters=40)
    bench.go()
    assert [step for step, _ in bench.told.steps] == list(range(1, 41))
    newcomer = bench.ranks[-1]
    assert newcomer.folder.name == "cleo"
    restored = [request.step for request in newcomer.requests if isinstance(request, Restore)]
    assert len(restored) == 1
    assert restored[0] >= 2
    metrics = [event.metrics["nodes"] for event in bench.told.events if isinstance(event, StepFinished)]
    assert metrics[-1] == 3
    assert bench.engine.replayed_steps == 0


def test_two_sums_that_fail_without_a_loss_lead_to_streams(tmp_path: Path) -> None:
    failed: set[tuple[str, int]] = set()

    def script(worker: FakeWorker, request: Request) -> Any:
        for step in (4, 8):
            if trains(step)(request) and (worker.folder.name, step) not in failed:
                failed.add((worker.folder.name, step))
                worker.waiting.clear()  # as a worker passes over what follows
                return events.RingFailed(step, "no sum within 12 s")
        return True

    bench = Bench(tmp_path, script)
    bench.go()
    assert bench.told.steps == CURVE
    assert [streams for _, streams in bench.fleet.groups] == [False, False, True]
    assert not bench.fleet.losses


def test_a_frozen_node_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(watch, "MORE_SECONDS", 0.3)

    def script(worker: FakeWorker, request: Request) -> Any:
        frozen = worker.folder.name == "ben" and trains(4)(request)
        return None if frozen else True

    bench = Bench(tmp_path, script)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert engine.replayed_steps == 0
    assert [name for name, _ in bench.fleet.losses] == ["ben"]
    assert "silent" in bench.fleet.losses[0][1]


def test_a_sum_over_a_slow_network_has_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "network_seconds", 100.0)
    limits: dict[int, float] = {}
    plain = watch.Watch.step

    def step(self: watch.Watch, step: int, shares: Sequence[float], sum_limit: float, now: float) -> None:
        limits[step] = sum_limit
        plain(self, step, shares, sum_limit, now)

    monkeypatch.setattr(watch.Watch, "step", step)
    bench = Bench(tmp_path)
    bench.go()
    waits = {r.share.step: r.share.wait_seconds for r in bench.ranks[0].requests if isinstance(r, TrainStep)}
    assert all(300 < limits[number] < 400 for number in range(2, 12))
    assert all(limits[number] > 300 + 1800 for number in (1, 12)), "a whole state may go with the sum"
    assert all(waits[number] > module.LONGEST_WAIT_SECONDS + limits[number] for number in waits)


def test_one_that_makes_no_progress_is_asked_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(watch, "MORE_SECONDS", 0.3)

    def script(worker: FakeWorker, request: Request) -> Any:
        late = isinstance(request, TrainStep) and request.share.step >= 4
        if worker.folder.name == "ben" and (late or (worker.step == 3 and isinstance(request, Digest))):
            return events.ComputeStarted(4)  # and nothing more comes than signs of life
        return True

    bench = Bench(tmp_path, script)
    bench.go()
    assert bench.told.steps == CURVE
    assert [name for name, _ in bench.fleet.losses] == ["ben"]
    assert "did not answer" in bench.fleet.losses[0][1]


def test_a_node_that_leaves_is_let_go_between_two_steps(tmp_path: Path) -> None:
    left = False

    def script(worker: FakeWorker, request: Request) -> Any:
        nonlocal left
        if worker.folder.name == "cleo" and trains(4)(request) and not left:
            left = True
            worker.answers.append(events.Leaving())
        return True

    bench = Bench(tmp_path, script)
    engine = bench.go()
    assert bench.told.steps == CURVE
    assert engine.replayed_steps == 0
    assert not engine.faults
    assert bench.fleet.losses == [("cleo", "")]
    assert any("cleo has left" in note.message for note in bench.told.notes("generation"))


def test_what_was_validated_before_a_loss_is_not_validated_again(tmp_path: Path) -> None:
    chunks = [0]

    def script(worker: FakeWorker, request: Request) -> Any:
        if isinstance(request, Evaluate) and worker.step == 6:
            chunks[0] += 1
            if worker.folder.name == "ada":
                return NodeLost("ada is gone")
        return True

    bench = Bench(tmp_path, script)
    bench.go()
    assert [found[0] for found in bench.told.validations] == [0, 6, 12]
    assert bench.told.steps == CURVE


def test_a_rank_that_was_put_right_is_told(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Any:
        if trains(1)(request) and worker.folder.name != "ada":
            difference = 1e-7 if worker.folder.name == "ben" else 0.5
            worker.answers.append(events.Synchronised(1, difference))
        return True

    bench = Bench(tmp_path, script)
    bench.go()
    assert sorted((note.details["node"], note.level) for note in bench.told.notes("synchronised")) == [
        ("ben", "info"),
        ("cleo", "warning"),
    ]


def test_a_rank_that_differs_again_is_left_out(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Any:
        if worker.folder.name == "cleo" and (trains(2)(request) or trains(4)(request)):
            worker.answers.append(events.Synchronised(worker.step + 1, 0.5))
        return True

    bench = Bench(tmp_path, script)
    bench.go()
    assert bench.told.steps == CURVE
    assert bench.fleet.losses == [("cleo", "its weights differed from the others' again; it is left out")]


def test_different_weights_at_the_end_are_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.ranks[0].digest = "other"
    bench.go()
    (note,) = bench.told.notes("different")
    assert note.message == "ada ended with weights that differ from ben's"


def test_sums_that_differ_end_the_run(tmp_path: Path) -> None:
    def script(worker: FakeWorker, request: Request) -> Any:
        if trains(3)(request) and worker.folder.name == "cleo":
            worker.step = 3
            return worker.done(loss=1.0)
        return True

    with pytest.raises(TandemError, match="the nodes disagree about step 3"):
        Bench(tmp_path, script).go()


@pytest.mark.parametrize("step", [1, 5, 6, 9, 12])
def test_ctrl_c_saves_the_newest_state(step: int, tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def script(worker: FakeWorker, request: Request) -> bool:
        if trains(step)(request) and worker.folder.name == "ben":
            bench.stop.set()
        return True

    for rank in bench.ranks:
        rank.script = script
    with pytest.raises(StopRequested):
        bench.go()
    engine = bench.engine
    assert engine.saved_step == engine.progress.step == max(rank.step for rank in bench.ranks)
    assert bench.told.steps == CURVE[: engine.saved_step]


def test_a_holder_that_cannot_copy_is_not_the_last_resort(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def script(worker: FakeWorker, request: Request) -> Any:
        if trains(4)(request) and worker.folder.name == "ada":
            bench.stop.set()
        if isinstance(request, CopyState) and worker.folder.name == "ada":
            return events.CopyFailed(worker.step, requested=True, reason="the disk is full")
        return True

    for rank in bench.ranks:
        rank.script = script
    with pytest.raises(StopRequested):
        bench.go()
    assert bench.engine.saved_step >= 3
