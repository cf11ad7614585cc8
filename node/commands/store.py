"""``node store``: the models that are kept here."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("store", help="List and prune the models that are kept here.")
def store() -> None:
    """Hold the commands below."""


@store.command("list", help="Which models are here, the last used first.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def list_models(as_json: bool) -> None:
    """Show the models of the store."""
    import dataclasses
    import json
    import time

    from node.sizes import show_size
    from node.store import Store, StoredModel

    def line(model: StoredModel) -> tuple[str, ...]:
        arrived = 100 * model.present // max(model.size, 1)
        state = "in use" if model.in_use else "" if model.complete else f"{arrived} % here"
        place = "used in place" if model.complete and not model.own else ""
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.used))
        return model.digest[:12], show_size(model.size), used, model.name, ", ".join(filter(None, (state, place)))

    kept = Store(_folder())
    models = kept.list()
    if as_json:
        content = {"folder": str(kept.folder), "bytes": kept.size, "limit_bytes": kept.limit_bytes}
        click.echo(json.dumps({**content, "models": [dataclasses.asdict(model) for model in models]}, indent=2))
        return
    rows = [line(model) for model in models]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    for row in rows:
        click.echo("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]).rstrip())
    click.echo(f"{show_size(kept.size)} of {show_size(kept.limit_bytes)} in {kept.folder}")


@store.command("prune", help="Remove models, those least recently used first. Files used in place are never touched.")
@click.option("--limit", default="0", metavar="SIZE", help="Stop when the store is no larger, as 20GB; default: go on.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def prune(limit: str, as_json: bool) -> None:
    """Make the store smaller; models in use stay."""
    import dataclasses
    import json

    from node.sizes import parse_size, show_size
    from node.store import Store

    kept = Store(_folder())
    pruned = kept.prune(parse_size(limit, "--limit"))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(pruned), indent=2))
        return
    for model in pruned.models:
        click.echo(f"removed {model.name} ({model.digest[:12]})")
    in_use = [model.name for model in kept.list() if model.in_use]
    stays = f"; in use and kept: {', '.join(in_use)}" if in_use else ""
    click.echo(f"{show_size(pruned.freed)} freed, {show_size(pruned.left)} left in {kept.folder}{stays}")


def _folder() -> Path:
    from node.home import home

    return home() / "store"
