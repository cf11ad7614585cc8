"""The program as Python functions: what the commands do, for scripts, notebooks and asyncio programs.

Functions that wait may be called where an event loop is running already (a notebook). An asyncio program that has other
things to do meanwhile awaits ``start_training``, and calls the others by ``asyncio.to_thread``.
"""

from __future__ import annotations

from coordinator.callbacks import Callbacks, CallbacksLike, as_tuple, call_back
from coordinator.config import TrainConfig
from coordinator.evaluation import TestOptions, TestResult
from coordinator.evaluation import test as _test
from coordinator.fusing import FuseOptions, FuseResult
from coordinator.fusing import fuse as _fuse
from coordinator.generation import Answer, GenerateOptions, answers
from coordinator.given import check_given, check_view
from coordinator.interrupts import Interrupts
from coordinator.job import RunResult
from coordinator.loop_thread import run_to_end
from coordinator.stream import Reader
from coordinator.training import Training
from coordinator.workers import Quiet


def train(
    config: TrainConfig, view: Reader | None = None, *, resume: bool = False, callbacks: CallbacksLike = ()
) -> RunResult:
    """Fine-tune a model, and wait for it.

    Ctrl-C, or a notebook's stop button, saves and stops; a second one leaves at once, by ``KeyboardInterrupt``.

    Args:
        config: all options.
        view: follows the run, in the run's own thread; must not take long. None shows nothing.
        resume: go on with the run in ``config.adapter_path``, from the newest state that anyone holds, and with its
            own options where ``config`` has defaults.
        callbacks: called in the caller's thread.

    Returns:
        How it ended; ``status`` is ``interrupted`` when a callback stopped it.

    Raises:
        UserError: a mistake in what was asked for; nothing was written.
        Interrupted: stopped by Ctrl-C; the state is saved.
        TandemError: the run failed.
    """
    return wait_for(Training(config, view, resume=resume), as_tuple(callbacks))


def wait_for(training: Training, called: tuple[Callbacks, ...]) -> RunResult:
    """Begin a training, and do what ``train`` does meanwhile; see there."""
    with Interrupts(training.stop, training.abort) as interrupts:
        with training.start():
            if called:
                call_back(training, called, training.stop)
        result = training.result()
    if interrupts.pressed and training.stopped is not None:
        raise training.stopped
    return result


def test(options: TestOptions, view: Reader | None = None) -> TestResult:
    """Loss and perplexity of a data set, with or without an adapter.

    Raises:
        TandemError: see ``train``.
    """
    check_given("options", options, TestOptions, "a TestOptions(model=..., data=...)")
    check_view(view)
    return run_to_end(lambda: _test(options, view or Quiet()))


def generate(options: GenerateOptions, view: Reader | None = None) -> tuple[Answer, ...]:
    """Answers to prompts, whole; ``coordinator.generation.generate`` streams them.

    Raises:
        TandemError: see ``train``.
    """
    check_given("options", options, GenerateOptions, "a GenerateOptions(model=..., prompts=(...,))")
    check_view(view)
    return run_to_end(lambda: answers(options, view or Quiet()))


def fuse(options: FuseOptions, view: Reader | None = None) -> FuseResult:
    """Merge an adapter into its model and export the result.

    Raises:
        TandemError: see ``train``.
    """
    check_given("options", options, FuseOptions, "a FuseOptions(adapter_path=...)")
    check_view(view)
    return run_to_end(lambda: _fuse(options, view or Quiet()))
