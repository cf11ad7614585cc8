"""What ``coordinator invite`` prints and ``node serve --join`` takes: one line of base32.

    id 5 | secret 16 | beginning of the inviting home's fingerprint 10 | checksum 4

The checksum finds slips of the hand; it proves nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from node.errors import TandemError, UserError
from node.files import make_private_folder, write_private

ID_BYTES, SECRET_BYTES, INVITER_BYTES, CHECK_BYTES = 5, 16, 10, 4
_GROUP = 8
_ID = re.compile(rf"[0-9a-f]{{{2 * ID_BYTES}}}")


@dataclass(frozen=True)
class Token:
    """A token.

    Attributes:
        id: in hexadecimal; public.
        secret: what proves that one has the token.
        inviter: beginning of the fingerprint of the home that has printed it, in hexadecimal.
    """

    id: str
    secret: bytes = field(repr=False)
    inviter: str

    @property
    def password(self) -> bytes:
        """What the exchange takes for it."""
        return password(self.id, self.secret)

    def of(self, mark: str) -> bool:
        """Whether the home with the certificate of this fingerprint has printed it."""
        return mark.startswith(self.inviter)

    def __str__(self) -> str:
        """As it is printed."""
        content = bytes.fromhex(self.id) + self.secret + bytes.fromhex(self.inviter)
        text = base64.b32encode(content + _check(content)).decode().lower()
        return "-".join(text[at : at + _GROUP] for at in range(0, len(text), _GROUP))


def new_token(mark: str) -> Token:
    """A new one of the home with the certificate of this fingerprint."""
    return Token(secrets.token_hex(ID_BYTES), secrets.token_bytes(SECRET_BYTES), mark[: 2 * INVITER_BYTES])


def parse_token(text: str) -> Token:
    """Take apart what was printed.

    Raises:
        UserError: it is no token.
    """
    bare = "".join(text.replace("-", " ").split()).upper()
    try:
        content = base64.b32decode(bare)
    except (binascii.Error, ValueError):
        content = b""
    body, check = content[:-CHECK_BYTES], content[-CHECK_BYTES:]
    if len(body) != ID_BYTES + SECRET_BYTES + INVITER_BYTES or check != _check(body):
        raise UserError("--join: that is no token, or a part of one; `coordinator invite` prints a new one")
    secret = body[ID_BYTES : ID_BYTES + SECRET_BYTES]
    return Token(body[:ID_BYTES].hex(), secret, body[ID_BYTES + SECRET_BYTES :].hex())


def password(identity: str, secret: bytes) -> bytes:
    """What the exchange takes for a token."""
    return b"token " + bytes.fromhex(identity) + secret


def is_token_id(text: str) -> bool:
    """Whether this can be a token's id."""
    return _ID.fullmatch(text) is not None


class Joined:
    """Which tokens this home has used: each works once, also after the pairing was ended.

    Args:
        home: the ``TANDEM_HOME``.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / "joined"

    def __contains__(self, token: Token) -> bool:
        return (self._folder / token.id).exists()

    def add(self, token: Token) -> None:
        """Remember one.

        Raises:
            TandemError: it cannot be kept.
        """
        try:
            make_private_folder(self._folder)
            write_private(self._folder / token.id, b"")
        except OSError as error:
            raise TandemError(f"{self._folder}: used tokens cannot be kept there: {error.strerror}") from error


def _check(content: bytes) -> bytes:
    return hashlib.sha256(b"mlx-tandem token " + content).digest()[:CHECK_BYTES]
