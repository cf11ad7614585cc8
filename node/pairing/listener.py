"""The node's end of a pairing: a TCP port that is open only while there is something to prove.

Who connects is a stranger. He is given two seconds for his first word and ten for all, little memory, and no answer to
anything that is not said right; of many the silent ones go first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from node.errors import UserError
from node.pairing import exchange, messages
from node.pairing.exchange import Hello, Node, Party, Unproven
from node.pairing.messages import Garbled, Refused
from node.pairing.secrets import Secret, elapsed

MOST_CONNECTIONS = 8
HELLO_SECONDS = 2.0
EXCHANGE_SECONDS = 10.0
BURST = 20
CHALLENGES_PER_SECOND = 5.0
"""Beyond the burst: each takes some ten milliseconds to compute."""

Choose = Callable[[Hello], "Secret | Refused"]
"""Which secret this coordinator is to prove."""


@dataclass(eq=False)
class _Visit:
    """A connection.

    Attributes:
        writer: to it.
        task: that sees to it.
        address: where it comes from.
        began: when.
        greeted: whether its first word has come.
    """

    writer: asyncio.StreamWriter
    task: asyncio.Task[None] | None
    address: str
    began: float
    greeted: bool = False


class Listener:
    """Lets coordinators prove that they know a secret.

    Args:
        us: who the node is.
        offer: what can be proven now, as a frame.
        choose: see ``Choose``.
        keep: trust this coordinator from now on; raises ``Refused`` when it cannot.
        on_wrong: told of each wrong try.
        on_hint: told why a coordinator went without a proof, as it says: a word of ``Refused.REASONS``.
        on_ended: called after each visit.

    Attributes:
        port: where it listens; 0 while it does not.
    """

    def __init__(
        self,
        us: Party,
        offer: Callable[[Hello], bytes],
        choose: Choose,
        keep: Callable[[Party, Secret], None],
        *,
        on_wrong: Callable[[Secret], None] = lambda _: None,
        on_hint: Callable[[Hello, str], None] = lambda *_: None,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._us = us
        self._offer = offer
        self._choose = choose
        self._keep = keep
        self._on_wrong = on_wrong
        self._on_hint = on_hint
        self._on_ended = on_ended
        self._settling = 0
        self._server: asyncio.Server | None = None
        self._visits: list[_Visit] = []
        self._pace = _Pace()
        self.port = 0

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._visits)

    @property
    def settling(self) -> bool:
        """Whether a proof is looked at, or a pairing being finished."""
        return self._settling > 0

    async def open(self, host: str, port: int) -> None:
        """Listen; on another port when this one is taken.

        Raises:
            UserError: it cannot be listened there.
        """
        try:
            try:
                self._server = await self._listen(host, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not port:
                    raise
                self._server = await self._listen(host, 0)
        except OSError as error:
            raise UserError(f"no port for pairing on {host}: {error.strerror}") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def _listen(self, host: str, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._visited, host, port, limit=messages.MOST_BYTES, backlog=16)

    async def close(self) -> None:
        """Listen no more, and end what is under way. May be called twice, and from within a visit."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        ours = asyncio.current_task()
        ending = [visit.task for visit in self._visits if visit.task is not None and visit.task is not ours]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self.port = 0

    async def _visited(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visit = _Visit(writer, asyncio.current_task(), str((writer.get_extra_info("peername") or ("",))[0]), elapsed())
        if self._server is None or not self._make_room(visit):
            writer.transport.abort()
            return
        self._visits.append(visit)
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                await self._talk(visit, reader, writer)
                writer.close()
                await writer.wait_closed()
        except (Garbled, Unproven, Refused, OSError, TimeoutError):
            pass  # a stranger is told no more than he was
        except asyncio.CancelledError:
            pass  # we close, or it made room for another
        finally:
            with contextlib.suppress(ValueError):  # it made room for another
                self._visits.remove(visit)
            writer.transport.abort()
            self._on_ended()

    def _make_room(self, newest: _Visit) -> bool:
        """Whether there is room for another connection; the silent go for it, and the slow."""
        if len(self._visits) < MOST_CONNECTIONS:
            return True
        from_there = Counter(visit.address for visit in self._visits)
        silent = [visit for visit in self._visits if not visit.greeted]
        silent.sort(key=lambda visit: -from_there[visit.address])  # of one address alone, its own
        slow = [visit for visit in self._visits if visit.greeted and newest.began - visit.began > HELLO_SECONDS]
        for victim in [*silent, *slow][:1]:
            self._visits.remove(victim)
            if victim.task is not None:
                victim.task.cancel()
            victim.writer.transport.abort()
            return True
        return False

    async def _talk(self, visit: _Visit, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(HELLO_SECONDS):
            hello = exchange.read_hello(await messages.read(reader))
        visit.greeted = True
        if not hello.wants:
            await messages.write(writer, self._offer(hello))
            await self._next(reader, hello, messages.Kind.HELLO)  # only to hear why it goes
            return
        chosen = self._choose(hello)
        if isinstance(chosen, Refused):
            await messages.write(writer, messages.refusal(chosen.reason, chosen.seconds))
            return
        if chosen.pause:
            await messages.write(writer, messages.refusal("wait", chosen.pause))
            return
        if not self._pace.take():
            return
        node = Node(self._us, hello, chosen.value)
        await messages.write(writer, await asyncio.to_thread(node.challenge))
        proof = await self._next(reader, hello, messages.Kind.PROOF)
        if not chosen.take():
            await messages.write(writer, messages.refusal("closed" if chosen.spent else "wait", chosen.pause))
            return
        self._settling += 1
        try:
            answer = await self._checked(node, chosen, proof, writer)
            chosen.give_back()
            if not chosen.use():
                await messages.write(writer, messages.refusal("closed"))
                return
            await self._settle(node, hello, chosen, answer, reader, writer)
        finally:
            self._settling -= 1

    async def _checked(self, node: Node, chosen: Secret, proof: bytes, writer: asyncio.StreamWriter) -> bytes:
        """The answer to a right proof; a wrong one is told on both sides."""
        try:
            return await asyncio.to_thread(node.check, proof)
        except Unproven:
            self._on_wrong(chosen)
            await messages.write(writer, messages.refusal("wrong"))
            raise
        except Garbled:
            self._on_wrong(chosen)
            raise

    async def _settle(
        self,
        node: Node,
        hello: Hello,
        chosen: Secret,
        answer: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """The coordinator has proven it: prove it, too, and keep one another."""
        try:
            await messages.write(writer, answer)
            coordinator = node.end(await self._next(reader, hello, messages.Kind.KEPT))
            self._keep(coordinator, chosen)
        except BaseException as error:
            chosen.release()
            if isinstance(error, Refused):
                await messages.write(writer, messages.refusal(error.reason))
            raise
        await messages.write(writer, node.done())

    async def _next(self, reader: asyncio.StreamReader, hello: Hello, kind: messages.Kind) -> bytes:
        """The frame whose turn it is; when the coordinator ends the conversation instead, what it says is told."""
        content = await messages.read(reader)
        try:
            messages.unpack(content, kind)
        except Refused as refused:
            self._on_hint(hello, refused.reason)
            raise
        return content


@dataclass
class _Pace:
    """So many challenges at once, and so many each second after that."""

    left: float = BURST
    last: float = field(default_factory=elapsed)

    def take(self) -> bool:
        now = elapsed()
        self.left = min(BURST, self.left + (now - self.last) * CHALLENGES_PER_SECOND)
        self.last = now
        if self.left < 1:
            return False
        self.left -= 1
        return True
