"""``coordinator train``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.commands.options import GroupedCommand, config_options, groups
from coordinator.commands.pair import pair_before_training
from coordinator.config import TrainConfig
from coordinator.config_file import merge, read_yaml
from coordinator.resume import resumed_config
from coordinator.stream import FleetFormed, Reader, RunEvent
from node.errors import UserError

if TYPE_CHECKING:
    from coordinator.view import ViewMode

HELP = """Fine-tune a model.

A pasted mlx_lm.lora command line works, and so does its YAML file with -c. Flags win over the file.

\b
Examples:
  coordinator train --model mlx-community/Qwen3-0.6B-4bit --data data --iters 600
  coordinator train -c lora.yaml --batch-size 8
  coordinator train --model mlx-community/Qwen3-8B-4bit --nodes auto --plan
  coordinator train --resume --adapter-path adapters
  coordinator train -c lora.yaml --detach
"""

_HEADINGS = {
    **groups(),
    "config": "Model and data",
    "resume": "Training",
    "plan": "Machines",
    "detach": "Output",
    "quiet": "Output",
    "as_json": "Output",
    "plain": "Output",
    "dashboard": "Output",
    "dashboard_port": "Output",
    "dashboard_host": "Output",
    "help": "Output",
}


def run(
    config: str | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
    plain: bool,
    plan: bool,
    detach: bool,
    dashboard: bool,
    dashboard_port: int | None,
    dashboard_host: str | None,
    train: bool,
    wandb: str | None,
    **flags: Any,
) -> None:
    """Start a run, or go on with one."""
    import asyncio

    from coordinator.job import train as start
    from coordinator.view import make_view
    from node.hardware import facts

    if wandb:
        flags |= {"report_to": ("wandb",), "project_name": wandb}
    file_options = read_yaml(Path(config), to_train=not train) if config else {}
    options = load(file_options, flags, resume=resume)
    adapter = Path(options.adapter_path) / "adapters.safetensors"
    if flags["test"] and not (train or resume or config) and adapter.exists():
        # mlx_lm only evaluates then; training anew would give the loss of another adapter.
        raise UserError(
            f"--test without --train, and {adapter} is there: to evaluate it use coordinator test --adapter-path"
            f" {options.adapter_path}; to train anew and test then, add --train"
        )
    mode: ViewMode = "json" if as_json else "quiet" if quiet else "plain" if plain else "auto"
    for other, given in (("--resume", resume), ("--detach", detach), ("--dashboard", dashboard)):
        if plan and given:
            raise UserError(f"--plan and {other} exclude each other; give one of them")
    if not dashboard and (dashboard_port is not None or dashboard_host is not None):
        raise UserError("--dashboard-port and --dashboard-host need --dashboard")
    if detach and dashboard:
        raise UserError("--dashboard ends with this command; give --detach alone, then: coordinator dashboard last")
    pair_before_training(options.nodes, may_ask=mode in ("auto", "plain"))
    if plan:
        _show_plan(options, make_view("quiet" if as_json else mode, facts().total_memory_bytes or 0), as_json=as_json)
        return
    if detach:
        _detach(options, mode, resume=resume)
        return
    with contextlib.ExitStack() as stack:
        address = ""
        if dashboard:
            from coordinator.dashboard.address import open_place
            from coordinator.dashboard.beside import beside

            place = open_place(dashboard_host, dashboard_port)
            address = place.url
            click.echo(f"dashboard: {address}", err=True)  # as no event: they are written down, with the token
            stack.enter_context(beside(place, [Path(options.adapter_path)]))
        asyncio.run(start(options, make_view(mode, facts().total_memory_bytes or 0, address), resume=resume))


def _detach(options: TrainConfig, mode: ViewMode, *, resume: bool) -> None:
    """Have the run go on without this terminal."""
    import dataclasses
    import json

    from coordinator.running.detach import detach

    started = detach(options, resume=resume, say=click.echo if mode in ("auto", "plain") else lambda _: None)
    if mode == "json":
        click.echo(json.dumps(dataclasses.asdict(started), default=str))
        return
    click.echo(f"run {started.run} goes on without this terminal (process {started.pid})")
    click.echo(f"  watch it  coordinator watch {started.run}")
    click.echo(f"  stop it   coordinator stop {started.run}")
    click.echo(f"  its log   {started.log}")


def _show_plan(options: TrainConfig, view: Reader, *, as_json: bool) -> None:
    """Print who would do what."""
    import asyncio
    import json

    from coordinator.job import plan
    from coordinator.planner import as_json as plan_json
    from coordinator.planner import describe

    found = asyncio.run(plan(options, _WithoutPlan(view)))
    click.echo(json.dumps(plan_json(found), indent=2) if as_json else "\n".join(describe(found)))


class _WithoutPlan:
    """A view that is not told of the plan, because the command prints it."""

    def __init__(self, view: Reader) -> None:
        self._view = view

    def handle(self, event: RunEvent) -> None:
        """See ``stream.Reader``."""
        if not isinstance(event, FleetFormed):
            self._view.handle(event)

    def close(self) -> None:
        """See ``stream.Reader``."""
        self._view.close()


def load(file_options: dict[str, Any], flags: dict[str, Any], *, resume: bool) -> TrainConfig:
    """The options of a run, new or resumed."""
    if not resume:
        return merge(file_options, flags)
    given = {**file_options, **{name: value for name, value in flags.items() if value is not None}}
    return resumed_config(Path(given.get("adapter_path", TrainConfig.adapter_path)), given)


train = GroupedCommand(
    "train",
    callback=run,
    help=HELP,
    groups=_HEADINGS,
    params=[
        click.Option(["-c", "--config"], metavar="FILE", help="YAML file with any of these options, ours or mlx_lm's."),
        *config_options(),
        click.Option(["--resume"], is_flag=True, help="Go on with the run in --adapter-path, exactly."),
        click.Option(["--plan"], is_flag=True, help="Measure the machines, print who would do what, and stop."),
        click.Option(["--detach"], is_flag=True, help="Train in the background; return when training has begun."),
        click.Option(["--quiet"], is_flag=True, help="Print errors and the result only."),
        click.Option(["--plain"], is_flag=True, help="Print lines even in a terminal."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object per event."),
        click.Option(["--dashboard"], is_flag=True, help="Show the run in the browser, too."),
        click.Option(
            ["--dashboard-port"], type=click.IntRange(0, 65535), help="Its port (default 21700, or a free one)."
        ),
        click.Option(
            ["--dashboard-host"], metavar="HOST", help="Where it listens (default: this machine only, without a token)."
        ),
        click.Option(["--train"], is_flag=True, hidden=True),
        click.Option(["--wandb"], hidden=True),
    ],
)
