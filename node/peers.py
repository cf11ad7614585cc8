"""The machines that this one is paired with, and what their certificates tell.

    TANDEM_HOME/peers/HOME.json     one for each, readable by its owner only

A peer is a ``TANDEM_HOME``, not a machine: all its programs have one key. Being paired is mutual, and means everything:
either may have the other train, and is given what that takes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from node.errors import TandemError, UserError, one_line
from node.files import make_private_folder, sync_folder, write_private
from node.identity import ID_CHARACTERS, Credentials

NAME_CHARACTERS = 80
MOST_CERTIFICATE_BYTES = 4096

_HOME = re.compile(rf"[0-9a-f]{{{ID_CHARACTERS}}}")
_PEM = re.compile(
    rb"\s*-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END CERTIFICATE-----\s*",
)


@dataclass(frozen=True)
class Peer:
    """A ``TANDEM_HOME`` that we are paired with.

    Attributes:
        home: its id.
        name: what its machine is called, as it said when it was paired.
        certificate: in PEM.
        paired: when, in seconds since 1970.
    """

    home: str
    name: str
    certificate: str
    paired: float

    @property
    def fingerprint(self) -> str:
        """Of its certificate."""
        return fingerprint(self.certificate.encode())


@lru_cache(maxsize=256)
def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate in PEM, in hexadecimal: the same as of its DER form.

    Raises:
        UserError: that is no certificate.
    """
    return hashlib.sha256(der_of(certificate)).hexdigest()


def der_of(certificate: bytes) -> bytes:
    """The one certificate of a PEM text, in DER.

    Raises:
        UserError: that is no certificate, or several.
    """
    match = _PEM.fullmatch(certificate) if len(certificate) <= MOST_CERTIFICATE_BYTES else None
    try:
        if match is not None:
            return base64.b64decode(b"".join(match[1].split()), validate=True)
    except binascii.Error:
        pass  # said below
    raise UserError("what was sent is no certificate")


@lru_cache(maxsize=256)
def home_of(certificate: bytes) -> str:
    """The id of the home whose certificate this is: a hash of its key.

    Raises:
        UserError: it is no certificate of ours.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        found = x509.load_der_x509_certificate(der_of(certificate))
        key = found.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise UserError("a certificate of a key that is not on the curve P-256")
        found.verify_directly_issued_by(found)
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm, InvalidSignature, Warning) as error:
        # A warning where warnings are errors: of a form that a later version of the library takes no more.
        raise UserError("what was sent is no certificate of mlx-tandem") from error
    public = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).hexdigest()[:ID_CHARACTERS]


def shown(mark: str) -> str:
    """A fingerprint for people to compare: its first 128 bits in groups of four."""
    return " ".join(mark[at : at + 4] for at in range(0, 32, 4))


class Peers:
    """The peers of a ``TANDEM_HOME``; what other programs change is seen at the next look.

    Args:
        home: the ``TANDEM_HOME``.

    Attributes:
        trouble: why they could not be read at the last look, or "".
    """

    def __init__(self, home: Path) -> None:
        self.trouble = ""
        self._folder = home / "peers"
        self._lock = threading.Lock()
        self._seen: tuple[tuple[str, int], ...] | None = None
        self._peers: dict[str, Peer] = {}

    def all(self) -> tuple[Peer, ...]:
        """All of them, by name."""
        return tuple(sorted(self._look().values(), key=lambda peer: (peer.name.casefold(), peer.home)))

    def get(self, home: str) -> Peer | None:
        """The peer of this id."""
        return self._look().get(home)

    def with_fingerprint(self, fingerprint: str) -> Peer | None:
        """The peer with this certificate."""
        return next((peer for peer in self._look().values() if peer.fingerprint == fingerprint), None)

    def find(self, text: str) -> tuple[Peer, ...]:
        """Those that a person means by a name, an id, or the beginning of a fingerprint."""
        peers = self.all()
        bare = text.replace(" ", "").casefold()
        exact = [peer for peer in peers if text in (peer.name, peer.home)]
        folded = [peer for peer in peers if peer.name.casefold() == text.casefold()]
        marked = [peer for peer in peers if len(bare) >= 8 and peer.fingerprint.startswith(bare)]
        return tuple(exact or folded or marked)

    def add(self, name: str, certificate: bytes) -> Peer:
        """Trust the home with this certificate from now on; one that was known gets the name and certificate anew.

        Raises:
            UserError: that is no certificate of ours.
            TandemError: it cannot be kept.
        """
        clean = "".join(character for character in name if character.isprintable())[:NAME_CHARACTERS].strip()
        peer = Peer(home_of(certificate), clean or "a machine", certificate.decode(), time.time())
        try:
            make_private_folder(self._folder)
            write_private(self._folder / f"{peer.home}.json", f"{json.dumps(asdict(peer), indent=2)}\n".encode())
        except OSError as error:
            raise TandemError(f"{self._folder}: who was paired cannot be kept there: {error.strerror}") from error
        return peer

    def remove(self, home: str) -> bool:
        """Trust this one no more; whether it was trusted."""
        path = self._folder / f"{home}.json"
        if not _HOME.fullmatch(home) or not path.exists():
            return False
        path.unlink(missing_ok=True)
        sync_folder(self._folder)
        return True

    def _look(self) -> dict[str, Peer]:
        """All of them, by id; while they cannot be read, those that were known."""
        with self._lock:
            try:
                found = self._listed()
                if found != self._seen:
                    self._peers = {peer.home: peer for peer in _read(self._folder / name for name, _ in found)}
                    self._seen = found
                self.trouble = ""
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                self.trouble = "" if gone else one_line(error)
                # A folder that is not there is that of who has no peers, unless the whole home is away.
                if gone and self._folder.parent.exists():
                    self._peers, self._seen = {}, ()
            return self._peers

    def _listed(self) -> tuple[tuple[str, int], ...]:
        """Names of records, and when each was written."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if _is_record(entry):
                        found.append((entry.name, entry.stat().st_mtime_ns))
        return tuple(sorted(found))


def certificate_of(home: str, ours: Credentials, peers: Peers) -> bytes | None:
    """The certificate by which we know the home of this id; None when we do not."""
    if home == ours.home:
        return ours.certificate
    peer = peers.get(home)
    return peer.certificate.encode() if peer is not None else None


def _is_record(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(".json") and not entry.name.startswith(".")


def _read(paths: Iterable[Path]) -> Iterable[Peer]:
    """Those that can be read; a file of another make is nobody's."""
    for path in paths:
        try:
            peer = Peer(**json.loads(path.read_text()))
            if home_of(peer.certificate.encode()) == peer.home == path.stem:
                yield peer
        except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError, UserError):
            continue
