"""JSON files that somebody else has written: of a bearable size, whole, and an object."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from node.errors import UserError, one_line
from node.sizes import show_size

MOST_CONFIG_BYTES = 16 << 20
"""Of a file of settings."""
MOST_INDEX_BYTES = 128 << 20
"""Of an index of weights."""
MOST_TOKENIZER_BYTES = 512 << 20
"""Of a tokenizer."""


def read_json(path: Path, most_bytes: int = MOST_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is larger than such a file can be, is no JSON or holds something else.
    """
    try:
        found_here = path.stat()
        if not stat.S_ISREG(found_here.st_mode):
            raise UserError(f"{path}: no ordinary file; copy it again from where it came from")
        size = found_here.st_size
        if size > most_bytes:
            raise UserError(
                f"{path}: {show_size(size)} are more than such a file has (at most {show_size(most_bytes)});"
                " copy it again from where it came from"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: not readable as JSON ({error.strerror})") from error
    except RecursionError as error:
        raise UserError(f"{path}: not readable as JSON (nested too deeply); copy it again") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({one_line(error)}); copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return found
