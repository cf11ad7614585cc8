"""What a run writes about itself: its folder's beginning, its entry in the registry, its report."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.config import TrainConfig
from coordinator.config_file import write_yaml
from coordinator.runfolder import Recorder, RunFolder, read_json_lines
from coordinator.running import index
from coordinator.running.figures import last_figures
from coordinator.specs import adapter_config
from coordinator.stream import FAILED, STOPPED, Broadcast, Noted, RunFinished
from coordinator.view.report import write_report
from coordinator.view.reporters import make_reporters
from node.files import write_text_atomically

Lines = tuple[tuple[str, str], ...]


class Books:
    """The books of one run. Nothing is written before ``begin`` or ``take_up``.

    Args:
        config: all options, resolved.
        folder: the run's.
        run: its id.
        reader: takes what is worth saying; the files' own readers are added to it.

    Attributes:
        opened: whether the run has begun to write.
        history: metrics of the steps before, for a resumed run.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, run: str, reader: Broadcast) -> None:
        self._config = config
        self._folder = folder
        self._run = run
        self._reader = reader
        self.opened = False
        self.history: list[dict[str, Any]] = []

    def begin(self, data_digest: str) -> None:
        """Lock the folder, move an older run's files out of the way, and mark it as this run's.

        Args:
            data_digest: of the training data.

        Raises:
            UserError: another run is at work there.
        """
        self._folder.lock()
        portable = self._portable()
        archived = self._folder.archive()
        self._folder.begin(self._run, write_yaml(self._after_archiving(portable, archived)), data_digest)
        self._open()
        if archived is not None:
            self._reader.handle(Noted("archived", f"an older run's files are in {archived} now"))

    def take_up(self, step: int, recovered: Sequence[dict[str, Any]] = ()) -> int:
        """Go on with the files of the run as they were at a step.

        Args:
            step: to go on from.
            recovered: metrics of steps up to it that had not been written.

        Returns:
            Steps that were recorded after it and are computed again.
        """
        last = max((entry["step"] for entry in read_json_lines(self._folder.metrics) if "loss" in entry), default=0)
        self.history = self._folder.truncate_metrics(step, recovered)
        write_text_atomically(self._folder.config, write_yaml(self._portable()))
        self._open(resumed=time.time())
        again = max(0, last - step)
        if again:
            line = f"{again} steps after the checkpoint of step {step} are computed again"
            self._reader.handle(Noted("replay", line, details={"replayed_steps": again}))
        return again

    def close(self, status: str, lines: Lines, commands: Lines, exit_code: int = 0) -> None:
        """Say that it is over, and write report and registry entry; neither is worth failing a finished run for."""
        self._reader.handle(RunFinished(status, lines, commands, exit_code))
        try:
            write_report(self._folder.report, self._folder.path, dict(lines), status=status, commands=commands)
        except OSError as error:
            self._reader.handle(Noted("warning", f"cannot write {self._folder.report}: {error.strerror}", "warning"))
        said = next((value for label, value in lines if label in (FAILED, STOPPED)), None)
        figures = last_figures(self._folder)
        self._register(status=status, message=said, ended=time.time(), **dataclasses.asdict(figures))

    def _open(self, **facts: Any) -> None:
        self.opened = True
        content = json.dumps(adapter_config(self._config), indent=4) + "\n"
        write_text_atomically(self._folder.path / "adapter_config.json", content)
        self._reader.add(Recorder(self._folder, lambda line: self._reader.handle(Noted("disk", line, "warning"))))
        values = dataclasses.asdict(self._config)
        for reporter in make_reporters(
            self._config.report_to, self._config.project_name, self._folder.path, values, self._reader.handle
        ):
            self._reader.add(reporter)
        steps = None if self._config.iters is None else -(-self._config.iters // self._config.grad_accumulation_steps)
        self._register(
            status="running",
            pid=os.getpid(),
            model=self._config.model,
            data=self._config.data,
            total_steps=steps,
            message=None,
            ended=None,
            **facts,
        )

    def _after_archiving(self, config: TrainConfig, archived: Path | None) -> TrainConfig:
        """The options with the adapter that the run begins from where it is now."""
        began = config.resume_adapter_file
        if began is None or archived is None or Path(began).parent != self._folder.path.resolve():
            return config
        return dataclasses.replace(config, resume_adapter_file=str(archived.resolve() / Path(began).name))

    def _portable(self) -> TrainConfig:
        """The options with local paths made absolute, so that the file works from anywhere."""
        values: dict[str, Any] = {}
        for name in ("model", "data", "resume_adapter_file", "adapter_path"):
            value = getattr(self._config, name)
            if value and (Path(value).expanduser().exists() or name == "adapter_path"):
                values[name] = str(Path(value).expanduser().resolve())
        return dataclasses.replace(self._config, **values)

    def _register(self, **values: Any) -> None:
        try:
            index.record(self._run, folder=str(self._folder.path.resolve()), **values)
        except OSError as error:
            self._reader.handle(Noted("warning", f"the registry cannot be written: {error.strerror}", "warning"))
