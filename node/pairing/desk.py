"""When a node can be paired, and what its people are told of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.errors import TandemError, UserError
from node.pairing.exchange import Hello, Party, pack_offer
from node.pairing.listener import Listener
from node.pairing.messages import Refused
from node.pairing.secrets import CODE, CODE_TRIES, Secret, elapsed, shown_code
from node.pairing.tokens import Joined, Token
from node.peers import Peers, fingerprint, shown

_HINTS = {
    "expired": "it has expired",
    "used": "it was used already",
}


@dataclass(frozen=True)
class OpenCode:
    """A code that is shown.

    Attributes:
        code: as people read it.
        port: where it can be proven.
        seconds: how long.
    """

    code: str
    port: int
    seconds: float


@dataclass(frozen=True)
class Happening:
    """What the node's people are told.

    Attributes:
        event: for programs: ``pairing``, ``pairing_over``, ``paired``, ``wrong_code``, ``joining``, ``join_refused``.
        line: for people.
        data: for programs.
    """

    event: str
    line: str
    data: Mapping[str, Any] = field(default_factory=dict)


class Desk:
    """Opens and closes a node's listener for pairing.

    Args:
        home: the ``TANDEM_HOME``.
        us: who the node is.
        host: IPv4 address to listen on.
        port: to listen on; another when it is taken.
        tell: what happens, for people.
        changed: called when ``entries`` are others.
        hosts: addresses at which others reach this machine.
        clock: see ``secrets.elapsed``.
    """

    def __init__(
        self,
        home: Path,
        us: Party,
        host: str,
        port: int,
        *,
        tell: Callable[[Happening], None],
        changed: Callable[[], None] = lambda: None,
        hosts: Callable[[], Sequence[str]] = lambda: (),
        clock: Callable[[], float] = elapsed,
    ) -> None:
        self._peers = Peers(home)
        self._joined = Joined(home)
        self._us = us
        self._host = host
        self._wanted_port = port
        self._tell = tell
        self._changed = changed
        self._hosts = hosts
        self._clock = clock
        self._code: Secret | None = None
        self._by_itself = False
        self._join: Secret | None = None
        self._hinted: set[str] = set()
        self._listener: Listener | None = None
        self._one_at_a_time = asyncio.Lock()
        self._looking: set[asyncio.Task[None]] = set()

    # --- what can be proven -----------------------------------------------------------------------------------------

    @property
    def entries(self) -> dict[str, str]:
        """What the advert says of it."""
        if self._listener is None:
            return {}
        join = self._join.token if self._join is not None else None
        return {"pair": str(self._listener.port), **({"join": join.id} if join is not None else {})}

    @property
    def open_code(self) -> OpenCode | None:
        """The code that is shown now."""
        code, listener = self._code, self._listener
        if code is None or listener is None or code.spent:
            return None
        return OpenCode(shown_code(code.digits), listener.port, code.seconds_left)

    def invitation(self) -> Happening | None:
        """What people are told of the code that is shown now, or of the token that is waited for."""
        code = self.open_code
        if code is not None:
            at = next(iter(self._hosts()), "127.0.0.1")
            where = f"coordinator pair {self._quoted()}, or coordinator pair {at}:{code.port}"
            minutes = math.ceil(code.seconds / 60)
            return Happening(
                "pairing",
                f"to pair: {where}; code {code.code} (for {minutes} {'minute' if minutes == 1 else 'minutes'})",
                {"code": code.code, "port": code.port, "seconds": round(code.seconds)},
            )
        if self._join is not None and self._join.token is not None and self._listener is not None:
            return Happening(
                "joining",
                f"waits to be paired by the coordinator that printed the token (pairing port {self._listener.port})",
                {"token": self._join.token.id, "port": self._listener.port},
            )
        return None

    def _quoted(self) -> str:
        return f"'{self._us.name}'" if " " in self._us.name else self._us.name

    # --- opening and closing ----------------------------------------------------------------------------------------

    async def start(self, token: Token | None) -> None:
        """Wait for who has printed the token; without one, show a code if this home has no peers.

        Raises:
            UserError: the token is this home's own, or nothing can be listened on.
        """
        token = self._usable(token) if token is not None else None
        if token is not None:
            self._join = Secret.of_token(token, self._clock)
        elif not self._peers.all():
            self._code, self._by_itself = Secret.code(self._clock), True
        await self.look()

    def _usable(self, token: Token) -> Token | None:
        if token.of(fingerprint(self._us.certificate)):
            raise UserError("--join: this TANDEM_HOME printed the token itself; it is for the other machine")
        known = next((peer for peer in self._peers.all() if token.of(peer.fingerprint)), None)
        if known is not None:
            return None  # a service that starts with it each time
        if token in self._joined:
            self._tell(
                Happening(
                    "join_refused",
                    "the token was used already, and the pairing was ended since; get a new one: coordinator invite",
                    {"token": token.id, "reason": "used"},
                )
            )
            return None
        return token

    async def new_code(self) -> OpenCode:
        """Show a new code; one that was shown is void.

        Raises:
            UserError: nothing can be listened on.
        """
        if self._code is not None:
            self._code.use()  # also for who is in the midst of it
        self._code, self._by_itself = Secret.code(self._clock), False
        try:
            await self.look()
        except UserError:
            self._code = None
            raise
        code = self.open_code
        assert code is not None, "it is new"
        said = self.invitation()
        assert said is not None, "there is a code"
        self._tell(said)
        return code

    async def look(self) -> None:
        """Close what is over; to be called from time to time."""
        async with self._one_at_a_time:
            if self._listener is not None and self._listener.settling:
                return
            self._end_code()
            if self._join is not None and self._join.spent:
                self._join = None
            before = self.entries
            wanted = self._code is not None or self._join is not None
            if wanted and self._listener is None:
                listener = self._new_listener()
                await listener.open(self._host, self._wanted_port)
                self._listener = listener
            elif not wanted and self._listener is not None:
                listener, self._listener = self._listener, None
                await listener.close()
        if self.entries != before:
            self._changed()

    def _end_code(self) -> None:
        """Void the code when it is spent, or needed no more."""
        code = self._code
        if code is None:
            return
        if not code.spent and self._by_itself and self._peers.all():
            self._code = None  # another node of this home was paired meanwhile: that is for all
            return
        if code.spent:
            self._code = None
        words = {
            "expired": "the pairing code has expired; `node pair` shows a new one",
            "tries": f"{CODE_TRIES} wrong codes: the pairing code is void; `node pair` shows a new one",
        }
        if code.spent in words:
            self._tell(Happening("pairing_over", words[code.spent], {"reason": code.spent}))

    def _new_listener(self) -> Listener:
        return Listener(
            self._us,
            self._offer,
            self._choose,
            self._keep,
            on_wrong=self._on_wrong,
            on_hint=self._on_hint,
            on_ended=self._look_soon,
        )

    async def stop(self) -> None:
        """Close it all."""
        self._code = self._join = None
        for task in tuple(self._looking):
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)
        async with self._one_at_a_time:
            listener, self._listener = self._listener, None
            if listener is not None:
                await listener.close()

    def _look_soon(self) -> None:
        spent = [secret for secret in (self._code, self._join) if secret is not None and secret.spent]
        if not spent or self._looking:
            return
        task = asyncio.create_task(self.look())
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    # --- for the listener -------------------------------------------------------------------------------------------

    def _offer(self, hello: Hello) -> bytes:
        del hello
        token = self._join.token if self._join is not None else None
        return pack_offer(self._us.certificate, code=self.open_code is not None, token=token.id if token else "")

    def _choose(self, hello: Hello) -> Secret | Refused:
        if hello.fingerprint == fingerprint(self._us.certificate):
            return Refused("other")
        if hello.wants == CODE:
            return self._code if self._code is not None and not self._code.spent else Refused("closed")
        join = self._join
        if join is None or join.token is None or join.spent or hello.wants != join.wants:
            return Refused("closed")
        return join if join.token.of(hello.fingerprint) else Refused("other")

    def _keep(self, coordinator: Party, secret: Secret) -> None:
        try:
            if secret.token is not None:
                self._joined.add(secret.token)
            peer = self._peers.add(coordinator.name, coordinator.certificate)
        except (TandemError, OSError) as error:
            self._tell(Happening("pairing_over", f"not paired: {error}", {"reason": "disk"}))
            raise Refused("closed") from error
        self._tell(
            Happening(
                "paired",
                f"paired with {peer.name} ({shown(peer.fingerprint)}); `node forget` ends that",
                {"name": peer.name, "home": peer.home, "fingerprint": peer.fingerprint},
            )
        )

    def _on_wrong(self, secret: Secret) -> None:
        if secret.digits:
            self._tell(Happening("wrong_code", "somebody has tried a wrong pairing code"))

    def _on_hint(self, hello: Hello, reason: str) -> None:
        join = self._join
        if join is None or join.token is None or reason not in _HINTS or reason in self._hinted:
            return
        if not join.token.of(hello.fingerprint):
            return
        self._hinted.add(reason)
        # Certificates are public, and nothing was proven: it may be anybody who has seen the coordinator's.
        line = (
            f"not joined: somebody who calls himself the coordinator that printed the token says that {_HINTS[reason]};"
            " it is still waited for. If it is true, get a new one there: coordinator invite"
        )
        self._tell(Happening("join_refused", line, {"token": join.token.id, "reason": reason}))
