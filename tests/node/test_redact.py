from __future__ import annotations

from pathlib import Path

import pytest

from node.pairing.tokens import new_token
from node.redact import HIDDEN, redact, redact_arguments, redact_values

PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("with hf_abcdefghijklmnop it works", "hf_abcdefghijklmnop"),
        (f"key {PEM} end", "MC4CAQAw"),
        (repr(PEM), "MC4CAQAw"),
        ("coordinator pair Air --code 1234-5678", "1234-5678"),
        ("node serve --code=12345678 x", "12345678"),
        ("node serve --join abcdefgh", "abcdefgh"),
        ("WANDB_API_KEY=0123456789abcdef", "0123456789abcdef"),
        ("{'my_secret': 'sesame'}", "sesame"),
        ('"password": "sesame"', "sesame"),
        ("https://me:sesame@example.org/x", "sesame"),
        ("Authorization: Bearer sesame", "sesame"),
    ],
)
def test_secrets_go(text: str, secret: str) -> None:
    assert HIDDEN in redact(text)
    assert secret not in redact(text)


def test_a_token_goes_wherever_it_stands() -> None:
    token = str(new_token("cd" * 32))
    assert redact(f"{token} is used") == f"{HIDDEN} is used"
    assert redact(f"node serve --join {token}") == f"node serve --join{HIDDEN}"


def test_what_helps_stays_and_the_home_folder_has_no_name() -> None:
    text = "run 20261128-065801-6624: 120 tokens/s, max_tokens: 60, --join @file, 192.168.1.5:21617, 2026-11-28"
    assert redact(text) == text
    assert redact(f"{Path.home()}/models and {Path.home()}2") == f"~/models and {Path.home()}2"


def test_what_people_write_into_a_command_goes() -> None:
    given = ["generate", "--prompt", "my diary", "--system-prompt=my diary", "-p", "my diary", "--temp", "0.7"]
    assert "diary" not in " ".join(redact_arguments(given))
    assert redact_arguments(given)[-2:] == ["--temp", "0.7"]


def test_values_go_by_their_names_too() -> None:
    found = redact_values(
        {"hf_token": "abc", "tokens": 7, "max_tokens": "9", "list": ["1234-5678", 2.5], "secret": None}
    )
    assert found == {"hf_token": HIDDEN, "tokens": 7, "max_tokens": "9", "list": [HIDDEN, 2.5], "secret": None}
