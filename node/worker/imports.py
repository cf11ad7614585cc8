"""``mlx_lm`` without ``transformers``, which it imports for tokenizers: two thirds of a worker's start.

A worker is given tokens. Only a GGUF file's vocabulary needs a tokenizer, and then ``with_tokenizers`` brings it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_STOOD_IN_FOR = ("transformers", "transformers.tokenization_utils_base")


class _StandIn(ModuleType):
    """In a module's place while others are imported: whatever is taken from it is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__, "register": staticmethod(lambda *_, **__: None)})


def import_mlx_lm() -> None:
    """Import it without ``transformers``, which comes as it is where anybody imports it later."""
    if any(name in sys.modules for name in ("mlx_lm", *_STOOD_IN_FOR)):
        return
    for name in _STOOD_IN_FOR:
        sys.modules[name] = _StandIn(name)
    try:
        for name in ("mlx_lm.utils", "mlx_lm.tuner.utils", "mlx_lm.generate"):
            importlib.import_module(name)
    except (AttributeError, ImportError, TypeError):
        # Another version of it, which does more with what it imports.
        for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]
    finally:
        for name in _STOOD_IN_FOR:
            del sys.modules[name]


def with_tokenizers() -> None:
    """Have ``mlx_lm`` load tokenizers."""
    import transformers
    from mlx_lm import tokenizer_utils

    if tokenizer_utils.AutoTokenizer is not transformers.AutoTokenizer:
        importlib.reload(tokenizer_utils)
