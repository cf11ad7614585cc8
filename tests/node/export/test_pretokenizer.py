from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from node.errors import UserError
from node.worker.gguf.pretokenizer import GPT2, GPT4O, KNOWN, LLAMA3, QWEN2, QWEN35, TEKKEN, pretokenizer_name

TEXT = "I've 12345 café_tests,\n\n  don't SHOUTloud; 你好 \u00bd 3.14 naïve\u0301 \t\n !!\r\n x"

# As the models' own tokenizer.json files hold them.
PUBLISHED = {
    "llama-bpe": (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    "qwen2": (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    "tekken": (
        "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
        "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
        "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    "gpt-4o": (
        "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(*, use_regex: bool = False, add_prefix_space: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def document(*steps: dict[str, Any], ignore_merges: bool = False, normalizer: Any = None) -> dict[str, Any]:
    pre: dict[str, Any] = {"type": "Sequence", "pretokenizers": list(steps)} if len(steps) != 1 else steps[0]
    return {"pre_tokenizer": pre, "normalizer": normalizer, "model": {"ignore_merges": ignore_merges}}


@pytest.mark.parametrize(
    ("name", "ignore_merges"), [("llama-bpe", True), ("qwen2", False), ("tekken", True), ("gpt-4o", False)]
)
def test_published_patterns_are_known(name: str, ignore_merges: bool) -> None:
    assert pretokenizer_name(document(split(PUBLISHED[name]), byte_level(), ignore_merges=ignore_merges)) == name


def test_byte_level_alone_is_gpt2() -> None:
    assert pretokenizer_name(document(byte_level(use_regex=True))) == "gpt-2"


def test_digits_before_byte_level_is_smollm() -> None:
    digits = {"type": "Digits", "individual_digits": True}
    assert pretokenizer_name(document(digits, byte_level(use_regex=True))) == "smollm"


def test_whole_words_before_merges_tell_two_names_apart() -> None:
    assert pretokenizer_name(document(split(LLAMA3), byte_level())) == "dbrx"


def test_removing_everything_else_is_isolating() -> None:
    removed = split(QWEN2) | {"behavior": "Removed", "invert": True}
    assert pretokenizer_name(document(removed, byte_level())) == "qwen2"


def test_composing_accents_is_let_through() -> None:
    assert pretokenizer_name(document(split(QWEN2), byte_level(), normalizer={"type": "NFC"})) == "qwen2"


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN, GPT4O])
def test_patterns_compile_and_cover_all_text(pattern: str) -> None:
    splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    assert "".join(piece for piece, _ in splitter.pre_tokenize_str(TEXT)) == TEXT


def test_byte_level_uses_the_pattern_we_take_it_for() -> None:
    plain = pre_tokenizers.Split(Regex(GPT2), "isolated")
    own = [span for _, span in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT)]
    assert [span for _, span in plain.pre_tokenize_str(TEXT)] == own


@pytest.mark.parametrize(
    "unknown",
    [
        document(split(r"\p{L}+|\p{N}{1,5}"), byte_level()),
        document({"type": "Digits", "individual_digits": False}, byte_level(use_regex=True)),
        document({"type": "Whitespace"}, byte_level()),
        document(split(QWEN2), byte_level(), ignore_merges=True),
        document(split(QWEN2) | {"behavior": "MergedWithNext"}, byte_level()),
        document(split(QWEN2), byte_level(use_regex=True)),
        document(byte_level()),
    ],
)
def test_what_is_not_known_is_refused(unknown: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no pre-tokenizer of llama\.cpp splits text as this model's does"):
        pretokenizer_name(unknown)


def test_a_space_in_front_is_refused() -> None:
    with pytest.raises(UserError, match="cannot put a space before"):
        pretokenizer_name(document(byte_level(use_regex=True, add_prefix_space=True)))


def test_lower_casing_is_refused() -> None:
    with pytest.raises(UserError, match="'Lowercase' normalization"):
        pretokenizer_name(document(byte_level(use_regex=True), normalizer={"type": "Lowercase"}))


def test_documents_are_read_as_tokenizers_writes_them() -> None:
    import json

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert pretokenizer_name(json.loads(tokenizer.to_str())) == "dbrx"


def test_every_name_stands_for_one_way() -> None:
    assert len(set(KNOWN.values())) == len(KNOWN)
