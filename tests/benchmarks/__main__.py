"""``deploy/run python -m tests.benchmarks``: measure, side by side, what this program costs.

Ratios are taken within pairs that run one after the other, and the median of the pairs is reported: on a machine that
does other things too, absolute times mean little. ``--json FILE`` keeps the figures with the facts of the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from node.hardware import describe, facts
from tests.benchmarks import overhead, startup
from tests.benchmarks.figures import Figure, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="how often each comparison is repeated")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="tandem-benchmark-") as folder:
        figures += startup.measure(arguments.pairs)
        figures += overhead.measure(Path(folder), arguments.pairs)
    print(describe(facts()))
    print(table(figures))
    if arguments.json:
        content = {"machine": dataclasses.asdict(facts()), "figures": [dataclasses.asdict(f) for f in figures]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
