"""A reader that writes what a run tells to the program's log (``node.log_file``)."""

from __future__ import annotations

import logging

from coordinator.stream import FleetFormed, Noted, RunEvent, RunFinished, RunStarted, StepFinished, Validated
from node.log_file import RUN

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class RunLog:
    """Steps only at the level ``debug``; neither samples, which are the user's own text, nor progress bars."""

    def __init__(self) -> None:
        self._log = logging.getLogger(RUN)

    def handle(self, event: RunEvent) -> None:
        """See ``stream.Reader``."""
        match event:
            case RunStarted():
                began = "begins" if event.first_step == 1 else f"goes on from step {event.first_step}"
                self._say(logging.INFO, f"run {event.run} {began}: {event.name}, {event.total_steps} steps")
            case FleetFormed(lines=lines):
                self._say(logging.INFO, "; ".join(lines))
            case Validated(metrics=metrics):
                self._say(logging.INFO, f"validated at step {metrics.get('step')}: {metrics.get('val_loss')}")
            case StepFinished(metrics=metrics):
                self._say(logging.DEBUG, f"step {metrics.get('step')}", **metrics)
            case Noted(kind, message, level):
                self._say(LEVELS.get(level, logging.INFO), message, kind=kind)
            case RunFinished(status=status):
                self._say(logging.INFO, f"run ended: {status}")
            case _:
                pass

    def close(self) -> None:
        """See ``stream.Reader``."""

    def _say(self, level: int, message: str, **details: object) -> None:
        if self._log.isEnabledFor(level):
            self._log.log(level, "%s", message, extra={"details": details})
