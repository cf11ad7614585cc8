"""Whom this program talks to: its own home, the paired, and for a job the machines that its coordinator introduces."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

from node.errors import UserError
from node.identity import Credentials, credentials
from node.peers import Peers, certificate_of, fingerprint, home_of

LOOK_SECONDS = 1.0
"""Between two looks at who is paired: so long a machine that was forgotten may go on."""
MOST_INTRODUCED = 128


class Standing(Enum):
    """What a machine may ask of us."""

    OWN = "own"
    """A program of our own home: everything."""
    PAIRED = "paired"
    """A machine that a person has paired: everything but the owner's wishes."""
    INTRODUCED = "introduced"
    """A machine of the job at hand, named by its coordinator: the model's files, and its end of the group."""


_HIGHER = {
    Standing.INTRODUCED: (Standing.PAIRED, Standing.OWN),
    Standing.PAIRED: (Standing.OWN,),
    Standing.OWN: (),
}


class Trust:
    """Decides who is who; for all threads.

    Args:
        home: the ``TANDEM_HOME``.
    """

    def __init__(self, home: Path) -> None:
        self.credentials: Credentials = credentials(home)
        self.peers = Peers(home)
        self._own = fingerprint(self.credentials.certificate)
        self._lock = threading.Lock()
        self._introduced: dict[str, bytes] = {}
        self._revoked: list[Callable[[str], object]] = []
        self._known: dict[str, Standing] = self._standings()
        """What was granted, or could have been, when it was last looked."""

    def standing(self, mark: str) -> Standing | None:
        """What the machine with the certificate of this fingerprint may ask; None for strangers."""
        paired = self.peers.with_fingerprint(mark) is not None
        with self._lock:
            if mark == self._own:
                granted = Standing.OWN
            elif paired:
                granted = Standing.PAIRED
            elif mark in self._introduced:
                granted = Standing.INTRODUCED
            else:
                return None
            # Whoever is paired and forgotten between two looks is to be told of, too.
            self._known[mark] = granted
            return granted

    def certificates(self) -> tuple[bytes, ...]:
        """Of all that are trusted, in PEM."""
        paired = tuple(peer.certificate.encode() for peer in self.peers.all())
        with self._lock:
            return (self.credentials.certificate, *paired, *self._introduced.values())

    def certificate_of(self, home: str) -> bytes | None:
        """The certificate by which the home of this id is known, paired or our own."""
        return certificate_of(home, self.credentials, self.peers)

    def introduce(self, certificates: Sequence[bytes]) -> None:
        """Let these, and no others, be the machines of the job at hand.

        Raises:
            UserError: one is no certificate of ours, or they are too many.
        """
        if len(certificates) > MOST_INTRODUCED:
            raise UserError(f"{len(certificates)} machines for one job; {MOST_INTRODUCED} are the most")
        introduced = {}
        for certificate in certificates:
            home_of(certificate)
            introduced[fingerprint(certificate)] = certificate
        with self._lock:
            self._introduced = introduced
        self.look()

    # --- who is trusted no more -------------------------------------------------------------------------------------

    def on_revoked(self, tell: Callable[[str], object]) -> Callable[[], None]:
        """Have the fingerprints told of who is trusted no more; what is returned ends that."""
        self._revoked.append(tell)

        def end() -> None:
            with contextlib.suppress(ValueError):
                self._revoked.remove(tell)

        return end

    def look(self) -> None:
        """See who is trusted no more, or less, and tell; all are told, whatever one of them raises."""
        now = self._standings()
        with self._lock:
            before, self._known = self._known, now
        with contextlib.ExitStack() as telling:
            for mark, granted in before.items():
                if now.get(mark) not in (granted, *_HIGHER[granted]):
                    for tell in tuple(self._revoked):
                        telling.callback(tell, mark)

    async def watch(self) -> None:
        """Look from time to time, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def _standings(self) -> dict[str, Standing]:
        paired = {peer.fingerprint: Standing.PAIRED for peer in self.peers.all()}
        with self._lock:
            introduced = dict.fromkeys(self._introduced, Standing.INTRODUCED)
        return introduced | paired | {self._own: Standing.OWN}

    # --- TLS for sockets of our own ---------------------------------------------------------------------------------

    def context(self, *, server: bool, peers: Sequence[bytes] | None = None) -> ssl.SSLContext:
        """TLS 1.3 with our certificate, for whoever proves to have one of ``peers``.

        Args:
            server: for the side that is connected to.
            peers: certificates in PEM; None takes all that are trusted.
        """
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        # A certificate is known by itself; the name in it says no more.
        made.check_hostname = False
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_cert_chain(self.credentials.certificate_path, self.credentials.key_path)
        trusted = self.certificates() if peers is None else peers
        made.load_verify_locations(cadata=b"\n".join(trusted).decode())
        if server:
            made.num_tickets = 0  # no connection is taken up again, and none after it was revoked
        return made


async def certificate_at(address: str, seconds: float) -> bytes:
    """The certificate of whoever serves at an address, in PEM. It proves nothing before somebody talks by it.

    Args:
        address: ``host:port``.
        seconds: for the answer.

    Raises:
        OSError: nobody serves there, or not by TLS 1.3.
        TimeoutError: nobody answers.
    """
    asking = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asking.minimum_version = ssl.TLSVersion.TLSv1_3
    asking.check_hostname = False
    asking.verify_mode = ssl.CERT_NONE
    asking.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(seconds):
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=asking)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    return ssl.DER_cert_to_PEM_cert(shown).encode()
