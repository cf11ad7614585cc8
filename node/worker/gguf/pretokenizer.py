"""Which of llama.cpp's built-in splitters does what a byte-level tokenizer's ``pre_tokenizer`` does."""

from __future__ import annotations

from typing import Any

from node.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
GPT4O = rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}|\p{{N}}{{1,3}}|{_CASED_TAIL}"
DIGIT = r"\p{N}"
_CJK = "[一-龥ࠀ-一가-퟿]+"

# (patterns in the order they split, whether whole words skip the merges) -> llama.cpp's name.
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((QWEN35,), False): "qwen35",
    ((DIGIT, GPT2), False): "smollm",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, DIGIT), False): "deepseek-coder",
}


def pretokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for a byte-level tokenizer's way of splitting text into words.

    Args:
        tokenizer: the content of ``tokenizer.json``.

    Raises:
        UserError: llama.cpp would split text differently, or is not known to split it alike.
    """
    _check_normalizer(tokenizer.get("normalizer"))
    patterns = tuple(pattern for step in _steps(tokenizer.get("pre_tokenizer")) for pattern in _patterns(step))
    skips_merges = bool(tokenizer["model"].get("ignore_merges", False))
    name = KNOWN.get((patterns, skips_merges))
    if name is None:
        shown = " then ".join(patterns) or "nothing"
        raise UserError(f"--export-gguf: no pre-tokenizer of llama.cpp splits text as this model's does ({shown})")
    return name


def flat(part: dict[str, Any] | None, kind: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer's part, sequences within sequences opened; ``kind`` names a sequence's list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[kind] for step in flat(inner, kind)]
    return [part]


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    return flat(pre_tokenizer, "pretokenizers")


def _patterns(step: dict[str, Any]) -> list[str]:
    kind = step["type"]
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise UserError("--export-gguf: llama.cpp cannot put a space before the text of a byte-level tokenizer")
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [DIGIT]
    if kind == "Split" and "Regex" in step["pattern"]:
        isolated = step["behavior"] == "Isolated" and not step.get("invert")
        # Removing what lies between the matches of a pattern that matches everything isolates the matches.
        everything = step["behavior"] == "Removed" and bool(step.get("invert"))
        if isolated or everything:
            return [str(step["pattern"]["Regex"])]
    return [f"<{kind}>"]


def _check_normalizer(normalizer: dict[str, Any] | None) -> None:
    """llama.cpp has no normalisers; composing accents (NFC) is left out by all exporters, what changes text is not."""
    for step in flat(normalizer, "normalizers"):
        if step["type"] != "NFC":
            raise UserError(f"--export-gguf: llama.cpp cannot do this tokenizer's {step['type']!r} normalization")
