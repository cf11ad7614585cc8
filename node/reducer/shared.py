"""Memory that worker and reducer share: anonymous, so that nothing is left behind however they end."""

from __future__ import annotations

import mmap
import os
import secrets


def create(size: int) -> int:
    """File descriptor of new shared memory of so many bytes; whoever holds it can ``attach``."""
    if hasattr(os, "memfd_create"):
        descriptor: int = os.memfd_create("tandem-reducer")
    else:
        # The public module of shared memory starts a process that tracks names; ours loses its name at once.
        import _posixshmem  # type: ignore[import-not-found]

        name = f"/tandem-{secrets.token_hex(8)}"
        descriptor = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        _posixshmem.shm_unlink(name)
    os.ftruncate(descriptor, size)
    return descriptor


def attach(descriptor: int, size: int) -> mmap.mmap:
    """The shared memory behind a descriptor, which is closed."""
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
