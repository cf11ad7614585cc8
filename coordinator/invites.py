"""Tokens that this home has printed, for nodes to join with.

TANDEM_HOME/invites/ID.json     one for each; its secret is there as long as it works
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from node.errors import TandemError
from node.files import make_private_folder, write_private
from node.pairing.tokens import Token, is_token_id, new_token, password

KEPT_SECONDS = 30 * 24 * 3600.0
"""After its end, for the words that say so."""


@dataclass(frozen=True)
class Invite:
    """A token that was printed.

    Attributes:
        id: of the token.
        expires: seconds since 1970.
        secret: in hexadecimal; "" once it was used.
        used_by: fingerprint of who has used it, or has begun to: as long as the secret is there, to finish; or "".
    """

    id: str
    expires: float
    secret: str = field(repr=False)
    used_by: str = ""

    @property
    def password(self) -> bytes:
        """What the exchange takes for it."""
        return password(self.id, bytes.fromhex(self.secret))


class Invites:
    """What was printed.

    Args:
        home: the ``TANDEM_HOME``.
        now: seconds since 1970.
    """

    def __init__(self, home: Path, now: Callable[[], float] = time.time) -> None:
        self._folder = home / "invites"
        self._now = now

    def new(self, mark: str, seconds: float) -> Token:
        """A new token of the home with the certificate of this fingerprint.

        Raises:
            TandemError: it cannot be kept.
        """
        token = new_token(mark)
        try:
            make_private_folder(self._folder)
            self._tidy()
            self._write(Invite(token.id, self._now() + seconds, token.secret.hex()))
        except OSError as error:
            raise TandemError(f"{self._folder}: invitations cannot be kept there: {error.strerror}") from error
        return token

    def any_open(self) -> bool:
        """Whether some node may be waiting with one."""
        return any(self.problem(invite.id) == "" for invite in self._all())

    def problem(self, identity: str) -> str:
        """Why this one does not work: ``unknown``, ``used``, ``expired``; "" when it does."""
        invite = self._get(identity)
        if invite is None:
            return "unknown"
        if not invite.secret:
            return "used"
        return "expired" if self._now() >= invite.expires else ""

    @contextmanager
    def held(self, identity: str) -> Iterator[Invite | None]:
        """The invitation while nobody else uses it; None when it does not work, or somebody does just now."""
        lock = self._folder / f"{identity}.lock"
        if not is_token_id(identity) or self.problem(identity):
            yield None
            return
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield self._get(identity) if not self.problem(identity) else None
        finally:
            os.close(handle)

    def begin(self, invite: Invite, mark: str) -> bool:
        """Have it work for the node with the certificate of this fingerprint only: it has proven that it has the token.

        It works until that node has joined, however often the network cuts that off: without a screen, it has no other.

        Returns:
            False when it is another node's already.

        Raises:
            TandemError: that cannot be kept.
        """
        if invite.used_by not in ("", mark):
            return False
        self._keep(Invite(invite.id, invite.expires, invite.secret, mark))
        return True

    def use(self, invite: Invite, mark: str) -> None:
        """Have it work no more: the node with the certificate of this fingerprint has joined.

        Raises:
            TandemError: that cannot be kept.
        """
        self._keep(Invite(invite.id, invite.expires, "", mark))

    def _keep(self, invite: Invite) -> None:
        try:
            self._write(invite)
        except OSError as error:
            raise TandemError(f"{self._folder}: invitations cannot be kept there: {error.strerror}") from error

    def _get(self, identity: str) -> Invite | None:
        if not is_token_id(identity):
            return None
        try:
            invite = Invite(**json.loads((self._folder / f"{identity}.json").read_text()))
            bytes.fromhex(invite.secret)
        except (OSError, ValueError, TypeError):
            return None
        return invite if invite.id == identity else None

    def _all(self) -> list[Invite]:
        found = [self._get(path.stem) for path in sorted(self._folder.glob("*.json"))]
        return [invite for invite in found if invite is not None]

    def _write(self, invite: Invite) -> None:
        content = json.dumps(asdict(invite), indent=2)
        write_private(self._folder / f"{invite.id}.json", f"{content}\n".encode())

    def _tidy(self) -> None:
        for invite in self._all():
            if self._now() > invite.expires + KEPT_SECONDS:
                for suffix in (".json", ".lock"):
                    with contextlib.suppress(FileNotFoundError):
                        (self._folder / f"{invite.id}{suffix}").unlink()
