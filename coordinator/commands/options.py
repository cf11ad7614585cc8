"""Command line flags made from the fields of ``TrainConfig``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import click

from coordinator.commands.completion import nodes
from coordinator.config import TrainConfig, flag

_TYPES: dict[str, Any] = {"int": click.INT, "float": click.FLOAT, "str": click.STRING}


class CommaSeparated(click.ParamType[Any]):
    """Words with commas between them."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The words."""
        del param, ctx
        if isinstance(value, tuple):
            return value
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


class YamlMapping(click.ParamType[Any]):
    """A mapping, written as YAML or JSON."""

    name = "mapping"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The mapping."""
        if isinstance(value, dict):
            return value
        from coordinator.config_file import parse_mapping

        found = parse_mapping(str(value))
        if found is None:
            self.fail(f"{value!r} is no mapping; write {{name: cosine_decay, arguments: [1e-5, 900]}}", param, ctx)
        return found


class GroupedCommand(click.Command):
    """A command whose help lists options under headings."""

    def __init__(self, *args: Any, groups: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section for each heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(self._groups.get(parameter.name or "", "Other"), []).append(record)
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def groups() -> dict[str, str]:
    """The heading of each option."""
    found, heading = {}, ""
    for item in dataclasses.fields(TrainConfig):
        heading = item.metadata.get("group", heading)
        found[item.name] = heading
    return found


def config_options(names: Iterable[str] | None = None) -> list[click.Option]:
    """A click option for each field, or for the named ones; a flag that is not given is None."""
    wanted = None if names is None else set(names)
    return [
        _option(item)
        for item in dataclasses.fields(TrainConfig)
        if (wanted is None or item.name in wanted) and not item.metadata.get("yaml_only")
    ]


def with_config_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command's function with the flags of these fields."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        existing: list[click.Parameter] = getattr(function, "__click_params__", [])
        function.__click_params__ = [*reversed(config_options(names)), *existing]  # type: ignore[attr-defined]
        return function

    return decorate


def _option(item: dataclasses.Field[Any]) -> click.Option:
    kind = str(item.type).split(" |", maxsplit=1)[0]
    spellings = [flag(item.name), *item.metadata["flags"]]
    help_text = item.metadata["help"]
    options: dict[str, Any] = {"default": None}
    if kind == "bool":
        spellings = [*(f"{name}/--no-{name[2:]}" if i == 0 else name for i, name in enumerate(spellings))]
        return click.Option([*spellings, item.name], help=help_text, is_flag=True, default=None)
    if kind.startswith("tuple"):
        if item.name == "sample_prompt":
            options["multiple"] = True
            options["callback"] = lambda _ctx, _param, value: tuple(value) or None
        else:
            options["type"] = CommaSeparated()
            options["metavar"] = "WORD,WORD"
    elif kind.startswith("dict"):
        options["type"] = YamlMapping()
    elif "choices" in item.metadata:
        options["type"] = click.Choice(item.metadata["choices"])
    else:
        options["type"] = _TYPES.get(kind, click.STRING)
    if item.name == "nodes":
        options["shell_complete"] = nodes
    default = item.default
    if default is not dataclasses.MISSING and default not in (None, "", 0, 0.0, ()) and "default" not in help_text:
        help_text = f"{help_text[:-1]} (default {default})."
    return click.Option([*spellings, item.name], help=help_text, **options)
