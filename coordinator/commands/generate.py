"""``coordinator generate``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

# What mlx_lm.generate knows and changes speed or memory only: taken, and said to do nothing.
_IDLE = ("draft_model", "num_draft_tokens", "prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start")
_IDLE_FLAGS = ("use_default_chat_template", "min_tokens_to_keep")


class JsonObject(click.ParamType[Any]):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object; write it as '{{\"key\": value}}'", param, ctx)
        return found


def _idle_options(function: Any) -> Any:
    for name in (*_IDLE, "min_tokens_to_keep"):
        function = click.option(f"--{name.replace('_', '-')}", hidden=True)(function)
    return click.option("--use-default-chat-template", is_flag=True, hidden=True)(function)


@click.command("generate")
@click.option("--model", default="", metavar="MODEL", help="Hugging Face repo or folder (default: the adapter's).")
@click.option("--adapter-path", default="", metavar="FOLDER", help="Adapter to apply.")
@click.option("-p", "--prompt", multiple=True, help="What to answer; may be repeated. - reads standard input.")
@click.option("--chat", is_flag=True, help="Talk: one message per line, what was said is remembered.")
@click.option("--system-prompt", default="", help="Begins the conversation.")
@click.option(
    "--raw",
    "--no-chat-template",
    "--ignore-chat-template",
    is_flag=True,
    help="Continue the prompt as plain text, without the chat template.",
)
@click.option("--chat-template-config", type=JsonObject(), default="{}", help="Further arguments of the chat template.")
@click.option("-m", "--max-tokens", type=int, default=256, show_default=True, help="Of each answer; -1 no limit.")
@click.option("--temp", "--temperature", "temperature", type=float, default=0.0, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, help="Sample from the likeliest tokens of this probability together.")
@click.option("--top-k", type=int, default=0, help="Sample from so many likeliest tokens.")
@click.option("--min-p", type=float, default=0.0, help="Leave out tokens less likely than this part of the likeliest.")
@click.option("--repetition-penalty", type=float, default=0.0, help="Above 1 makes repetition less likely.")
@click.option("--repetition-context", type=int, default=20, show_default=True, help="Tokens it looks back.")
@click.option("--seed", type=int, help="The same seed, the same answer (default: another each time).")
@click.option("--extra-eos-token", multiple=True, help="A further token that ends an answer; may be repeated.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model's own Python files run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per prompt.")
@click.option("--quiet", is_flag=True, help="Print the text only.")
@click.option("--verbose", default="true", hidden=True)
@_idle_options
def generate(
    prompt: tuple[str, ...],
    chat: bool,
    raw: bool,
    chat_template_config: dict[str, Any],
    extra_eos_token: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: str,
    **values: Any,
) -> None:
    """Text from a model, with or without an adapter.

    Text goes to standard output as it comes; everything else goes to standard error.

    \b
    Examples:
      coordinator generate --adapter-path adapters --prompt 'List the tables'
      coordinator generate --model mlx-community/Qwen3-0.6B-4bit --chat
      echo 'Once upon a time' | coordinator generate --model fused_model --raw
    """  # noqa: D301 - click reads the backspace
    from coordinator import talk
    from coordinator.generation import GenerateOptions

    idle = [f"--{name.replace('_', '-')}" for name in (*_IDLE, *_IDLE_FLAGS) if values.pop(name, None)]
    prompts = _prompts(prompt, chat=chat)
    options = GenerateOptions(
        prompts=prompts,
        raw=raw,
        template_options=chat_template_config,
        extra_stop=extra_eos_token,
        **values,
    )
    printer = talk.Printer(as_json=as_json, quiet=quiet or verbose.lower() in ("false", "f"))
    if idle:
        printer.note(f"{', '.join(idle)}: not used here; the answers are the same without")
    if chat:
        talk.chat(options, printer)
    else:
        talk.answer_prompts(options, printer)


def _prompts(given: tuple[str, ...], *, chat: bool) -> tuple[str, ...]:
    """The prompts, with standard input in the place of - or where nothing else was said."""
    from node.errors import UserError

    if chat:
        if "-" in given:
            raise UserError("--prompt - and --chat exclude each other: a chat reads its messages from standard input")
        return given
    if not given:
        if sys.stdin.isatty():
            raise UserError("--prompt: say what to answer, or use --chat")
        given = ("-",)
    if given.count("-") > 1:
        raise UserError("--prompt -: standard input can be read only once")
    prompts = tuple(_stdin() if text == "-" else text for text in given)
    if not all(prompts):
        raise UserError("--prompt: empty; say what to answer, or pipe it in")
    return prompts


def _stdin() -> str:
    """Standard input as one prompt, without the line end that ``echo`` adds."""
    from node.errors import UserError

    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not text in {sys.stdin.encoding}: {error}") from error
