from __future__ import annotations

from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from node.worker.modelfile import modelfile
from tests.fixtures.spm import spm_bpe
from tests.fixtures.tokenizers import byte_bpe

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def written(folder: Path, template: str | None = None) -> str:
    byte_bpe(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return modelfile("m.gguf", load_tokenizer(folder))


def test_chatml(tmp_path: Path) -> None:
    assert written(tmp_path) == (
        "FROM ./m.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}"
        '<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_default_system_turn(tmp_path: Path) -> None:
    text = written(tmp_path, CHATML)
    assert 'SYSTEM """Be kind."""\n' in text
    assert "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}" in text


def test_no_system_turn(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}"
        "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    text = written(tmp_path, template)
    assert ".System" not in text
    assert (
        text.replace("{{ end }}", "").split('"""')[1]
        == "{{ if .Prompt }}[INST] {{ .Prompt }} [/INST]{{ .Response }}<|im_end|>"
    )


@pytest.mark.parametrize(
    "template",
    [
        # The first user turn differs from the others.
        "{% for m in messages %}{{ '#' if loop.first else '##' }}{{ m.role + m.content + '.' }}{% endfor %}A:",
        # What an answer begins with is not asked for.
        "{% for m in messages %}{{ m.role + ' ' + m.content + ';' }}{% endfor %}assistant",
        # Earlier answers are shortened.
        "{% for m in messages %}<{{ m.role }}>{{ m.content[:3] }}</{{ m.role }}>{% endfor %}<assistant>",
        # Go's template marks as text.
        "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '.' }}{% endfor %}{{ '{{assistant}}' }}",
        "{{ raise_exception('never') }}",
    ],
)
def test_templates_that_are_more_than_text_around_turns_are_left_to_ollama(tmp_path: Path, template: str) -> None:
    assert written(tmp_path, template) == 'FROM ./m.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_no_template_at_all(tmp_path: Path) -> None:
    spm_bpe(tmp_path, chat_template=False)
    assert modelfile("m.gguf", load_tokenizer(tmp_path)) == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


def test_every_end_of_text_stops(tmp_path: Path) -> None:
    byte_bpe(tmp_path)
    tokenizer = load_tokenizer(tmp_path, eos_token_ids=[0, 2])
    assert modelfile("m.gguf", tokenizer).endswith('PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n')


def test_the_end_of_an_answer_stops_too(tmp_path: Path) -> None:
    spm_bpe(tmp_path, style="phi3")
    assert 'PARAMETER stop "<|end|>"\n' in modelfile("m.gguf", load_tokenizer(tmp_path))
