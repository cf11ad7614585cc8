"""Who this program is: one key for each ``TANDEM_HOME``, bound to the machine that it was made on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from node.errors import TandemError, UserError
from node.files import make_private_folder, sync_folder, write_private
from node.hardware import Read, Run, read_text, run_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ID_CHARACTERS = 16
DOMAIN = "mlx-tandem"
"""Of the name in a certificate: the home's id comes before it."""


@dataclass(frozen=True)
class Credentials:
    """What a program proves with that it is of a ``TANDEM_HOME``.

    Attributes:
        home: id of the key.
        certificate: in PEM, self-signed by the key.
        key: in PEM.
        certificate_path, key_path: where both are.
    """

    home: str
    certificate: bytes
    key: bytes = field(repr=False)
    certificate_path: Path
    key_path: Path


@dataclass(frozen=True)
class Identity:
    """A named program of a ``TANDEM_HOME``.

    Attributes:
        id: of this key and name; stable across restarts.
        home: of the key: the same for all programs of one ``TANDEM_HOME``.
        secret: known to programs of this ``TANDEM_HOME`` only.
    """

    id: str
    home: str
    secret: str


def identity(
    home: Path, name: str, *, system: str | None = None, run: Run = run_text, read: Read = read_text
) -> Identity:
    """Who the program of this name is; makes the key when it is the first to ask.

    A ``TANDEM_HOME`` that was copied from another machine gets a key of its own: two machines must not be taken for
    one. The other key stays beside it, as do the machines that it was paired with and its tokens.

    Args:
        home: the ``TANDEM_HOME``.
        name: what people call the node.
        system: ``Darwin`` or ``Linux``; None takes this machine's.
        run: how commands are asked for the machine's own id.
        read: how files are asked for it.

    Raises:
        TandemError: the key cannot be read or written.
    """
    folder = home / "identity"
    public = _prepare(folder, system or platform.system(), run, read)
    secret = (folder / "secret").read_text()
    return Identity(id=_short(public + b"\0" + name.encode()), home=_short(public), secret=secret)


@cache
def credentials(home: Path) -> Credentials:
    """What a program of this ``TANDEM_HOME`` proves itself with; makes the key when it is the first to ask.

    Raises:
        TandemError: the key cannot be read or written.
    """
    folder = home / "identity"
    public = _prepare(folder, platform.system(), run_text, read_text)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    return Credentials(_short(public), certificate.read_bytes(), key.read_bytes(), certificate, key)


def _prepare(folder: Path, system: str, run: Run, read: Read) -> bytes:
    """Have key, certificate and secret there; the public key in DER."""
    try:
        make_private_folder(folder)
        folder.chmod(0o700)
        with _locked(folder / "lock"):
            machine = _machine_digest(system, run, read)
            _leave_foreign_key(folder, machine)
            public = _public_key(folder)
            if machine and read_text(str(folder / "machine")) != machine:
                # Also of a key that was made when it could not be read, or by a process that was killed then.
                write_private(folder / "machine", machine.encode())
            _secret(folder / "secret")
    except OSError as error:
        raise UserError(
            f"{folder}: the key of this machine cannot be kept there: {error.strerror}; free some space or set"
            " TANDEM_HOME to another folder"
        ) from error
    return public


def _machine_digest(system: str, run: Run, read: Read) -> str:
    """Names this machine without giving its id away; "" when it has none."""
    if system == "Darwin":
        shown = run(["ioreg", "-rd1", "-c", "IOPlatformExpertDevice"]) or ""
        match = re.search(r'"IOPlatformUUID"\s*=\s*"([^"]+)"', shown)
        found = match[1] if match else ""
    else:
        found = read("/etc/machine-id") or ""
    return hashlib.sha256(f"mlx-tandem {found}".encode()).hexdigest() if found else ""


def _leave_foreign_key(folder: Path, machine: str) -> None:
    """Put key and secret of another machine aside, and whom it trusted: they trust that machine, not this one."""
    bound = read_text(str(folder / "machine"))
    if not machine or bound is None or bound == machine:
        return
    home = folder.parent
    # The key last: while it is there, a process that was killed in between leaves the rest to the next.
    for path in (
        *(home / name for name in ("peers", "invites", "joined")),
        *(folder / name for name in ("secret", "certificate.pem", "key.pem")),
    ):
        if path.exists():
            path.replace(_free_name(path.with_name(f"{path.name}.of-another-machine-{bound[:8]}")))
    sync_folder(home)
    sync_folder(folder)
    (folder / "machine").unlink()
    sync_folder(folder)


def _free_name(path: Path) -> Path:
    """This one, or with a number after it: a home may be copied to and fro."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(free for free in chain([path], numbered) if not free.exists())


def _public_key(folder: Path) -> bytes:
    """The public key in DER, of the key in this folder or of a new one; its certificate is there afterwards."""
    # Takes a tenth of a second, which commands that never ask need not pay.
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = folder / "key.pem"
    if path.exists():
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise TandemError(f"{path} is no key; remove it, and this machine gets a new one") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TandemError(f"{path} is a key of another kind; remove it, and this machine gets a new one")
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(path, pem)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    certificate = folder / "certificate.pem"
    # One of a key that was removed proves nothing of this one.
    if not certificate.exists() or _certified_key(certificate.read_bytes()) != public:
        write_private(certificate, self_signed(key, _short(public)))
    return public


def _certified_key(certificate: bytes) -> bytes | None:
    """The public key in DER that a certificate is for; None when it is no certificate."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = x509.load_pem_x509_certificate(certificate).public_key()
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm):
        return None
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def self_signed(key: EllipticCurvePrivateKey, home: str) -> bytes:
    """A certificate of a key for itself, in PEM.

    It is trusted for being known, not for what it says: its dates bound nothing, as clocks at home are often wrong.
    Its subject is the home, so that no two are taken for each other when a chain is built.

    Args:
        key: on the curve P-256; gRPC takes no Ed25519.
        home: the id of the key.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, home)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Before 1970, which a machine takes for today whose battery has been empty.
        .not_valid_before(datetime(1950, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2099, 12, 31, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(server_name(home))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def server_name(home: str) -> str:
    """The name in the certificate of a home."""
    return f"{home}.{DOMAIN}"


def _secret(path: Path) -> None:
    if not path.exists():
        write_private(path, secrets.token_hex(32).encode())


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:ID_CHARACTERS]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold this file's lock: several programs of one home may start at once, and all must see the same key."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
