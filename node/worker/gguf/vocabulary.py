"""The tokenizer as GGUF keys: which kind of vocabulary it is, its tokens, and its special tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import gguf

from node.errors import UserError
from node.worker.gguf.pretokenizer import pretokenizer_name
from node.worker.gguf.sentencepiece import BYTE, SPACE, is_sentencepiece, merge_pair, scores, space_prefix

Kind = gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """Everything llama.cpp needs to tokenize alike.

    Attributes:
        model: ``llama`` (SentencePiece) or ``gpt2`` (byte-level BPE).
        pre: name of the splitter; ``default`` for SentencePiece.
        tokens, kinds: (rows,) text and type of each token, unused ids filled.
        scores: (rows,) for SentencePiece, else empty.
        merges: ``left right`` lines for byte-level BPE, else empty.
        special: token ids by ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad``.
        add_bos, add_eos: whether text gets them.
        add_space_prefix: whether text gets a space in front; only SentencePiece can.
        chat_template: one template, several with names, or None.
        strips_after_special: whether special tokens swallow the spaces after them.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | list[dict[str, str]] | None
    strips_after_special: bool

    def model_name(self, name: str) -> str:
        """The model's name, made so that llama.cpp strips spaces after special tokens exactly if the tokenizer does.

        llama.cpp decides that by looking for ``phi-3`` in the name, whatever its case.
        """
        marked = re.compile("phi-?3", re.IGNORECASE)
        if self.strips_after_special:
            return name if marked.search(name) else f"{name} (phi-3 tokenizer)".strip()
        return marked.sub("Phi 3", name)


def read_vocabulary(tokenizer: Any, config: dict[str, Any], rows: int) -> Vocabulary:
    """Read a Hugging Face tokenizer.

    Args:
        tokenizer: the tokenizer, or ``mlx_lm``'s wrapper of one.
        config: the model's configuration, for special ids that the tokenizer does not name.
        rows: of the embedding: the number of tokens that are written.

    Raises:
        UserError: llama.cpp has no vocabulary that would do the same.
    """
    tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("--export-gguf: the model has no tokenizer.json, or one that only its own Python code reads")
    document = json.loads(backend.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise UserError(f"--export-gguf: cannot write {model['type']} tokenizers for these models, only BPE")
    template = _chat_template(tokenizer)
    tokens, kinds = _tokens(document, rows)
    common: dict[str, Any] = {
        "tokens": tokens,
        "kinds": kinds,
        "special": _special(tokenizer, config, rows),
        "chat_template": template,
        "strips_after_special": any(token["rstrip"] and token["special"] for token in document["added_tokens"]),
        **_added_to_text(tokenizer),
    }
    if is_sentencepiece(document):
        ranked = scores(document)
        prefix = space_prefix(document, chat=template is not None)
        values = [_score(token, kind, ranked) for token, kind in zip(tokens, kinds, strict=True)]
        return Vocabulary("llama", "default", scores=values, merges=[], add_space_prefix=prefix, **common)
    merges = [merge_pair(merge) for merge in model["merges"]]
    if any(" " in part for pair in merges for part in pair):
        raise UserError("--export-gguf: this tokenizer merges raw text, not bytes; llama.cpp cannot do that")
    lines = [" ".join(pair) for pair in merges]
    name = pretokenizer_name(document)
    return Vocabulary("gpt2", name, scores=[], merges=lines, add_space_prefix=False, **common)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write a vocabulary's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tokens(document: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    model, added = document["model"], {token["id"]: token for token in document["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()}
    texts.update({number: token["content"] for number, token in added.items()})
    if texts and max(texts) >= rows:
        raise UserError(
            f"--export-gguf: the tokenizer has token {max(texts)} ({texts[max(texts)]!r}), but the model's embedding "
            f"has {rows} rows; give the model folder the tokenizer it was trained with"
        )
    sentencepiece = is_sentencepiece(document)
    tokens, kinds = [], []
    for number in range(rows):
        text, kind = texts.get(number), Kind.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", Kind.UNUSED
        elif text == model.get("unk_token") and sentencepiece:
            kind = Kind.UNKNOWN
        elif number in added:
            kind = Kind.CONTROL if added[number]["special"] else Kind.USER_DEFINED
            # llama.cpp looks for these in text before it marks the spaces.
            text = text.replace(SPACE, " ") if kind == Kind.USER_DEFINED else text
        elif sentencepiece and BYTE.fullmatch(text):
            kind = Kind.BYTE
        tokens.append(text)
        kinds.append(int(kind))
    twice = [text for text, count in Counter(tokens).items() if count > 1]
    if twice:
        raise UserError(f"--export-gguf: the tokenizer has token {twice[0]!r} twice; llama.cpp refuses such files")
    return tokens, kinds


def _score(token: str, kind: int, ranked: dict[str, float]) -> float:
    """Pieces that no merge makes come after all others."""
    if kind in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN, Kind.BYTE):
        return 0.0
    return ranked.get(token, -float(len(ranked)) - 1e6)


def _special(tokenizer: Any, config: dict[str, Any], rows: int) -> dict[str, int]:
    """Ids by llama.cpp's names. Other tokens that end a turn become ``eot`` and ``eom``."""
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    ends = config.get("eos_token_id")
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if found["eos"] is None and ends:
        found["eos"] = ends[0]
    others = [number for number in ends if number != found["eos"]]
    found.update(zip(("eot", "eom"), others, strict=False))
    if found["bos"] is None:
        # llama.cpp's default is token 11, whatever it is; the end of text does no harm, as it is never added.
        found["bos"] = config.get("bos_token_id") or found["eos"]
    return {name: int(number) for name, number in found.items() if isinstance(number, int) and 0 <= number < rows}


def _added_to_text(tokenizer: Any) -> dict[str, bool]:
    """What the tokenizer really puts around a text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    extra = len(full) - len(bare)
    add_bos = extra > 0 and full[0] == tokenizer.bos_token_id and full[1 : 1 + len(bare)] == bare
    add_eos = extra > 0 and full[-1] == tokenizer.eos_token_id and full[-1 - len(bare) : -1] == bare
    if extra != add_bos + add_eos:
        raise UserError("--export-gguf: this tokenizer puts more around a text than llama.cpp can (only bos and eos)")
    return {"add_bos": add_bos, "add_eos": add_eos}


def _chat_template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
