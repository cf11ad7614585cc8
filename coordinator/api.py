"""The program as Python functions: what the commands call, for scripts and notebooks too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from coordinator.config import TrainConfig
from coordinator.evaluation import TestOptions, TestResult
from coordinator.evaluation import test as _test
from coordinator.fusing import FuseOptions, FuseResult
from coordinator.fusing import fuse as _fuse
from coordinator.generation import Answer, GenerateOptions, answers
from coordinator.job import RunResult
from coordinator.job import train as _train
from coordinator.stream import Reader
from coordinator.workers import Quiet

_T = TypeVar("_T")


def train(config: TrainConfig, view: Reader | None = None, *, resume: bool = False) -> RunResult:
    """Fine-tune a model.

    Args:
        config: all options.
        view: follows the run; None shows nothing.
        resume: go on with the run in ``config.adapter_path``, from the newest state that anyone holds.

    Raises:
        UserError: a mistake in what was asked for; nothing was written.
        Interrupted: stopped by Ctrl-C; the state is saved.
        TandemError: the run failed.
    """
    return run_to_end(lambda: _train(config, view or Quiet(), resume=resume))


def test(options: TestOptions, view: Reader | None = None) -> TestResult:
    """Loss and perplexity of a data set, with or without an adapter.

    Raises:
        TandemError: see ``train``.
    """
    return run_to_end(lambda: _test(options, view or Quiet()))


def generate(options: GenerateOptions, view: Reader | None = None) -> tuple[Answer, ...]:
    """Answers to prompts, whole; ``coordinator.generation.generate`` streams them.

    Raises:
        TandemError: see ``train``.
    """
    return run_to_end(lambda: answers(options, view or Quiet()))


def fuse(options: FuseOptions, view: Reader | None = None) -> FuseResult:
    """Merge an adapter into its model and export the result.

    Raises:
        TandemError: see ``train``.
    """
    return run_to_end(lambda: _fuse(options, view or Quiet()))


def run_to_end(make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine, also where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(make()))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
