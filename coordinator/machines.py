"""The machines that are there, for Python programs: what ``coordinator nodes`` shows, and training on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from coordinator import api, job
from coordinator.callbacks import CallbacksLike, as_tuple
from coordinator.config import TrainConfig
from coordinator.discovery import choose, parse_wanted
from coordinator.given import check_given, check_view
from coordinator.listing import FleetNode, as_fleet_nodes, find_nodes
from coordinator.loop_thread import run_to_end
from coordinator.planner import Plan
from coordinator.stream import Reader
from coordinator.training import Training
from coordinator.workers import Quiet
from node.names import AUTO


@dataclass(frozen=True)
class Fleet:
    """The machines that a choice of nodes means, as they were when they were looked for.

    Attributes:
        wanted: the choice: ``auto``, ``local``, names or ``host:port``, with commas between them.
        nodes: who is there, those that cannot be used among them.
        looked_seconds: how long it was looked.
        trouble: why Bonjour found nothing, or "".
    """

    wanted: str
    nodes: tuple[FleetNode, ...]
    looked_seconds: float
    trouble: str

    @classmethod
    def find(cls, wanted: str = AUTO) -> Fleet:
        """Look who is there; takes a second or two.

        Args:
            wanted: ``auto``, ``local``, names or ``host:port``, with commas between them.

        Raises:
            UserError: a name that nobody has, or several; an address where nobody answers.
        """
        check_given("wanted", wanted, str, '"auto", "local", or names and host:port with commas between them')
        parsed = parse_wanted(wanted)
        found, ours = run_to_end(lambda: find_nodes(parsed))
        nodes = as_fleet_nodes(choose(parsed, found), ours)
        return cls(wanted, nodes, found.seconds, found.trouble)

    def plan(self, config: TrainConfig, view: Reader | None = None) -> Plan:
        """Have the machines load the model, measure, and say who would do what (as ``train --plan``).

        Nothing is written. ``str`` of the plan is what the command prints.

        Args:
            config: all options but ``nodes``, for which this fleet's are taken.
            view: follows it, in a thread of its own.

        Raises:
            TandemError: as ``train``.
        """
        check_given("config", config, TrainConfig, "a TrainConfig(model=..., data=...)")
        check_view(view)
        return run_to_end(lambda: job.plan(dataclasses.replace(config, nodes=self.wanted), view or Quiet()))

    def train(
        self, config: TrainConfig, view: Reader | None = None, *, resume: bool = False, callbacks: CallbacksLike = ()
    ) -> job.RunResult:
        """``coordinator.train`` on these machines; they are looked for again.

        Args:
            config: all options but ``nodes``, for which this fleet's are taken.
            view: as for ``coordinator.train``.
            resume: likewise.
            callbacks: likewise.

        Raises:
            TandemError: as ``coordinator.train``.
        """
        return api.wait_for(Training(config, view, resume=resume, nodes=self.wanted), as_tuple(callbacks))

    def start_training(
        self, config: TrainConfig, view: Reader | None = None, *, resume: bool = False, callbacks: CallbacksLike = ()
    ) -> Training:
        """``coordinator.start_training`` on these machines; see ``train``."""
        called = as_tuple(callbacks)
        return Training(config, view, resume=resume, callbacks=called, nodes=self.wanted).start()

    def __iter__(self) -> Iterator[FleetNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.nodes)) or f"no node found; looked {self.looked_seconds:.1f} s"
