"""What of its environment a program hands down to its workers: what they need, and no secrets.

It is a list of what is allowed, because nobody can list all that is not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

HANDED_DOWN = frozenset(
    {
        # Where things are.
        "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TMP", "TEMP",
        "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_MODULES_CACHE", "XDG_CACHE_HOME", "XDG_DATA_HOME",
        # How text and time are written.
        "LANG", "LANGUAGE", "TZ", "__CF_USER_TEXT_ENCODING",
        # What the interpreter and the system's linker go by.
        "PYTHONPATH", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONFAULTHANDLER", "PYTHONDONTWRITEBYTECODE",
        "PYTHONPYCACHEPREFIX", "PYTHONUTF8", "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
        "DYLD_FALLBACK_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES",
        "TOKENIZERS_PARALLELISM",
    }
)  # fmt: skip
"""Variables that a worker gets where they are set."""
FAMILIES = (
    "LC_", "MLX_", "METAL_", "MTL_", "OMP_", "OPENBLAS_", "GOTO_", "BLAS_", "MKL_", "VECLIB_", "KMP_",
    "MALLOC_", "TANDEM_",
)  # fmt: skip
"""Beginnings of further ones: languages, MLX and its numerical libraries, the C library's heap, and our own."""
SECRET_WORDS = (
    "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "PAIRING",
)  # fmt: skip
"""No variable with one of these in its name is handed down, whatever family it belongs to."""
ALWAYS = {
    "PYTHONUNBUFFERED": "1",
    # A worker loads what it is given, and asks nobody on the network; nor does it read the user's token from its file.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""What a worker is told in any case."""
UNLESS_SET = {
    # On Linux MLX takes its arrays from the C library's heap, and each step frees what the next one asks for. A heap
    # that gives them back to the system in between pays in page faults: 8 to 15 % of a step were measured.
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""What a worker is told where nobody said otherwise."""


def handed_down(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a worker, from that of this process unless another one is given."""
    found = os.environ if given is None else given
    return UNLESS_SET | {name: value for name, value in found.items() if _is_handed_down(name)} | ALWAYS


def _is_handed_down(name: str) -> bool:
    secret = any(word in name.upper() for word in SECRET_WORDS)
    return name in HANDED_DOWN or (name.startswith(FAMILIES) and not secret)
