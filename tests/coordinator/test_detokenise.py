from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.detokenise import LONGEST_WAIT, UNKNOWN, WINDOW, TextStream
from coordinator.prompts import Prompter
from tests.fixtures.spm import spm_bpe
from tests.fixtures.tokenizers import byte_bpe

TEXT = (
    "Straße, naïve café: 世界 🎉👩‍👩‍👧  two  spaces\n\n\tindent , comma . The quick brown fox — “quoted” 東京 ≠ Ω. " * 4
)


@pytest.fixture(params=["byte", "spm"])
def prompter(request: pytest.FixtureRequest, tmp_path: Path) -> Prompter:
    (byte_bpe if request.param == "byte" else spm_bpe)(tmp_path)
    return Prompter(tmp_path)


def test_pieces_add_up_to_the_decoded_whole(prompter: Prompter) -> None:
    tokens = prompter._tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(tokens) > 3 * WINDOW
    stream = TextStream(prompter.decode)
    pieces = [stream.add([token]) for token in tokens]
    pieces.append(stream.finish())
    assert "".join(pieces) == prompter.decode(tokens)
    assert not any(UNKNOWN in piece for piece in pieces)
    # Characters of several tokens are waited for, and everything else comes at once.
    assert sum(bool(piece) for piece in pieces) > len(tokens) / 3


def test_several_tokens_at_a_time_give_the_same_text(prompter: Prompter) -> None:
    tokens = prompter._tokenizer.encode(TEXT, add_special_tokens=False)
    stream = TextStream(prompter.decode)
    text = "".join(stream.add(tokens[i : i + 7]) for i in range(0, len(tokens), 7))
    assert text + stream.finish() == prompter.decode(tokens)


def test_a_continuation_keeps_the_space_before_its_first_word(prompter: Prompter) -> None:
    whole = prompter._tokenizer.encode("the quick brown fox", add_special_tokens=False)
    for cut in range(1, len(whole)):
        stream = TextStream(prompter.decode, whole[:cut])
        rest = "".join(stream.add([token]) for token in whole[cut:]) + stream.finish()
        assert prompter.decode(whole[:cut]) + rest == prompter.decode(whole)


def test_special_tokens_are_not_text(prompter: Prompter) -> None:
    stop = prompter.stop[0]
    word = prompter._tokenizer.encode("fox", add_special_tokens=False)
    stream = TextStream(prompter.decode)
    assert "".join(stream.add([token]) for token in [stop, *word, stop]) + stream.finish() == prompter.decode(word)


def test_bytes_that_are_no_text_hold_nothing_up() -> None:
    calls = []

    def decode(tokens: Sequence[int]) -> str:
        calls.append(len(tokens))
        return UNKNOWN * len(tokens)

    stream = TextStream(decode)
    pieces = [stream.add([0]) for _ in range(50 * LONGEST_WAIT)]
    assert "".join(pieces) + stream.finish() == UNKNOWN * 50 * LONGEST_WAIT
    assert sum(bool(piece) for piece in pieces) == 50
    assert max(calls) <= 5 * WINDOW  # the cost of a token stays bounded
