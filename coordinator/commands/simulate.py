"""``coordinator simulate``: what a fleet would give, before anybody buys or carries a machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coordinator.commands.completion import runs
from coordinator.config import TrainConfig
from node.errors import UserError

if TYPE_CHECKING:
    from coordinator.simulation.fleets import Fleet, Wire

HELP = """Predict the step time of a fleet, and what one more machine would give. Nothing is trained, nobody is asked.

\b
coordinator simulate --machine "Studio: 12000" --machine "2 x Air: 2500" --link wifi
coordinator simulate --run last --add "Air: 2500"

A machine is given by the tokens per second that it trains alone, padding included: about what its own runs report.
A link is wifi, ethernet, 10gbe or thunderbolt, or a rate as "1 Gbit/s", "200 Mbit/s 5 ms" or "16 Gbit/s 0.1 ms
cable"; with two names before it, it is between these: "Studio - Air: thunderbolt".

One more machine pays when the fleet gets faster by 5 % or more.
"""
DEFAULTS = TrainConfig(model="", data="")
ROW_LENGTH = 512
GRADIENT = "20MB"
USUAL_LINK = "ethernet"
FLEET_KEYS = ("machines", "links", "batch_size", "row_length", "gradient_size")


@click.command("simulate", help=HELP)
@click.option(
    "--machine", "machines", multiple=True, metavar="NAME:TOKENS/S", help='One, or several alike: "4 x mini: 2500".'
)
@click.option(
    "--link", "links", multiple=True, metavar="LINK", help=f"Between all of them, or two.  [default: {USUAL_LINK}]"
)
@click.option(
    "--fleet",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"YAML or JSON with any of: {', '.join(FLEET_KEYS)}.",
)
@click.option(
    "--run", "run", metavar="RUN", shell_complete=runs, help="Machines, links and rows as a run has measured them."
)
@click.option("--add", "added", multiple=True, metavar="NAME:TOKENS/S", help="A machine beside those of --run.")
@click.option("--batch-size", type=click.IntRange(1, 65536), help=f"Rows of a step.  [default: {DEFAULTS.batch_size}]")
@click.option("--row-length", type=click.FloatRange(2), help=f"Tokens of a row, on average.  [default: {ROW_LENGTH}]")
@click.option("--gradient-size", help=f"Four bytes for each trained number.  [default: {GRADIENT}]")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def simulate(
    machines: tuple[str, ...],
    links: tuple[str, ...],
    file: Path | None,
    run: str | None,
    added: tuple[str, ...],
    batch_size: int | None,
    row_length: float | None,
    gradient_size: str | None,
    as_json: bool,
) -> None:
    """Simulate, and show the table."""
    from coordinator.simulation import table
    from coordinator.simulation.fleets import growth

    given: dict[str, Any] = {"batch_size": batch_size, "row_length": row_length, "gradient_size": gradient_size}
    if run is not None:
        if machines or file is not None:
            raise UserError("--run says which machines there are; put further ones behind --add")
        fleet, said = _of_run(run, added, links, given)
    else:
        if added:
            raise UserError("--add is for machines beside those of --run; give all of a new fleet by --machine")
        from_file = _read(file) if file is not None else {}
        for name in ("batch_size", "row_length", "gradient_size"):
            given[name] = from_file.get(name) if given[name] is None else given[name]
        fleet = _given([*from_file.get("machines", []), *machines], [*from_file.get("links", []), *links], given)
        said = []
    found = growth(fleet)
    if as_json:
        click.echo(json.dumps(table.as_json(found), indent=2))
    else:
        click.echo("\n".join([*said, *table.lines(found)]))


def _given(machines: list[str], links: list[str], given: dict[str, Any]) -> Fleet:
    """The fleet that the options describe."""
    from coordinator.planner import JobFacts
    from coordinator.simulation.fleets import Fleet, typical_rows
    from coordinator.simulation.words import parse_machine
    from node.sizes import parse_size

    if not machines:
        raise UserError(
            'say which machines: --machine "Studio: 12000" --machine "Air: 2500" (tokens per second), or --run RUN'
        )
    kinds = tuple(parse_machine(text, "--machine") for text in machines)
    batch_size = given["batch_size"] or DEFAULTS.batch_size
    mean = given["row_length"] or ROW_LENGTH
    longest = max(DEFAULTS.max_seq_length, int(4 * mean))
    job = JobFacts(
        steps=typical_rows(batch_size, mean, longest),
        max_seq_length=longest,
        batch_size=batch_size,
        accumulation=1,
        gradient_bytes=parse_size(given["gradient_size"] or GRADIENT, "--gradient-size"),
    )
    usual, wires = _wires(links, [kind.name for kind in kinds])
    fleet = Fleet(kinds, job, usual or _usual(), wires)
    _check(fleet)
    return fleet


def _of_run(run: str, added: tuple[str, ...], links: tuple[str, ...], given: dict[str, Any]) -> tuple[Fleet, list[str]]:
    """The fleet of a run, with further machines; and what to say of the run."""
    from coordinator.running.known import resolve
    from coordinator.running.measured import past_run
    from coordinator.simulation.past import fleet_of
    from coordinator.simulation.words import parse_machine
    from node.sizes import parse_size

    for name in ("batch_size", "row_length"):
        if given[name] is not None:
            raise UserError(f"--{name.replace('_', '-')} is the run's own with --run; leave it out")
    known = resolve(run)
    if known.place is None:
        raise UserError(f"run {known.run}: {known.missing}; there is nothing to learn from")
    past = past_run(known.place)
    size = parse_size(given["gradient_size"], "--gradient-size") if given["gradient_size"] else past.gradient_bytes
    if size is None:
        raise UserError(f"{past.folder} has no weights yet; give --gradient-size, four bytes for each trained number")
    kinds = tuple(parse_machine(text, "--add") for text in added)
    usual, wires = _wires(links, [*past.members, *(kind.name for kind in kinds)])
    own = fleet_of(past, size, wires, usual or _usual())
    fleet = dataclasses.replace(own, kinds=(*own.kinds, *kinds), usual=usual or own.usual)
    _check(fleet)
    line = (
        f"run {known.run}: {len(past.latest)} settled steps of {', '.join(past.members)}; "
        f"a step took {past.step_seconds:.2f} s, simulated {own.run().step_seconds:.2f} s"
    )
    return fleet, [line]


def _usual() -> Wire:
    from coordinator.simulation.words import USUAL_WIRES

    return USUAL_WIRES[USUAL_LINK]


def _wires(links: Sequence[str], names: list[str]) -> tuple[Wire | None, dict[tuple[str, str], Wire]]:
    """What is between all machines, if that was said, and between some."""
    from coordinator.simulation.words import parse_link

    usual: Wire | None = None
    wires: dict[tuple[str, str], Wire] = {}
    for text in links:
        pair, wire = parse_link(text, names, "--link")
        if pair is None:
            usual = wire
        else:
            wires[pair] = wire
    return usual, wires


def _check(fleet: Fleet) -> None:
    """Refuse names that stand for two machines, and too many machines."""
    from coordinator.simulation.fleets import MOST_MACHINES

    names = [name for kind in fleet.kinds for name in {kind.name, *kind.names}]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f'two machines are called {twice}; give each its own name, or write "2 x {twice}: ..." for equal ones'
        )
    if fleet.size > MOST_MACHINES:
        raise UserError(f"{fleet.size} machines; up to {MOST_MACHINES} can be simulated")


def _read(file: Path) -> dict[str, Any]:
    """What a file of a fleet says.

    Raises:
        UserError: it cannot be read, or says something else.
    """
    from coordinator.config_file import parse_mapping

    try:
        found = parse_mapping(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--fleet {file}: {getattr(error, 'strerror', None) or 'no text'}") from error
    if found is None:
        raise UserError(f"--fleet {file}: no mapping in YAML or JSON; it may have {', '.join(FLEET_KEYS)}")
    unknown = sorted(str(key) for key in found if key not in FLEET_KEYS)
    if unknown:
        raise UserError(f"--fleet {file}: no such key: {', '.join(unknown)}; there are {', '.join(FLEET_KEYS)}")
    return {
        "machines": _texts(file, "machines", found.get("machines")),
        "links": _texts(file, "links", found.get("links")),
        "batch_size": _number(file, "batch_size", found.get("batch_size"), whole=True, least=1),
        "row_length": _number(file, "row_length", found.get("row_length"), whole=False, least=2),
        "gradient_size": found.get("gradient_size"),
    }


def _texts(file: Path, key: str, value: object) -> list[str]:
    """A list of texts, or a mapping, as ``Studio: 12000`` is in YAML."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [f"{name}: {one}" for name, one in value.items()]
    if isinstance(value, list):
        return [text for one in value for text in ([one] if isinstance(one, str) else _texts(file, key, one))]
    raise UserError(f"--fleet {file}: {key} is a list of texts, as on the command line")


def _number(file: Path, key: str, value: object, *, whole: bool, least: int) -> Any:
    if value is None:
        return None
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= 1 << 20:
        raise UserError(f"--fleet {file}: {key} is a {'whole ' if whole else ''}number from {least}, not {value!r}")
    return value
