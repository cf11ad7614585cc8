from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from coordinator.cli import coordinator
from coordinator.generation import Answer, Chat, GenerateOptions, answers, open_session
from coordinator.workers import Quiet
from node.clikit import run_cli
from node.errors import UserError
from tests.fixtures.adapters import random_adapter
from tests.fixtures.models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and an adapter of it, and one without a template."""
    folder = tmp_path_factory.mktemp("generation")
    tiny_model(folder / "model", "qwen2")
    tiny_model(folder / "plain", "llama", chat_template=False)
    tiny_model(folder / "narrow", "llama", vocab_size=64)
    random_adapter(folder / "adapter", folder / "model")
    return folder


def answered(*prompts: str, **options: Any) -> tuple[Answer, ...]:
    return asyncio.run(answers(GenerateOptions(prompts=prompts, **options), Quiet()))


def greedy(model: Path, adapter: Path | None, tokens: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token from a whole forward pass."""
    loaded = mlx_lm.load(str(model), adapter_path=str(adapter) if adapter else None)[0]
    end = json.loads((model / "config.json").read_text())["eos_token_id"]
    new: list[int] = []
    while len(new) < count:
        token = int(mx.argmax(loaded(mx.array([tokens + new]))[0, -1]).item())
        if token == end:
            break
        new.append(token)
    return new


def test_answers_are_the_models_own_continuations(folder: Path) -> None:
    first, second = answered("Hello", "Good morning", adapter_path=str(folder / "adapter"), max_tokens=12)
    tokenizer = mlx_lm.load(str(folder / "model"))[1]
    for answer, prompt in ((first, "Hello"), (second, "Good morning")):
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        new = greedy(folder / "model", folder / "adapter", tokens, 12)
        assert answer.prompt == prompt
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
        assert answer.tokens == len(new)
        assert answer.finish_reason == ("length" if len(new) == 12 else "stop")
        assert answer.prompt_tokens == len(tokens)
        assert answer.tokens_per_second > 0
    (alone,) = answered("Hello", model=str(folder / "model"), max_tokens=12)
    assert alone.text != first.text


def test_sampling_follows_the_seed(folder: Path) -> None:
    sampled: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "top_k": 50, "min_p": 0.001, "max_tokens": 16}
    model = str(folder / "model")
    one, two = answered("Hello", "Hello", model=model, seed=5, **sampled)
    assert one.text == two.text
    (other,) = answered("Hello", model=model, seed=6, **sampled)
    assert other.text != one.text


def test_a_model_without_template_continues_plain_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n"))
    command = ["generate", "--model", str(folder / "plain"), "-p", "The fox", "-p", "-", "-m", "9", "--json"]
    assert run_cli(coordinator, command) == 0
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines())
    assert printed.err.count("no chat template") == 1
    assert second["prompt"] == "Once upon a time"
    tokenizer = mlx_lm.load(str(folder / "plain"))[1]
    new = greedy(folder / "plain", None, tokenizer.encode("The fox"), 9)
    assert first["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert set(first) == {
        "prompt",
        "text",
        "tokens",
        "finish_reason",
        "prompt_tokens",
        "tokens_per_second",
        "prompt_tokens_per_second",
    }


def test_a_pasted_mlx_lm_command_line_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", str(folder / "model"), "--prompt", "Hello", "--max-tokens", "6", "--temp", "0.0"]
    command += [
        "--top-p",
        "1.0",
        "--seed",
        "1",
        "--ignore-chat-template",
        "--prefill-step-size",
        "512",
        "--kv-bits",
        "8",
    ]
    assert run_cli(coordinator, command) == 0
    printed = capsys.readouterr()
    tokenizer = mlx_lm.load(str(folder / "model"))[1]
    tokens = tokenizer.encode("Hello")
    new = greedy(folder / "model", None, tokens, 6)
    whole = tokenizer.decode(tokens + new, skip_special_tokens=True)
    assert printed.out == whole.removeprefix("Hello") + "\n"
    assert "--prefill-step-size, --kv-bits: not used here" in printed.err
    assert "per second" in printed.err
    assert run_cli(coordinator, [*command[:5], "--max-tokns", "6"]) == 2
    assert "--max-tokens" in capsys.readouterr().err


def test_a_chat_remembers_and_its_answers_can_be_cut(folder: Path) -> None:
    async def talk() -> tuple[list[Answer], Answer]:
        options = GenerateOptions(model=str(folder / "model"), max_tokens=5, system_prompt="Be brief.")
        async with open_session(options, Quiet()) as session:
            chat = Chat(session)
            said = [
                piece.answer
                for text in ("Hello", "Again")
                for piece in [p async for p in chat.say(text)]
                if piece.answer
            ]
            endless = GenerateOptions(model=str(folder / "model"), max_tokens=-1)
            session._options = endless
            session._stop = ()
            async for piece in chat.say("For ever"):
                if piece.text:
                    break
            await session.interrupt()
            session._options = options
            last = [piece.answer async for piece in chat.say("Last") if piece.answer]
            return said, last[0]

    (first, second), last = asyncio.run(talk())
    tokenizer = mlx_lm.load(str(folder / "model"))[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]

    def length() -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    assert first.prompt_tokens == length()
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Again"}]
    assert second.prompt_tokens == length()
    assert last.prompt == "Last"
    assert last.tokens > 0 or last.finish_reason == "stop"


def test_ctrl_c_ends_an_answer_and_then_the_chat_goes_on(folder: Path) -> None:
    code = "import sys; from coordinator.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-P",
        "-c",
        code,
        "generate",
        "--model",
        str(folder / "plain"),
        "--chat",
        "-m",
        "1000000",
    ]
    process = subprocess.Popen(
        command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for message in (b"the quick brown fox\n", b"jumps\n"):
            process.stdin.write(message)
            assert process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            line = b""
            while not line.startswith(b"["):
                line = process.stderr.readline()
                assert line, process.wait()
            assert line.endswith(b"interrupted]\n")
            # The answer is over: what it left in the pipe must not pass for the next one's.
            os.set_blocking(process.stdout.fileno(), False)
            while process.stdout.read(1 << 16):
                pass
            os.set_blocking(process.stdout.fileno(), True)
        process.stdin.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_ctrl_c_outside_a_chat_leaves_with_130(folder: Path) -> None:
    code = "import sys; from coordinator.cli import main; sys.exit(main())"
    command = [sys.executable, "-P", "-c", code, "generate", "--model", str(folder / "plain"), "-p", "the", "-m", "-1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--model: say which"),
        ({"adapter_path": "nowhere"}, "--adapter-path nowhere: no such folder"),
        ({"model": "plain", "system_prompt": "Be brief."}, "--system-prompt: .*plain has no chat template"),
        ({"model": "narrow"}, "the tokenizer does not fit the model"),
        ({"model": "plain", "extra_stop": ("two words",)}, "not one token"),
        ({"model": "model", "prompts": ()}, "--prompt: say what"),
    ],
)
def test_mistakes_get_one_line(
    folder: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in ("model", "plain", "narrow"):
        if options.get("model") == name:
            options = {**options, "model": str(folder / name)}
    with pytest.raises(UserError, match=words) as caught:
        answered(*options.pop("prompts", ("Hello",)), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"repetition_context": 0},
        {"raw": True, "system_prompt": "Be brief."},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        GenerateOptions(**options)
