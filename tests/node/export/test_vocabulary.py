from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from mlx_lm.utils import load_tokenizer

from node.errors import UserError
from node.worker.gguf.sentencepiece import SPACE, space_prefix
from node.worker.gguf.vocabulary import Vocabulary, read_vocabulary
from tests.fixtures.spm import spm_bpe
from tests.fixtures.tokenizers import byte_bpe

ROWS = 512
Edit = Callable[[dict[str, Any]], None]


def edit(path: Path, change: Edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read(folder: Path, rows: int = ROWS, **config: Any) -> Vocabulary:
    return read_vocabulary(load_tokenizer(folder, eos_token_ids=config.get("eos_token_id")), config, rows)


def spm(folder: Path, style: Any = "llama", **options: Any) -> Path:
    spm_bpe(folder, style=style, **options)
    return folder


def byte(folder: Path) -> Path:
    byte_bpe(folder)
    return folder


def spm_tokens(vocabulary: Vocabulary, text: str) -> list[str]:
    """llama.cpp's way with SentencePiece vocabularies: join the neighbours whose join scores best, leftmost first."""
    score = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    pieces = list((" " if vocabulary.add_space_prefix else "") + text)
    pieces = [SPACE if piece == " " else piece for piece in pieces]
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    found = []
    for piece in pieces:
        found += [piece] if piece in score else [f"<0x{byte:02X}>" for byte in piece.encode()]
    return found


@pytest.mark.parametrize("style", ["llama", "gemma", "phi3"])
@pytest.mark.parametrize(
    "text",
    ["The quick brown fox", "What is the capital of  France? 2024", "größer\nals \u4f60\u597d", "  two", "x" * 9],
)
def test_scores_join_pieces_as_the_merges_do(tmp_path: Path, style: str, text: str) -> None:
    folder = spm(tmp_path, style)
    tokenizer = load_tokenizer(folder)
    expected = tokenizer._tokenizer.tokenize(text)
    assert spm_tokens(read(folder), text) == expected


def test_sentencepiece_types(tmp_path: Path) -> None:
    vocabulary = read(spm(tmp_path))
    assert (vocabulary.model, vocabulary.pre) == ("llama", "default")
    kinds = dict(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
    assert kinds["<unk>"] == gguf.TokenType.UNKNOWN
    assert kinds["<s>"] == gguf.TokenType.CONTROL
    assert kinds["<0x0A>"] == gguf.TokenType.BYTE
    assert kinds["e"] == kinds[f"{SPACE}the"] == gguf.TokenType.NORMAL
    assert kinds[f"[PAD{ROWS - 1}]"] == gguf.TokenType.UNUSED
    assert len(vocabulary.tokens) == len(vocabulary.scores) == ROWS
    assert sum(kind == gguf.TokenType.BYTE for kind in vocabulary.kinds) == 256


def test_user_defined_tokens_hold_plain_spaces(tmp_path: Path) -> None:
    folder = spm(tmp_path)
    token = {"id": 500, "content": f"{SPACE}{SPACE}", "special": False, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    edit(folder / "tokenizer.json", lambda content: content["added_tokens"].append(token | flags))
    vocabulary = read(folder)
    assert vocabulary.kinds[vocabulary.tokens.index("  ")] == gguf.TokenType.USER_DEFINED


def test_byte_level_tokens_and_merges(tmp_path: Path) -> None:
    folder = byte(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = read(folder)
    assert (vocabulary.model, vocabulary.pre, vocabulary.scores) == ("gpt2", "gpt-2", [])
    assert [line.split(" ") for line in vocabulary.merges] == document["model"]["merges"]
    for text, number in document["model"]["vocab"].items():
        assert vocabulary.tokens[number] == text
    assert vocabulary.kinds[vocabulary.tokens.index("<|im_end|>")] == gguf.TokenType.CONTROL
    assert vocabulary.special["eos"] == vocabulary.tokens.index("<|im_end|>")
    assert vocabulary.special["pad"] == vocabulary.tokens.index("<|endoftext|>")
    assert not vocabulary.add_bos
    assert not vocabulary.add_space_prefix


def test_other_ends_become_eot_and_eom(tmp_path: Path) -> None:
    vocabulary = read(spm(tmp_path, "phi3"), eos_token_id=[2, 7, 9])
    eos = vocabulary.tokens.index("<|endoftext|>")
    assert vocabulary.special["eos"] == eos
    assert (vocabulary.special["eot"], vocabulary.special["eom"]) == (2, 7)


@pytest.mark.parametrize(("style", "prefix"), [("llama", True), ("phi3", True), ("gemma", False)])
def test_space_in_front(tmp_path: Path, style: str, prefix: bool) -> None:
    vocabulary = read(spm(tmp_path, style))
    assert vocabulary.add_space_prefix is prefix
    assert vocabulary.add_bos
    assert not vocabulary.add_eos


@pytest.mark.parametrize(
    ("scheme", "chat", "prefix"),
    [("always", True, True), ("never", False, False), ("first", True, False), ("first", False, True)],
)
def test_metaspace_schemes(scheme: str, chat: bool, prefix: bool) -> None:
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    document: dict[str, Any] = {"normalizer": None, "pre_tokenizer": metaspace, "model": {"vocab": {}}}
    assert space_prefix(document, chat=chat) is prefix


def test_eos_after_text(tmp_path: Path) -> None:
    folder = spm(tmp_path)

    def end(content: dict[str, Any]) -> None:
        content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}

    edit(folder / "tokenizer.json", end)
    edit(folder / "tokenizer_config.json", lambda content: content.update(add_eos_token=True))
    vocabulary = read(folder)
    assert vocabulary.add_bos
    assert vocabulary.add_eos


def test_several_chat_templates(tmp_path: Path) -> None:
    folder = byte(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    templates = read(folder).chat_template
    assert isinstance(templates, list)
    assert {entry["name"] for entry in templates} == {"default", "tools"}


def test_the_name_tells_llama_cpp_whether_special_tokens_swallow_spaces(tmp_path: Path) -> None:
    folder = spm(tmp_path, "phi3")
    assert read(folder).model_name("Phi-3-mini") == "Phi 3-mini"

    def strip(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            token["rstrip"] = True

    edit(folder / "tokenizer.json", strip)
    edit(folder / "tokenizer_config.json", lambda content: content.pop("added_tokens_decoder"))
    assert read(folder).model_name("Phi-3-mini") == "Phi-3-mini"
    assert read(folder).model_name("mine") == "mine (phi-3 tokenizer)"


def _unigram(content: dict[str, Any]) -> None:
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    content["post_processor"] = None
    content["added_tokens"] = []


def _without_marks(content: dict[str, Any]) -> None:
    content["normalizer"] = None


def _nfkc(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFKC"}


def _one_split_each(content: dict[str, Any]) -> None:
    """As a BPE that was trained and not converted: one merge per piece."""
    first: dict[str, list[str]] = {}
    for left, right in content["model"]["merges"]:
        first.setdefault(left + right, [left, right])
    content["model"]["merges"] = list(first.values())


def _odd_frame(content: dict[str, Any]) -> None:
    content["post_processor"]["single"].append({"SpecialToken": {"id": "<s>", "type_id": 0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unigram, "cannot write Unigram tokenizers"),
        (_without_marks, "does not mark spaces"),
        (_nfkc, "'NFKC' normalization"),
        (_one_split_each, "merged pieces can be split in ways it has no merge for"),
        (_odd_frame, "puts more around a text than llama.cpp can"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path: Path, change: Edit, message: str) -> None:
    folder = spm(tmp_path)
    edit(folder / "tokenizer.json", change)
    with pytest.raises(UserError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has token \d+ .* but the model's embedding has 300 rows"):
        read(spm(tmp_path), rows=300)


def test_a_token_twice_is_refused(tmp_path: Path) -> None:
    folder = spm(tmp_path)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False, "normalized": False}
    edit(
        folder / "tokenizer.json",
        lambda content: content["added_tokens"].append({"id": 500, "content": f"[PAD{ROWS - 1}]"} | flags),
    )
    with pytest.raises(UserError, match="twice"):
        read(folder)
