"""How long, how often and how fast a code may be tried; what a token is."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.errors import UserError
from node.pairing.secrets import CODE_SECONDS, CODE_TRIES, NoCode, Secret, parse_code, shown_code
from node.pairing.tokens import Joined, new_token, parse_token
from tests.fixtures.desks import Clock


def test_a_code_is_read_as_it_is_shown() -> None:
    digits = Secret.code().digits
    assert parse_code(shown_code(digits)) == parse_code(f" {digits} ") == digits
    for wrong in ("", "1234", "1234-567x", "123456789", "١٢٣٤٥٦٧٨"):
        with pytest.raises(NoCode, match="8 digits"):
            parse_code(wrong)


def test_wrong_tries_make_it_wait_longer_and_then_void_it() -> None:
    clock = Clock()
    code = Secret.code(clock)
    pauses = []
    for _ in range(CODE_TRIES):
        assert code.take()
        assert not code.take(), "no second try beside it"
        pauses.append(code.pause)
        clock.now += code.pause
    assert pauses == [1, 2, 4, 8, 16]
    assert code.spent == "tries"
    assert not code.take()
    assert not code.use()


def test_a_right_try_counts_for_nothing() -> None:
    code = Secret.code(Clock())
    for _ in range(20):
        assert code.take()
        code.give_back()
    assert code.use()
    assert code.spent == "used"
    assert not code.use()
    code.release()
    assert code.use()


def test_a_code_expires_and_a_token_does_not() -> None:
    clock = Clock()
    code, token = Secret.code(clock), Secret.of_token(new_token("ab" * 32), clock)
    clock.now += CODE_SECONDS - 1
    assert code.spent == ""
    clock.now += 1
    assert (code.spent, code.take()) == ("expired", False)
    for _ in range(100):
        assert token.take()
    assert token.spent == ""


def test_a_token_is_read_as_it_is_printed() -> None:
    token = new_token("ab" * 32)
    assert parse_token(str(token)) == token
    assert parse_token(f"  {str(token).upper().replace('-', ' ')}\n") == token
    assert token.of("ab" * 32)
    assert not token.of("ab" * 9 + "cd" * 23)
    assert token.secret.hex() not in repr(token)
    text = str(token)
    slip = ("b" if text[5] == "a" else "a").join((text[:5], text[6:]))
    for wrong in ("", text[:-1], slip, text + "a", "1" * 56, "é"):
        with pytest.raises(UserError, match="no token"):
            parse_token(wrong)


def test_used_tokens_are_remembered(tmp_path: Path) -> None:
    token, other = new_token("ab" * 32), new_token("ab" * 32)
    Joined(tmp_path).add(token)
    assert token in Joined(tmp_path)
    assert other not in Joined(tmp_path)
