"""Tokenizers converted from SentencePiece: what llama.cpp's ``llama`` vocabulary can say of them."""

from __future__ import annotations

import re
from typing import Any

from node.errors import UserError
from node.worker.gguf.pretokenizer import flat

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Share of pieces with a split that the tokenizer knows no merge for, up to which it counts as SentencePiece's work:
# converters have always lost a few, while a plainly trained BPE lacks most.
INCOMPLETE_SHARE = 0.01


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a ``tokenizer.json`` is a SentencePiece BPE model: raw characters, unknown ones as byte tokens."""
    return bool(tokenizer["model"].get("byte_fallback"))


def space_prefix(tokenizer: dict[str, Any], *, chat: bool) -> bool:
    """Whether text gets a space in front, as llama.cpp does it: at the start and after each special token.

    Args:
        tokenizer: the content of ``tokenizer.json``.
        chat: whether there is a chat template. It settles the case that llama.cpp lacks, a space at the very start
            only: a chat starts with a special token and never gets it.

    Raises:
        UserError: the text is changed in a way that llama.cpp cannot.
    """
    prefix = False
    marked = False
    for step in flat(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            marked = True
        else:
            raise UserError(f"--export-gguf: llama.cpp cannot do this tokenizer's {step['type']!r} normalization")
    for step in flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            marked = True
            scheme = step.get("prepend_scheme", "always")
            prefix = prefix or scheme == "always" or (scheme == "first" and not chat)
            _check_split(step, tokenizer["model"]["vocab"])
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise UserError(f"--export-gguf: llama.cpp cannot do this tokenizer's {step['type']!r} pre-tokenization")
    if not marked:
        raise UserError("--export-gguf: this tokenizer falls back to bytes but does not mark spaces; llama.cpp would")
    return prefix


def scores(tokenizer: dict[str, Any]) -> dict[str, float]:
    """A score for each piece that merges make: the earlier its merge, the higher.

    llama.cpp joins any two neighbours whose join is a piece, best score first. That is what the merges do when they
    hold every way to split a piece, as those converted from SentencePiece models do.

    Raises:
        UserError: the merges leave out too many splits, so llama.cpp would tokenize differently.
    """
    vocabulary = tokenizer["model"]["vocab"]
    merges = [merge_pair(merge) for merge in tokenizer["model"]["merges"]]
    known = set(merges)
    found: dict[str, float] = {}
    for rank, (left, right) in enumerate(merges):
        found.setdefault(left + right, -float(rank))
    incomplete = 0
    for piece in found:
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        incomplete += any(a in vocabulary and b in vocabulary and (a, b) not in known for a, b in splits)
    if incomplete > INCOMPLETE_SHARE * len(found):
        raise UserError(
            f"--export-gguf: {incomplete} of the tokenizer's {len(found)} merged pieces can be split in ways it has no "
            "merge for; llama.cpp would join those too, so it cannot stand for this tokenizer"
        )
    return found


def merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge's two sides, in either of the forms that ``tokenizer.json`` files have."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _check_split(step: dict[str, Any], vocabulary: dict[str, int]) -> None:
    """Splitting at spaces first is the same as not splitting, unless a piece reaches across one."""
    if step.get("split", True) and any(piece.find(SPACE, 1) > 0 for piece in vocabulary):
        raise UserError("--export-gguf: this tokenizer splits at spaces, though it has pieces with spaces inside")
