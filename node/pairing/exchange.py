"""Both sides of a pairing, without their sockets.

    coordinator                                   node
    HELLO      its certificate           ──►
                                         ◄──      CHALLENGE  its certificate, SPAKE2 message
    PROOF      SPAKE2 message, HMAC      ──►
                                         ◄──      ANSWER     HMAC, name sealed
    KEPT       name sealed               ──►
                                         ◄──      DONE       sealed

SPAKE2 (RFC 9382's family, Ed25519) gives both one key if both have the same secret and see the same two certificates,
whose fingerprints are the parties' identities; each conversation lets either side test one guess, and nothing can be
tested afterwards. A proof is an HMAC over all that was said, by a key for it alone: of AES-GCM one text may open under
several keys, so that it proves nothing. The coordinator, at which a person has typed the code, proves first: the node
counts tries.
"""

from __future__ import annotations

import hmac
import ssl
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol, cast

from node.errors import UserError
from node.pairing.messages import LABEL, Garbled, Kind, pack, unpack
from node.peers import der_of, fingerprint, home_of

MOST_NAME_BYTES = 320
_KEY_BYTES = 32
_POINT_BYTES = 33
"""Of a SPAKE2 message: the side, and a point."""


class Unproven(Exception):
    """The other side does not know the secret, or sees other certificates than we do."""


class _Spake(Protocol):
    def start(self) -> bytes: ...
    def finish(self, inbound: bytes) -> bytes: ...


@dataclass(frozen=True)
class Party:
    """Who speaks.

    Attributes:
        name: what its machine is called.
        certificate: in PEM.
    """

    name: str
    certificate: bytes


@dataclass(frozen=True)
class _Keys:
    """What both sides have when they have the same secret."""

    coordinator_proof: bytes = field(repr=False)
    node_proof: bytes = field(repr=False)
    coordinator_seal: bytes = field(repr=False)
    node_seal: bytes = field(repr=False)
    said: bytes = b""

    def proof_of_coordinator(self) -> bytes:
        return hmac.digest(self.coordinator_proof, self.said, "sha256")

    def proof_of_node(self) -> bytes:
        return hmac.digest(self.node_proof, self.said + self.proof_of_coordinator(), "sha256")


@dataclass(frozen=True)
class Hello:
    """What a coordinator begins with.

    Attributes:
        certificate: in PEM; of ours, but its key is not proven: only that it will be the one that is trusted.
        wants: what it is going to prove, or "".
        content: of the frame.
    """

    certificate: bytes
    wants: str
    content: bytes

    @property
    def fingerprint(self) -> str:
        """Of the certificate."""
        return fingerprint(self.certificate)


def read_hello(content: bytes) -> Hello:
    """Take a stranger's first frame apart.

    Raises:
        Garbled: it is none.
    """
    label, certificate, wants = unpack(content, Kind.HELLO)
    if label != LABEL or len(wants) > 32 or not wants.isascii():
        raise Garbled("another protocol")
    return Hello(_pem(certificate), wants.decode("ascii"), content)


@dataclass(frozen=True)
class Offer:
    """What can be proven to a node now.

    Attributes:
        certificate: of the node, in PEM; nothing is proven by it.
        code: whether it shows a code.
        token: the id of the token that it was started with, or "".
    """

    certificate: bytes
    code: bool
    token: str


def pack_offer(certificate: bytes, *, code: bool, token: str) -> bytes:
    """The frame for it."""
    return pack(Kind.OFFER, der_of(certificate), b"code" if code else b"", token.encode())


def read_offer(content: bytes) -> Offer:
    """Take a node's offer apart.

    Raises:
        Refused: it does not make any.
        Garbled: it is none.
    """
    certificate, code, token = unpack(content, Kind.OFFER)
    if code not in (b"", b"code") or len(token) > 32 or (not token.isalnum() and token):
        raise Garbled("an offer of something else")
    return Offer(_pem(certificate), bool(code), token.decode("ascii", "replace"))


class Coordinator:
    """The side that types the code, or has printed the token.

    Args:
        us: who it is.
        wants: what it is going to prove: see ``secrets``.
        secret: what it knows.
    """

    def __init__(self, us: Party, wants: str, secret: bytes) -> None:
        self._us = us
        self._secret = secret
        self._hello = pack(Kind.HELLO, LABEL, der_of(us.certificate), wants.encode())
        self._keys: _Keys | None = None
        self._certificate = b""
        self._proven: Party | None = None

    def hello(self) -> bytes:
        """The first frame."""
        return self._hello

    def prove(self, content: bytes) -> bytes:
        """Answer the node's challenge. Takes some ten milliseconds.

        Raises:
            Refused: the node ends it.
            Garbled: it is no challenge.
        """
        certificate, theirs = unpack(content, Kind.CHALLENGE)
        self._certificate = _pem(certificate)
        spake = _spake("A", self._secret, self._us.certificate, self._certificate)
        ours = spake.start()
        key = _finish(spake, theirs)
        self._keys = _derive(key, self._hello, content, ours)
        return pack(Kind.PROOF, ours, self._keys.proof_of_coordinator())

    @property
    def certificate(self) -> bytes:
        """Whose challenge it was, in PEM; proven only by its answer."""
        return self._certificate

    def check(self, content: bytes) -> Party:
        """See whether the node's answer proves that it knows the secret: who it is.

        Raises:
            Refused: the node ends it.
            Garbled: it is no answer.
            Unproven: it does not know the secret.
        """
        assert self._keys is not None, "prove() comes first"
        proof, sealed = unpack(content, Kind.ANSWER)
        if not hmac.compare_digest(proof, self._keys.proof_of_node()):
            raise Unproven
        name = _unseal(self._keys.node_seal, 0, self._keys.said, sealed)
        self._proven = Party(name, self._certificate)
        return self._proven

    def kept(self) -> bytes:
        """Say that the node is trusted now; only after ``check``."""
        assert self._keys is not None, "check() comes first"
        assert self._proven is not None, "check() comes first"
        return pack(Kind.KEPT, _seal(self._keys.coordinator_seal, 0, self._keys.said, self._us.name))

    def end(self, content: bytes) -> None:
        """Hear that the node trusts us, too.

        Raises:
            Refused: it does not.
            Garbled: that is something else.
            Unproven: somebody else says so.
        """
        assert self._keys is not None, "kept() comes first"
        (sealed,) = unpack(content, Kind.DONE)
        _unseal(self._keys.node_seal, 1, self._keys.said, sealed)


