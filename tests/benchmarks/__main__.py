"""``deploy/run python -m tests.benchmarks [NAME ...]``: measure, side by side, what this program costs and gains.

Ratios are taken within pairs that run one after the other or at the same time, and the median of the pairs is
reported: on a machine that does other things too, absolute times mean little. ``--json FILE`` keeps the figures with
the facts of the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import tempfile
from pathlib import Path

from node.hardware import describe, facts
from tests.benchmarks.figures import Figure, table

# Each is a module of this package, with _ for -, with `run(folder, pairs) -> list[Figure]`.
NAMES = (
    "startup",
    "overhead",
    "scaling",
    "unequal",
    "distribution",
    "feeding",
    "ring-encryption",
    "one-machine",
    "simulation",
    "unsloth",
    "fleet-mixed",
    "first-step",
    "network",
    "slow-link",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones (default: all): {', '.join(NAMES)}")
    parser.add_argument("--pairs", type=int, default=5, help="how often each comparison is repeated")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    figures: list[Figure] = []
    for name in arguments.names or NAMES:
        module = importlib.import_module(f"tests.benchmarks.{name.replace('-', '_')}")
        with tempfile.TemporaryDirectory(prefix=f"tandem-{name}-") as folder:
            figures += module.run(Path(folder), arguments.pairs)
    print(describe(facts()))
    print(table(figures))
    if arguments.json:
        content = {"machine": dataclasses.asdict(facts()), "figures": [dataclasses.asdict(f) for f in figures]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
