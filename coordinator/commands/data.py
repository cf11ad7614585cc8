"""``coordinator data``: check, split and convert data sets. What is heavy is imported when a command runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from coordinator.data.source import DataSource
    from coordinator.data.tokenise import Mask, RowTokeniser

MOST_PROBLEMS = 20
FILE = click.Path(path_type=Path)


def _features(function: Any) -> Any:
    """The options that name a row's keys, as ``mlx_lm``'s YAML does."""
    for name, default in (("text", "text"), ("chat", "messages"), ("completion", "completion"), ("prompt", "prompt")):
        option = click.option(f"--{name}-feature", default=default, show_default=True, help=f"Key of the {name}.")
        function = option(function)
    return function


@click.group(name="data", help="Check, split and convert data sets.")
def data() -> None:
    """Hold the commands below."""


@data.command(help="Describe and validate a data set: a folder with train.jsonl and its kin, or a Hugging Face name.")
@click.argument("folder", default="data")
@click.option("--model", help="Count this model's tokens, and show a row as its chat template renders it.")
@click.option("--max-seq-length", type=click.IntRange(2), default=2048, show_default=True, help="Longer rows are cut.")
@click.option("--mask-prompt", is_flag=True, help="Train on the completion only; the same as --mask prompt.")
@click.option("--mask", type=click.Choice(["all", "prompt", "assistant"]), help="Which tokens are trained on.")
@click.option("--trust-remote-code", is_flag=True, help="Let the tokenizer's own Python files run.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@_features
def check(
    folder: str,
    model: str | None,
    max_seq_length: int,
    mask_prompt: bool,
    mask: Mask | None,
    trust_remote_code: bool,
    as_json: bool,
    **features: str,
) -> None:
    """Check a data set; exit code 2 when it has rows that training would refuse."""
    from coordinator.data.check import check as check_source
    from coordinator.data.show import show_report, showing_progress
    from node.errors import UserError

    if mask_prompt and mask not in (None, "prompt"):
        raise UserError(f"--mask-prompt and --mask {mask} exclude each other; give one of them")
    chosen: Mask = mask or ("prompt" if mask_prompt else "all")
    if chosen != "all" and not model:
        raise UserError("--mask needs --model: what is masked depends on the model's chat template")
    tokeniser = _tokeniser(model, max_seq_length, chosen, trust_remote_code) if model else None
    with showing_progress(enabled=not as_json) as progress:
        report = check_source(_source(folder, features), tokeniser, progress)
    if as_json:
        click.echo(json.dumps({"ok": not report.problems, **asdict(report)}, indent=2, ensure_ascii=False))
    else:
        show_report(report, MOST_PROBLEMS)
    if report.problems:
        click.get_current_context().exit(2)


def _tokeniser(model: str, max_seq_length: int, mask: Mask, trust_remote_code: bool) -> RowTokeniser:
    from coordinator.data.tokenise import RowTokeniser, TokeniseOptions
    from coordinator.data.tokenizer import find_tokenizer, load_tokenizer

    options = TokeniseOptions(max_seq_length, mask, trust_remote_code)
    return RowTokeniser(load_tokenizer(find_tokenizer(model), trust_remote_code), options, model)


def _source(folder: str, features: dict[str, str]) -> DataSource:
    from coordinator.data.hub import find_source
    from coordinator.data.rows import Features
    from coordinator.data.source import SPLITS
    from coordinator.home import token_cache

    return find_source(folder, None, Features(**_names(features)), token_cache(), lambda *_: None, SPLITS)


def _names(features: dict[str, str]) -> dict[str, str]:
    return {key.removesuffix("_feature"): value for key, value in features.items()}


@data.command(help="Cut a JSONL file into train.jsonl, valid.jsonl and test.jsonl.")
@click.argument("file", type=FILE)
@click.option("--out", type=FILE, required=True, help="Folder to write; nothing in it is overwritten.")
@click.option("--valid", type=float, default=0.1, show_default=True, help="Part of the rows for validation.")
@click.option("--test", type=float, default=0.0, show_default=True, help="Part of the rows for the test.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another choice.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
@_features
def split(file: Path, out: Path, valid: float, test: float, seed: int, as_json: bool, **features: str) -> None:
    """Split a file; equal rows always come to the same side."""
    from coordinator.data.rows import Features
    from coordinator.data.source import DataFile
    from coordinator.data.split import split_file

    result = split_file(DataFile(file, Features(**_names(features))), out, valid, test, seed)
    if as_json:
        click.echo(json.dumps({"folder": str(out), **asdict(result)}))
        return
    for name, rows in result.rows.items():
        click.echo(f"rows written to {out / f'{name}.jsonl'}: {rows}")
    if result.duplicates:
        click.echo(f"{result.duplicates} rows repeat earlier ones; equal rows stand in the same file")


@data.command(help="Make JSONL that trains from pairs or conversations in JSON, JSONL or CSV.")
@click.argument("file", type=FILE)
@click.option("--out", type=FILE, required=True, help="JSONL file to write; it must not exist.")
@click.option("--prompt-column", default="", help="Column of the prompt.")
@click.option("--completion-column", default="", help="Column of the answer.")
@click.option("--input-column", default="", help="Column that is added to the prompt where it is not empty.")
@click.option("--system-column", default="", help="Column of the system prompt.")
@click.option("--chat-column", default="", help="Column of conversations.")
@click.option("--text-column", default="", help="Column of plain text.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def convert(
    file: Path,
    out: Path,
    prompt_column: str,
    completion_column: str,
    input_column: str,
    system_column: str,
    chat_column: str,
    text_column: str,
    as_json: bool,
) -> None:
    """Convert a file, saying which columns were recognised."""
    from coordinator.data.columns import Columns
    from coordinator.data.convert import convert_file

    chosen = Columns(chat_column, text_column, prompt_column, input_column, completion_column, system_column)
    result = convert_file(file, out, chosen)
    if as_json:
        click.echo(json.dumps({"file": str(out), **asdict(result)}, ensure_ascii=False))
        return
    click.echo(f"recognised {result.recognised}")
    if result.skipped:
        click.echo(f"left out {result.skipped} without an answer or a text")
    click.echo(f"rows written to {out}: {result.rows}")