class Node:
    """The side that shows the code, or was started with the token.

    Args:
        us: who it is.
        hello: how the coordinator began.
        secret: what the coordinator must know.
    """

    def __init__(self, us: Party, hello: Hello, secret: bytes) -> None:
        self._us = us
        self._hello = hello
        self._spake = _spake("B", secret, hello.certificate, us.certificate)
        self._challenge = b""
        self._keys: _Keys | None = None

    def challenge(self) -> bytes:
        """The first answer. Takes some milliseconds."""
        self._challenge = pack(Kind.CHALLENGE, der_of(self._us.certificate), self._spake.start())
        return self._challenge

    def check(self, content: bytes) -> bytes:
        """See whether the coordinator has proven that it knows the secret: the answer. Takes some ten milliseconds.

        Raises:
            Refused: it ends it.
            Garbled: that is no proof.
            Unproven: it does not know the secret.
        """
        theirs, proof = unpack(content, Kind.PROOF)
        keys = _derive(_finish(self._spake, theirs), self._hello.content, self._challenge, theirs)
        if not hmac.compare_digest(proof, keys.proof_of_coordinator()):
            raise Unproven
        self._keys = keys
        return pack(Kind.ANSWER, keys.proof_of_node(), _seal(keys.node_seal, 0, keys.said, self._us.name))

    def end(self, content: bytes) -> Party:
        """Hear that the coordinator trusts us: who it is.

        Raises:
            Refused: it does not.
            Garbled: that is something else.
            Unproven: somebody else says so.
        """
        assert self._keys is not None, "check() comes first"
        (sealed,) = unpack(content, Kind.KEPT)
        name = _unseal(self._keys.coordinator_seal, 0, self._keys.said, sealed)
        return Party(name, self._hello.certificate)

    def done(self) -> bytes:
        """Say that the coordinator is trusted now; only after ``end``."""
        assert self._keys is not None, "end() comes first"
        return pack(Kind.DONE, _seal(self._keys.node_seal, 1, self._keys.said, ""))


def _pem(certificate: bytes) -> bytes:
    """A stranger's certificate in PEM.

    Raises:
        Garbled: it is none of ours.
    """
    pem = ssl.DER_cert_to_PEM_cert(certificate).encode()
    try:
        home_of(pem)
    except UserError as error:
        raise Garbled(str(error)) from error
    return pem


def _spake(side: str, secret: bytes, coordinator: bytes, node: bytes) -> _Spake:
    from spake2 import SPAKE2_A, SPAKE2_B

    made = SPAKE2_A if side == "A" else SPAKE2_B
    first = LABEL + b" coordinator " + bytes.fromhex(fingerprint(coordinator))
    second = LABEL + b" node " + bytes.fromhex(fingerprint(node))
    return cast(_Spake, made(secret, idA=first, idB=second))


def _finish(spake: _Spake, theirs: bytes) -> bytes:
    from spake2.ed25519_basic import NotOnCurve
    from spake2.spake2 import SPAKEError

    if len(theirs) != _POINT_BYTES:
        raise Garbled("no SPAKE2 message")
    try:
        return spake.finish(theirs)
    except (SPAKEError, NotOnCurve, ValueError, AssertionError) as error:
        # No point of the group, or one that would give the key away.
        raise Garbled("no SPAKE2 message") from error


def _derive(key: bytes, hello: bytes, challenge: bytes, message: bytes) -> _Keys:
    """Keys for one purpose each, bound to all that was said."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    said = sha256(b"".join(sha256(part).digest() for part in (LABEL, hello, challenge, message))).digest()
    made = HKDF(SHA256(), length=4 * _KEY_BYTES, salt=said, info=LABEL + b" keys").derive(key)
    parts = [made[at : at + _KEY_BYTES] for at in range(0, len(made), _KEY_BYTES)]
    return _Keys(parts[0], parts[1], parts[2], parts[3], said)


def _seal(key: bytes, number: int, said: bytes, name: str) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    text = name.encode()[:MOST_NAME_BYTES]
    return AESGCM(key).encrypt(number.to_bytes(12, "big"), text, said)


def _unseal(key: bytes, number: int, said: bytes, sealed: bytes) -> str:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        text = AESGCM(key).decrypt(number.to_bytes(12, "big"), sealed, said)
    except (InvalidTag, ValueError) as error:
        raise Unproven from error
    return text[:MOST_NAME_BYTES].decode(errors="replace")
