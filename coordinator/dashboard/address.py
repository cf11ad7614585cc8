"""Where the dashboard listens, who may ask, and what is printed."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
from dataclasses import dataclass

from node.errors import UserError

PORT = 21700
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """An open door.

    Attributes:
        socket: listening.
        host: that was asked for.
        token: that must be shown; "" on loopback.
    """

    socket: socket.socket
    host: str
    token: str

    @property
    def url(self) -> str:
        """What to open in a browser; with the token where one is needed."""
        address, port = self.socket.getsockname()[:2]
        found = ipaddress.ip_address(address)
        name = socket.gethostname() if found.is_unspecified else f"[{address}]" if found.version == 6 else address
        return f"http://{name}:{port}/" + (f"?token={self.token}" if self.token else "")


def open_place(host: str | None, port: int | None, options: str = "--dashboard-") -> Place:
    """Listen.

    Args:
        host: a name or an address of this machine; None for loopback, which needs no token.
        port: None for the usual one, or a free one where that is taken.
        options: how the options begin that end in ``host`` and ``port``, for people.

    Raises:
        UserError: it cannot be listened there.
    """
    wanted = host or LOOPBACK
    try:
        address = socket.getaddrinfo(wanted, None, type=socket.SOCK_STREAM)[0][4][0]
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    except (OSError, ValueError) as error:
        raise UserError(f"{options}host {wanted}: not found; give an address of this machine") from error
    opened = _listen(wanted, str(address), family, port, options)
    token = "" if ipaddress.ip_address(address).is_loopback else secrets.token_urlsafe(24)
    return Place(opened, wanted, token)


def _listen(wanted: str, address: str, family: socket.AddressFamily, port: int | None, options: str) -> socket.socket:
    for number in (PORT, 0) if port is None else (port,):
        try:
            return socket.create_server((address, number), family=family)
        except OSError as error:
            if port is None and number and error.errno == errno.EADDRINUSE:
                continue
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"{options}port {number} is taken; choose another one") from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"{options}host {wanted}: this machine has no such address; give one of its own"
                ) from error
            # The error's own text repeats the address.
            reason = os.strerror(error.errno) if error.errno is not None else str(error)
            raise UserError(
                f"cannot listen on {wanted}, port {number}: {reason}; choose another {options}host or {options}port"
            ) from error
    raise AssertionError("a free port was tried")


def may_be_called(header: str, host: str, *, loopback: bool) -> bool:
    """Whether a request's ``Host`` names this server, and no foreign name that was made to point here.

    Addresses are safe: a page of a foreign name cannot carry them.

    Args:
        header: its value.
        host: that the server was told to listen on.
        loopback: whether only this machine can ask.
    """
    name = header.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
    try:
        return ipaddress.ip_address(name).is_loopback or not loopback
    except ValueError:
        own = socket.gethostname().lower()
        ours = {"localhost"} if loopback else {"localhost", host.lower(), own, f"{own.removesuffix('.local')}.local"}
        return name in ours
