"""What a stranger may prove to a node: for how long, how often, how fast. No sockets here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from node.errors import UserError
from node.pairing.tokens import Token

CODE_DIGITS = 8
CODE_SECONDS = 600.0
CODE_TRIES = 5
"""Wrong ones, from all addresses together, that void a code."""
FIRST_PAUSE_SECONDS = 1.0
"""After a wrong code, before another may be tried; twice as long each time."""
CODE = "code"
"""What a coordinator says that it is going to prove, if it has a code."""
TOKEN = "token:"
"""Likewise, before a token's id."""


def elapsed() -> float:
    """Seconds on a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class NoCode(UserError):
    """What a person typed is no code."""


def shown_code(digits: str) -> str:
    """As people read it: ``1234-5678``."""
    return f"{digits[: CODE_DIGITS // 2]}-{digits[CODE_DIGITS // 2 :]}"


def parse_code(text: str) -> str:
    """The digits of what a person has typed.

    Raises:
        NoCode: it is none.
    """
    digits = "".join(text.replace("-", " ").split())
    if len(digits) != CODE_DIGITS or not (digits.isascii() and digits.isdigit()):
        raise NoCode(f"a code has {CODE_DIGITS} digits, like 1234-5678; `node pair` on the other machine shows one")
    return digits


def code_secret(digits: str) -> bytes:
    """What the exchange takes for a code."""
    return b"code " + digits.encode("ascii")


class Secret:
    """A code that is shown, or a token that was given.

    Attributes:
        wants: what a coordinator says that it is going to prove.
        value: what the exchange takes.
        digits: of a code, or "".
        token: or None.
    """

    def __init__(
        self,
        wants: str,
        value: bytes,
        *,
        digits: str = "",
        token: Token | None = None,
        seconds: float | None = None,
        tries: int | None = None,
        clock: Callable[[], float] = elapsed,
    ) -> None:
        self.wants = wants
        self.value = value
        self.digits = digits
        self.token = token
        self._clock = clock
        self._until = None if seconds is None else clock() + seconds
        self._tries = tries
        self._wrong = 0
        self._not_before = 0.0
        self._used = False

    @classmethod
    def code(cls, clock: Callable[[], float] = elapsed) -> Secret:
        """A new code."""
        digits = "".join(secrets.choice("0123456789") for _ in range(CODE_DIGITS))
        return cls(CODE, code_secret(digits), digits=digits, seconds=CODE_SECONDS, tries=CODE_TRIES, clock=clock)

    @classmethod
    def of_token(cls, token: Token, clock: Callable[[], float] = elapsed) -> Secret:
        """A token: too long to be guessed, so that tries are not counted, and a stranger cannot void it."""
        return cls(TOKEN + token.id, token.password, token=token, clock=clock)

    @property
    def seconds_left(self) -> float:
        """Until it expires; 0 when it has, infinite when it never does."""
        return float("inf") if self._until is None else max(0.0, self._until - self._clock())

    @property
    def spent(self) -> str:
        """Why it opens nothing any more: ``used``, ``tries``, ``expired``; "" while it does."""
        if self._used:
            return "used"
        if self._tries is not None and self._wrong >= self._tries:
            return "tries"
        return "" if self.seconds_left > 0 else "expired"

    @property
    def pause(self) -> float:
        """Seconds before the next try."""
        return max(0.0, self._not_before - self._clock())

    def take(self) -> bool:
        """Count a try, before it is looked at, so that no two are at once; whether it may be looked at."""
        if self.spent or self.pause:
            return False
        if self._tries is not None:
            self._not_before = self._clock() + FIRST_PAUSE_SECONDS * 2**self._wrong
            self._wrong += 1
        return True

    def give_back(self) -> None:
        """The try that was taken was right."""
        if self._tries is not None:
            self._wrong -= 1
            self._not_before = 0.0

    def use(self) -> bool:
        """Use it up: it has been proven. False when it is spent."""
        if self.spent:
            return False
        self._used = True
        return True

    def release(self) -> None:
        """Nothing came of the use."""
        self._used = False
