from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.data.formats import kind_of_row, row_of
from coordinator.data.rows import BadRow, Features, Row
from coordinator.data.tokenise import RowTokeniser, TokenisedRow, TokeniseOptions
from coordinator.data.tokenizer import load_tokenizer
from node.errors import UserError
from tests.coordinator.data.helpers import chat, tokeniser

GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Closes a conversation in a way of its own, as Phi-3's does.
CLOSING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# Renders the last answer with an empty thought and earlier ones without, as Qwen3's does.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system prompt moves to the last question, as in some of Mistral's.
MOVING = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.index0 >= messages | length - 2 and m['role'] == 'user' %}{{ 'SYSTEM ' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JOINING = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for c in m.get('tool_calls', []) %}"
    "{{ c['function']['name'] + '(' + c['function']['arguments'] + ')' }}{% endfor %}{{ m.get('content', '') }}"
    "{{ '<|im_end|>' }}{% endfor %}"
)

QUESTION_LAST = chat("a", "b", "only a question")
ROWS: list[dict[str, Any]] = [
    {"text": "The quick brown fox."},
    {"text": "Ends by itself<|im_end|>"},
    chat("What is 2+2?", "4"),
    chat("a", "b", "c", "d"),
    QUESTION_LAST,
    {"prompt": "Capital of France?", "completion": " Paris"},
    {"messages": [{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"]]},
]


def parsed(row: dict[str, Any]) -> Row:
    return row_of(row, kind_of_row(row, Features()), Features())


def trained(tokeniser: RowTokeniser, row: TokenisedRow) -> list[str]:
    """The texts that are trained on."""
    spans = row.spans.reshape(-1, 2).tolist()
    return [tokeniser.tokenizer.decode(row.tokens[start:end].tolist()) for start, end in spans]


@pytest.mark.parametrize("mask", ["all", "prompt"])
@pytest.mark.parametrize("row", ROWS)
def test_tokens_and_targets_are_those_of_mlx_lm(tmp_path: Path, row: dict[str, Any], mask: Any) -> None:
    from types import SimpleNamespace

    from mlx_lm.tokenizer_utils import load
    from mlx_lm.tuner.datasets import create_dataset

    if mask == "prompt" and "text" in row:
        pytest.skip("refused by both")
    ours = tokeniser(tmp_path, mask).row(parsed(row))
    theirs = create_dataset([row], load(tmp_path), SimpleNamespace(mask_prompt=mask == "prompt"))
    tokens, offset = theirs.process(theirs[0])
    assert ours.tokens.tolist() == list(tokens)
    if mask == "prompt" and row == QUESTION_LAST:
        assert ours.spans.tolist() == [], "mlx_lm would train on the question"
    else:
        assert ours.spans.tolist() == [max(1, offset), len(tokens)]


def test_the_same_for_a_tokenizer_that_adds_a_beginning(tmp_path: Path) -> None:
    from mlx_lm.tokenizer_utils import load
    from mlx_lm.tuner.datasets import TextDataset

    from tests.fixtures.spm import spm_bpe

    spm_bpe(tmp_path, style="llama")
    ours = RowTokeniser(load_tokenizer(tmp_path), TokeniseOptions(), "m").row(Row("text", "A small satz."))
    theirs, _ = TextDataset([], load(tmp_path)).process({"text": "A small satz."})
    assert ours.tokens.tolist() == list(theirs)


def test_only_the_answer_is_trained_on_with_a_masked_prompt(tmp_path: Path) -> None:
    rows = tokeniser(tmp_path, "prompt")
    assert trained(rows, rows.row(parsed(chat("a", "b", "c", "d")))) == ["d<|im_end|>\n"]
    assert trained(rows, rows.row(parsed({"messages": [{"role": "assistant", "content": "b"}]})))[0].endswith(
        "b<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (True, ["b<|im_end|>\n", "d<|im_end|>\n"]),
        (GENERATION, ["b<|im_end|>", "d<|im_end|>"]),
        (CLOSING, ["b<|im_end|>", "d<|im_end|>\n<|endoftext|>"]),
        (THINKING, ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>\n"]),
    ],
)
def test_every_turn_of_the_assistant_is_trained_on(tmp_path: Path, template: bool | str, expected: list[str]) -> None:
    rows = tokeniser(tmp_path, "assistant", template=template)
    row = rows.row(parsed(chat("a", "b", "c", "d")))
    assert trained(rows, row) == expected
    whole = tokeniser(tmp_path, "all", template=template).row(parsed(chat("a", "b", "c", "d")))
    assert row.tokens.tolist() == whole.tokens.tolist()


def test_a_turn_without_exact_boundaries_is_refused(tmp_path: Path) -> None:
    rows = tokeniser(tmp_path, "assistant", template=MOVING)
    assert trained(rows, rows.row(parsed(chat("a", "b")))) == ["b<|im_end|>\n"]
    with pytest.raises(BadRow, match="no exact start; use --mask-prompt"):
        rows.row(parsed(chat("a", "b", "c", "d")))
    with pytest.raises(BadRow, match="begins with the assistant"):
        rows.row(parsed({"messages": [{"role": "assistant", "content": "b"}]}))


def test_a_token_across_the_boundary_is_refused(tmp_path: Path) -> None:
    glued = (
        "{% for m in messages %}{{ 'th' if m['role'] == 'user' else m['content'] }}{% endfor %}"
        "{{ '' if add_generation_prompt else '<|im_end|>' }}"
    )
    rows = tokeniser(tmp_path, "assistant", template=glued)
    assert len(rows.tokenizer.encode("the")) < len(rows.tokenizer.encode("th")) + len(rows.tokenizer.encode("e"))
    with pytest.raises(BadRow, match="reaches across"):
        rows.row(parsed(chat("a", "e")))


def test_a_conversation_without_an_answer_has_no_targets_for_the_assistant(tmp_path: Path) -> None:
    assert tokeniser(tmp_path, "assistant").row(parsed(chat("a"))).spans.tolist() == []


def test_rows_are_cut_and_spans_with_them(tmp_path: Path) -> None:
    row = parsed(chat("a", "b", "c", "d" * 50))
    whole = tokeniser(tmp_path, "assistant").row(row)
    second = int(whole.spans[2])
    cut = tokeniser(tmp_path, "assistant", max_seq_length=second + 3).row(row)
    assert cut.tokens.tolist() == whole.tokens[: second + 3].tolist()
    assert cut.spans.tolist() == [*whole.spans[:3].tolist(), second + 3]
    assert cut.cut
    assert not whole.cut
    gone = tokeniser(tmp_path, "assistant", max_seq_length=5).row(row)
    assert gone.spans.tolist() == []


def test_an_empty_text_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    row = tokeniser(tmp_path).row(Row("text", ""))
    assert len(row.tokens) == 1
    assert row.spans.tolist() == []
    assert row.tokens.dtype == row.spans.dtype == np.int32


@pytest.mark.parametrize("mask", ["prompt", "assistant"])
def test_masks_need_a_prompt(tmp_path: Path, mask: Any) -> None:
    with pytest.raises(UserError, match="needs chat or completions data"):
        tokeniser(tmp_path, mask).row(Row("text", "a"))


def test_chat_needs_a_template_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model has no chat template.*use its instruct version"):
        tokeniser(tmp_path, template=False).row(parsed(chat("a", "b")))


def test_what_the_template_refuses_is_a_bad_row(tmp_path: Path) -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match="the chat template refuses it: roles must alternate"):
        tokeniser(tmp_path, template=refusing).row(parsed(chat("a", "b")))


def test_templates_that_join_arguments_get_them_as_text(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    row = parsed({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    rows = tokeniser(tmp_path, template=JOINING)
    assert rows.tokenizer.decode(rows.row(row).tokens.tolist()) == 'assistant:add({"a": 1})<|im_end|>'


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{{ tools[0]['function']['name'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = tokeniser(tmp_path, template=template)
    tool = {"type": "function", "function": {"name": "subtract"}}
    row = rows.row(parsed({**chat("a", "b"), "tools": [tool]}))
    assert rows.tokenizer.decode(row.tokens.tolist()) == "subtractab"


def test_a_missing_or_broken_tokenizer_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match=r"cannot load the tokenizer|has no tokens"):
        load_tokenizer(tmp_path)
    tokeniser(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json: not readable as JSON"):
        load_tokenizer(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps({"model": {"type": "Nothing"}}))
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "a")


def test_a_length_below_two_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="--max-seq-length"):
        TokeniseOptions(max_seq_length=1)
