"""Who is late: what each rank has to do, and by when it should have moved on. Decides only: no I/O, no clock.

Ranks wait together, so a step that is late does not say by itself who is: it is who has not entered the sum. If all
have, it is what lies between them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

PREDICTED_TIMES = 3.0
MORE_SECONDS = 2.0
STATE_SUMS = 6.0
"""Sums of a gradient that take as long as the whole state: with moments, and two bytes of it to a number of four."""


def patience(predicted_seconds: float, more_seconds: float = 0.0) -> float:
    """The longest to wait for what should take so long; ``more_seconds`` for what nobody can predict."""
    return PREDICTED_TIMES * predicted_seconds + MORE_SECONDS + more_seconds


def state_patience(sum_seconds: float) -> float:
    """The longest to wait for a rank's whole state to reach the others, where a sum should take so long."""
    return PREDICTED_TIMES * STATE_SUMS * sum_seconds


@dataclass(frozen=True)
class Late:
    """Something should have happened by now.

    Attributes:
        member: who is late, or None: all have done their part, and there is no sum.
        duty: what is late: a step's number, or what ``asked`` was given; of a copy ``("copy", step)``.
        seconds: since it was begun.
    """

    member: int | None
    duty: Hashable
    seconds: float


@dataclass
class _Duty:
    name: Hashable
    limit: float
    sum_limit: float | None  # of a step: from when all have entered its sum
    entered: bool = False


@dataclass
class _Member:
    duties: deque[_Duty] = field(default_factory=deque)
    since: float = 0.0  # when it came to the first of them, or entered its sum

    @property
    def first(self) -> _Duty | None:
        return self.duties[0] if self.duties else None


@dataclass
class _Copy:
    """A state that a rank is to write beside its other duties."""

    step: int
    limit: float
    since: float | None = None  # when it had the state


class Watch:
    """The duties of the ranks of one generation, each in the order in which they are done.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._members = [_Member() for _ in range(size)]
        self._copies: dict[int, _Copy] = {}

    def step(self, step: int, limits: Sequence[float], sum_limit: float | None, now: float) -> None:
        """A step was asked of all.

        Args:
            step: its number.
            limits: for each rank's share, from when it comes to it; see ``patience``.
            sum_limit: for the sum, from when the last one has entered it; None where nothing is summed.
            now: seconds.
        """
        for index, limit in enumerate(limits):
            self._ask(index, _Duty(step, limit, sum_limit), now)

    def sums_may_take(self, sum_limit: float) -> None:
        """Sums turn out to take longer: steps that were asked for before that was known have at least so long."""
        for member in self._members:
            for duty in member.duties:
                if duty.sum_limit is not None:
                    duty.sum_limit = max(duty.sum_limit, sum_limit)

    def asked(self, member: int, duty: Hashable, limit: float, now: float) -> None:
        """Something else was asked of one rank, which may take so long from when it comes to it."""
        self._ask(member, _Duty(duty, limit, None), now)

    def copy_asked(self, member: int, step: int, limit: float, now: float) -> None:
        """One rank is to write the state after a step, which may take so long from when it has it."""
        self._copies[member] = _Copy(step, limit)
        self._begin_copy(member, now)

    def copied(self, member: int) -> None:
        """A rank has written the state that it was asked for last, or has said why it could not."""
        self._copies.pop(member, None)

    def _begin_copy(self, member: int, now: float) -> None:
        copy = self._copies.get(member)
        if copy is not None and copy.since is None:
            ahead = (duty.name for duty in self._members[member].duties)
            if not any(isinstance(name, int) and name <= copy.step for name in ahead):
                copy.since = now

    def _ask(self, index: int, duty: _Duty, now: float) -> None:
        member = self._members[index]
        if not member.duties:
            member.since = now
        member.duties.append(duty)

    def entered(self, member: int, step: int, now: float) -> None:
        """A rank has computed its share of a step."""
        found = self._members[member]
        if found.first is not None and found.first.name == step and not found.first.entered:
            found.first.entered = True
            found.since = now

    def moved(self, member: int, now: float) -> None:
        """A rank shows that it works on what it has to do."""
        self._members[member].since = now

    def done(self, member: int, duty: Hashable, now: float) -> None:
        """A rank has done something, and with it all before it."""
        found = self._members[member]
        if any(waiting.name == duty for waiting in found.duties):
            while found.duties and found.duties.popleft().name != duty:
                pass
            found.since = now
            self._begin_copy(member, now)

    def deadline(self) -> float:
        """When somebody is late, if nothing happens; infinite when nobody has anything to do."""
        return min((at for at, _ in self._deadlines()), default=math.inf)

    def late(self, now: float) -> Late | None:
        """Who is, first of all; None while nobody is."""
        found = [(at, late) for at, late in self._deadlines() if at <= now]
        if not found:
            return None
        _, (member, duty, since) = min(found, key=lambda item: item[0])
        return Late(member, duty, now - since)

    def _deadlines(self) -> list[tuple[float, tuple[int | None, Hashable, float]]]:
        deadlines: list[tuple[float, tuple[int | None, Hashable, float]]] = []
        waiting: list[_Member] = []
        for index, member in enumerate(self._members):
            first = member.first
            if first is None:
                continue
            if first.entered:
                waiting.append(member)
            else:
                deadlines.append((member.since + first.limit, (index, first.name, member.since)))
        # Who waits for a sum is late for nothing as long as others have something to do.
        if waiting and not deadlines:
            last = max(waiting, key=lambda member: member.since)
            duty = last.duties[0]
            assert duty.sum_limit is not None
            deadlines.append((last.since + duty.sum_limit, (None, duty.name, last.since)))
        deadlines += [
            (copy.since + copy.limit, (index, ("copy", copy.step), copy.since))
            for index, copy in self._copies.items()
            if copy.since is not None
        ]
        return deadlines
