"""Generations: decided purely, so every order of what may happen can be tried."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import generations as g
from coordinator.generations import DISK, Limits, Phase, State, gather, next_state

LIMITS = Limits(gather=3.0, level=20.0, form=10.0)
NAMES = ("anna", "ben", "cleo")


class Play:
    """A run of decisions: events go in, actions come out."""

    def __init__(self, *names: str, step: int = 0, saved: int = 0) -> None:
        self.now = 0.0
        self.state, self.actions = gather(State(recruits=names, step=step, saved=saved), self.now, LIMITS)

    def do(self, *events: g.Event) -> list[g.Action]:
        """What these events lead to, one after the other."""
        actions: list[g.Action] = []
        for event in events:
            self.state, more = next_state(self.state, event, self.now, LIMITS)
            actions += more
        self.actions = actions
        return actions

    def wait(self, seconds: float) -> list[g.Action]:
        self.now += seconds
        return self.do(g.Tick())

    @property
    def generation(self) -> int:
        return self.state.generation

    def joined(self, *names: str) -> list[g.Action]:
        return self.do(*(g.Joined(name, self.generation) for name in names))

    def holds(self, **steps: int) -> list[g.Action]:
        return self.do(*(g.Holds(name, self.generation, step) for name, step in steps.items()))


def running(*names: str, step: int = 10) -> Play:
    """These train; all of them have applied this step."""
    play = Play(*names)
    play.joined(*names)
    assert play.state.phase is Phase.RUNNING
    play.do(g.Applied(step))
    return play


def test_fresh_machines_form_a_group_at_once() -> None:
    play = Play(*NAMES)
    assert play.actions == [g.Ask(1, ()), g.Form(1, NAMES, streams=False)]
    assert play.joined("anna", "ben") == []
    assert play.joined("cleo") == [g.Go(1, 0)]


def test_one_machine_needs_no_group() -> None:
    assert Play("anna").actions == [g.Ask(1, ()), g.Go(1, 0)]


def test_a_resumed_run_begins_from_the_disk() -> None:
    play = Play("anna", "ben", step=40, saved=40)
    assert play.actions == [g.Ask(1, ()), g.Bring(1, DISK, ("anna", "ben"), 40)]
    assert play.do(g.Levelled("anna", 1)) == []
    assert play.do(g.Levelled("ben", 1)) == [g.Form(1, ("anna", "ben"), streams=False)]
    assert play.joined("anna", "ben") == [g.Go(1, 40)]


def test_the_others_are_asked_and_go_on_without_the_lost_one() -> None:
    play = running(*NAMES)
    assert play.do(g.Lost("ben")) == [g.Ask(2, ("anna", "cleo"))]
    assert play.holds(anna=10, cleo=10) == [g.Form(2, ("anna", "cleo"), streams=False)]
    assert play.joined("anna", "cleo") == [g.Go(2, 10)]


def test_the_newest_state_wins_and_is_given_to_who_lacks_it() -> None:
    play = running(*NAMES)
    play.do(g.Lost("ben"))
    assert play.holds(anna=10, cleo=11) == [g.Bring(2, "cleo", ("anna",), 11)]
    assert play.do(g.Levelled("anna", 2)) == [g.Form(2, ("anna", "cleo"), streams=False)]
    assert play.joined("anna", "cleo") == [g.Go(2, 11)]


def test_a_source_that_cannot_give_is_passed_over() -> None:
    play = running(*NAMES)
    play.do(g.Broke(1, "no sum"))
    assert play.holds(anna=11, ben=10, cleo=11) == [g.Bring(2, "anna", ("ben",), 11)]
    assert play.do(g.Unable(2)) == [g.Bring(2, "cleo", ("ben",), 11)]
    actions = play.do(g.Unable(2))
    assert [type(action) for action in actions] == [g.Dismiss, g.Form], "who has it goes on, the other may come again"
    assert play.state.ids == ("anna", "cleo")


def test_who_was_being_given_a_state_is_asked_again() -> None:
    play = running(*NAMES)
    play.do(g.Broke(1, "no sum"))
    play.holds(anna=11, ben=10, cleo=10)
    assert play.do(g.Lost("anna")) == [g.Ask(3, ("ben", "cleo"))], "they may have it by now"
    assert play.holds(ben=11, cleo=10) == [g.Bring(3, "ben", ("cleo",), 11)]


def test_who_does_not_answer_is_let_go() -> None:
    play = running(*NAMES)
    play.do(g.Broke(1, "no sum"))
    play.holds(anna=10, cleo=10)
    actions = play.wait(3.5)
    assert actions[0] == g.Dismiss("ben", "it did not answer within 3 s")
    assert g.Form(3, ("anna", "cleo"), streams=False) in actions
    assert play.state.hangs == 0, "the silent one broke the group"


def test_two_hangs_lead_to_streams() -> None:
    play = running("anna", "ben")
    for hang, step in ((1, 10), (2, 12)):
        play.do(g.Applied(step), g.Broke(play.generation, "no sum"))
        (form,) = play.holds(anna=step, ben=step)
        assert isinstance(form, g.Form)
        assert form.streams is (hang == 2)
        play.joined("anna", "ben")
    play.do(g.Broke(play.generation, "no sum"))
    assert play.holds(anna=12, ben=12)[0] == g.Form(play.generation, ("anna", "ben"), streams=True), (
        "until the job ends"
    )


def test_somebody_late_is_no_hang() -> None:
    play = running("anna", "ben")
    for _ in range(5):
        play.do(g.Applied(play.state.step + 1), g.Broke(play.generation, ""))
        play.holds(anna=play.state.step, ben=play.state.step)
        play.joined("anna", "ben")
    assert play.state.hangs == 0
    assert not play.state.streams


def test_groups_that_never_form_try_the_streams_and_then_give_up() -> None:
    play = Play("anna", "ben")
    forms: list[bool] = []
    for _ in range(2 * g.MOST_TRIES):
        forms += [action.streams for action in play.actions if isinstance(action, g.Form)]
        play.do(g.Broke(play.generation, "nobody came"))
        if play.state.phase is Phase.FAILED:
            break
        play.holds(anna=0, ben=0)
    assert forms == [False] * g.MOST_TRIES + [True] * g.MOST_TRIES
    assert play.state.phase is Phase.FAILED
    assert isinstance(play.actions[-1], g.Fail)
    assert play.do(g.Came("cleo")) == []


def test_nobody_left_waits_and_goes_on_from_the_disk() -> None:
    play = running("anna", "ben", step=37)
    play.do(g.Saved(30), g.Lost("anna"))
    assert play.do(g.Lost("ben")) == [g.Wait()]
    assert play.do(g.Came("ben")) == [g.Ask(play.generation, ()), g.Look(play.generation)]
    assert play.do(g.Looked(play.generation)) == [g.Bring(play.generation, DISK, ("ben",), 30)]
    assert play.do(g.Levelled("ben", play.generation)) == [g.Go(play.generation, 30)]


def test_nobody_left_and_a_machine_that_keeps_more() -> None:
    play = running("anna", "ben", step=37)
    play.do(g.Saved(30), g.Lost("anna"), g.Lost("ben"), g.Came("ben"))
    assert play.do(g.Saved(36), g.Looked(play.generation)) == [g.Bring(play.generation, DISK, ("ben",), 36)]


def test_machines_that_come_when_all_others_are_lost_are_asked_again_each_time() -> None:
    play = running("anna", "ben", step=37)
    play.do(g.Saved(30), g.Lost("anna"), g.Lost("ben"), g.Came("ben"), g.Came("anna"))
    assert play.do(g.Lost("ben")) == [g.Ask(play.generation, ()), g.Look(play.generation)]


def test_what_is_on_the_disk_need_not_be_looked_for() -> None:
    play = running("anna", step=37)
    play.do(g.Saved(37), g.Lost("anna"))
    assert g.Bring(3, DISK, ("ben",), 37) in play.do(g.Came("ben"))


def test_a_survivor_is_better_than_the_disk() -> None:
    play = running("anna", "ben", step=37)
    play.do(g.Saved(30), g.Lost("anna"))
    assert play.holds(ben=37) == [g.Go(2, 37)]


def test_who_comes_is_taken_in_when_nothing_is_under_way() -> None:
    play = running("anna")
    assert play.do(g.Came("ben")) == [g.Drain(1)]
    assert play.do(g.Drained(1, 12)) == [g.Ask(2, ()), g.Bring(2, "anna", ("ben",), 12)]
    assert play.do(g.Levelled("ben", 2)) == [g.Form(2, ("anna", "ben"), streams=False)]
    assert play.joined("anna", "ben") == [g.Go(2, 12)]


def test_who_comes_while_a_group_forms_waits_for_the_next() -> None:
    play = Play("anna", "ben")
    assert play.do(g.Came("cleo")) == []
    assert play.joined("anna", "ben") == [g.Go(1, 0), g.Drain(1)]


def test_who_leaves_is_let_go_when_nothing_is_under_way() -> None:
    play = running(*NAMES)
    assert play.do(g.Leaves("ben")) == [g.Drain(1)]
    assert play.do(g.Leaves("ben")) == [], "said twice"
    assert play.do(g.Drained(1, 12)) == [
        g.Ask(2, ()),
        g.Dismiss("ben", ""),
        g.Form(2, ("anna", "cleo"), streams=False),
    ]


def test_the_only_holder_gives_its_state_before_it_leaves() -> None:
    play = running("anna")
    play.do(g.Came("ben"), g.Leaves("anna"))
    assert play.do(g.Drained(1, 12)) == [g.Ask(2, ()), g.Bring(2, "anna", ("ben",), 12)]
    assert play.do(g.Levelled("ben", 2)) == [g.Dismiss("anna", ""), g.Go(2, 12)]


def test_the_last_to_leave_has_its_state_kept() -> None:
    play = running("anna")
    play.do(g.Leaves("anna"))
    assert play.do(g.Drained(1, 12)) == [g.Ask(2, ()), g.Keep(2, "anna")]
    assert play.do(g.Saved(12)) == [g.Dismiss("anna", ""), g.Wait()]


@pytest.mark.parametrize(
    "late",
    [
        g.Holds("anna", 1, 3),
        g.Levelled("anna", 1),
        g.Joined("anna", 1),
        g.Broke(1, "no sum"),
        g.Drained(1, 5),
        g.Unable(1),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_is_late_is_passed_over(late: g.Event) -> None:
    play = running("anna", "ben")
    play.do(g.Broke(1, ""))
    before = play.state
    assert play.do(late) == []
    assert play.state == before


# --- any order ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Machine:
    """What a worker would do, as far as decisions can tell."""

    step: int = 0
    generation: int = 0
    alive: bool = True


class World:
    """Machines, messages under way, and what must never be: a model of the engine around the decisions."""

    def __init__(self) -> None:
        self.machines = {name: Machine() for name in NAMES[:2]}
        self.state, actions = gather(State(recruits=NAMES[:2]), 0.0, LIMITS)
        self.now, self.saved = 0.0, 0
        self.recorded = 0
        self.mail: list[g.Event] = []
        self.running: int | None = None
        self.draining = False
        self.applied = 0
        self.act(actions)

    def tell(self, event: g.Event) -> None:
        self.state, actions = next_state(self.state, event, self.now, LIMITS)
        if self.state.phase is not Phase.RUNNING or self.state.generation != self.running:
            self.running = None
        self.act(actions)

    def act(self, actions: list[g.Action]) -> None:
        for action in actions:
            match action:
                case g.Ask(generation, ids):
                    for name in ids:
                        self.mail.append(g.Holds(name, generation, self.machines[name].step))
                case g.Look(generation):
                    self.mail.append(g.Looked(generation))
                case g.Bring(generation, source, ids, step):
                    holder = self.saved if source == DISK else self.machines[source].step
                    assert holder == step, "a state is given that is there"
                    for name in ids:
                        self.mail.append(g.Levelled(name, generation))
                case g.Form(generation, ids, _):
                    self.mail += [g.Joined(name, generation) for name in ids]
                case g.Go(generation, base):
                    assert self.running is None, "no two generations live"
                    assert generation == self.state.generation
                    steps = {self.machines[name].step for name in self.state.ids}
                    assert steps == {base}, "all ranks hold what the run goes on from"
                    self.running, self.draining, self.applied = generation, False, base
                case g.Drain():
                    self.draining = True
                case g.Keep(_, source):
                    self.saved = self.machines[source].step
                    self.mail.append(g.Saved(self.saved))
                case g.Dismiss(name, _):
                    self.machines.pop(name)
                case g.Fail():
                    pass

    def deliver(self, index: int) -> None:
        """One of the messages under way arrives, in any order."""
        if not self.mail:
            return
        event = self.mail.pop(index % len(self.mail))
        name = getattr(event, "id", None)
        if name is not None and name not in self.machines:
            return
        if isinstance(event, g.Levelled):
            self.machines[name].step = (
                self.state.base if event.generation == self.state.generation else self.machines[name].step
            )
        if isinstance(event, g.Holds):
            event = dataclasses.replace(event, step=self.machines[event.id].step)
        self.tell(event)

    def train(self) -> None:
        """The ranks apply a step; or nothing is under way any more."""
        if self.running is None:
            return
        if self.draining:
            self.tell(g.Drained(self.state.generation, self.applied))
            return
        self.applied += 1
        for name in self.state.ids:
            self.machines[name].step = self.applied
        if self.applied > self.recorded:
            self.recorded = self.applied
            self.tell(g.Applied(self.applied))

    def lose(self, name: str) -> None:
        if name in self.machines:
            self.machines.pop(name)
            self.mail = [event for event in self.mail if getattr(event, "id", None) != name]
            self.tell(g.Lost(name))

    def come(self, name: str) -> None:
        if name not in self.machines:
            self.machines[name] = Machine()
            self.tell(g.Came(name))

    def settle(self) -> None:
        """Nothing more goes wrong: everything arrives, time passes."""
        for _ in range(200):
            if self.state.phase is Phase.FAILED:
                return
            if self.mail:
                self.deliver(0)
            elif self.state.phase is Phase.RUNNING and not self.draining:
                return
            elif self.state.phase is Phase.RUNNING:
                self.train()
            elif self.state.phase is Phase.EMPTY:
                self.come("anna")
            else:
                self.now += 30.0
                self.tell(g.Tick())
        raise AssertionError(f"stuck: {self.state}")


EVENTS = st.one_of(
    st.tuples(st.just("deliver"), st.integers(0, 5)),
    st.tuples(st.just("train"), st.just(0)),
    st.tuples(st.just("lose"), st.integers(0, 2)),
    st.tuples(st.just("come"), st.integers(0, 2)),
    st.tuples(st.just("leave"), st.integers(0, 2)),
    st.tuples(st.just("broke"), st.booleans()),
    st.tuples(st.just("save"), st.just(0)),
    st.tuples(st.just("pass"), st.floats(0.1, 25.0)),
)


@settings(max_examples=400)
@given(st.lists(EVENTS, max_size=60))
def test_no_order_of_events_leads_astray(events: list[tuple[str, float]]) -> None:
    world = World()
    for kind, value in events:
        name = NAMES[int(value) % 3]
        generation = world.state.generation
        match kind:
            case "deliver":
                world.deliver(int(value))
            case "train":
                world.train()
            case "lose":
                world.lose(name)
            case "come":
                world.come(name)
            case "leave" if name in world.machines:
                world.tell(g.Leaves(name))
            case "broke":
                world.tell(g.Broke(generation, "no sum" if value else ""))
            case "save" if world.running is not None and world.applied >= world.recorded:
                world.saved = world.applied
                world.tell(g.Saved(world.saved))
            case "pass":
                world.now += value
                world.tell(g.Tick())
        assert world.state.generation >= generation
    world.settle()
    if world.state.phase is Phase.RUNNING:
        assert world.state.base <= max(world.recorded, world.saved)
        while world.applied < world.recorded:
            world.train()
        before = world.recorded
        for _ in range(5):
            world.train()
        assert world.recorded >= before, "it trains on"


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["train", "lose", "come", "deliver"]), max_size=40))
def test_nothing_is_computed_again_while_a_holder_lives(events: list[str]) -> None:
    """With one machine that is never lost, the run goes on from what was recorded."""
    world = World()
    world.settle()
    for kind in events:
        match kind:
            case "train":
                world.train()
            case "lose":
                world.lose("ben")
            case "come":
                world.come("ben")
            case "deliver":
                world.deliver(0)
    world.settle()
    assert world.applied >= world.recorded
