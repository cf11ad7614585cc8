"""A training run from its options to its receipt."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator import runs
from coordinator.books import Books
from coordinator.checkpoint import Checkpoint, Checkpoints
from coordinator.checks import check_model, check_options, data_warnings
from coordinator.config import TrainConfig
from coordinator.data.batches import Batches
from coordinator.data.tokenset import TokenSet
from coordinator.engine import Engine, StopRequested, Work
from coordinator.finish import fuse_result, next_commands, summary
from coordinator.home import new_job_folder
from coordinator.models import ResolvedModel, resolve
from coordinator.preflight import check_before_loading, check_memory, fitting_tokens, parse_size
from coordinator.program import Program
from coordinator.prompts import Prompter, sample_prompts
from coordinator.runfolder import RunFolder
from coordinator.shares import Evaluation, StepSource
from coordinator.specs import job_spec
from coordinator.stream import Advanced, Broadcast, Noted, Reader, RunStarted, Tested
from coordinator.tokens import token_sets
from node.errors import Interrupted, TandemError, UserError, WorkerError
from node.events import Ready
from node.hardware import describe, facts
from node.supervisor import LocalWorker, WorkerLink

INITIAL_WEIGHTS = "initial.safetensors"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run: its id.
        status: ``done`` or ``stopped_early``.
        folder: what it left behind.
        steps: optimizer steps applied, over all sittings.
        best_step: of the validations, or None.
        best_val_loss: likewise.
        test_loss: of the test set, or None.
        replayed_steps: steps that had to be computed again.
        written: files of fusing and exporting.
    """

    run: str
    status: str
    folder: Path
    steps: int
    best_step: int | None
    best_val_loss: float | None
    test_loss: float | None
    replayed_steps: int
    written: tuple[str, ...]


async def train(config: TrainConfig, view: Reader, *, resume: bool = False) -> RunResult:
    """Run a training.

    Args:
        config: all options.
        view: shows the run; closed when it ends.
        resume: go on from the last checkpoint in the adapter folder.

    Raises:
        UserError: a mistake in what was asked for; nothing was written.
        Interrupted: stopped by Ctrl-C; the state is saved.
        TandemError: the run failed.
    """
    with contextlib.closing(Broadcast([view])) as reader:
        return await _Job(config, reader, view, resume).run()


class _Job:
    """One run in the making: what each stage finds out, for the stages after it."""

    def __init__(self, config: TrainConfig, reader: Broadcast, view: Reader, resume: bool) -> None:
        self.config = config
        self.reader = reader
        self.view = view
        self.resume = resume
        self.folder = RunFolder(Path(config.adapter_path))
        self.stop = asyncio.Event()
        self.run_id = (self.folder.run_id() if resume else None) or runs.new_id()
        self.work_folder = new_job_folder(self.run_id)

    async def run(self) -> RunResult:
        with self._signals():
            check_options(self.config, resume=self.resume)
            model = await asyncio.to_thread(resolve, self.config.model, progress=self._advance)
            self._check_inputs(model)
            try:
                return await self._prepared(model)
            except WorkerError:
                # The worker's log is what its message points to.
                for copy in self.work_folder.glob("*.safetensors"):
                    copy.unlink()
                raise
            except BaseException:
                shutil.rmtree(self.work_folder, ignore_errors=True)
                raise
            finally:
                self.folder.unlock()

    async def _prepared(self, model: ResolvedModel) -> RunResult:
        """The rest of the run, once the model is here."""
        resumed = None
        if self.resume:
            self.folder.lock()
            resumed = self._resumed()
        data = await asyncio.to_thread(self._prepare, model)
        self._resolve_counts(data["train"])
        engine = self._engine(model, data, resumed)
        try:
            ready = await engine.prepare()
            self._open_books(engine)
            result = await self._train(engine, ready, model, data)
        except StopRequested as error:
            raise self._interrupted(engine) from error
        except UserError as error:
            # The worker knows our copy of the file only.
            kept, given = str(self.work_folder / INITIAL_WEIGHTS), self.config.resume_adapter_file
            raise UserError(str(error).replace(kept, given or kept)) from error
        finally:
            await engine.close()
        shutil.rmtree(self.work_folder, ignore_errors=True)
        return result

    # --- before training ------------------------------------------------------------------------------------------

    def _check_inputs(self, model: ResolvedModel) -> None:
        self.cache_threshold = parse_size(self.config.clear_cache_threshold, "--clear-cache-threshold")
        self.folder.check_free()
        warnings = check_model(self.config, model, resume=self.resume)
        for warning in [*warnings, *check_before_loading(self.config, model)]:
            self.reader.handle(Noted("warning", warning, "warning"))

    def _resumed(self) -> Checkpoint:
        def damaged(message: str) -> None:
            self.reader.handle(Noted("damaged_checkpoint", message, "warning"))

        checkpoints = Checkpoints(self.folder, self.config.keep_last)
        checkpoints.sweep()
        checkpoint = checkpoints.newest_intact(damaged)
        if checkpoint is None:
            raise UserError(
                f"--resume: no usable checkpoint in {self.folder.checkpoints}; start without --resume, perhaps with"
                " --resume-adapter-file to begin from the weights of an older one"
            )
        return checkpoint

    def _prepare(self, model: ResolvedModel) -> dict[str, TokenSet]:
        config = self.config
        wanted = ["train"]
        if config.val_batches != 0:
            wanted.append("valid")
        if config.test:
            wanted.append("test")
        splits: Any = tuple(wanted)
        sets = token_sets(config, model, self._advance, splits)
        for split, tokens in sets.items():
            for line in data_warnings(split, tokens):
                self.reader.handle(Noted("warning", line, "warning"))
        if "valid" in wanted and "valid" not in sets:
            for option, given in (("--early-stop", config.early_stop), ("--sample-prompt", config.sample_prompt)):
                if given:
                    raise UserError(f"{option} needs validations: add valid.jsonl (coordinator data split makes one)")
            line = "no valid.jsonl: training without validation (coordinator data split makes one)"
            self.reader.handle(Noted("warning", line, "warning"))
        return {str(split): tokens for split, tokens in sets.items()}

    def _advance(self, task: str, done: int, total: int) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped before training began; nothing was written")
        self.reader.handle(Advanced(task, done, total))

    def _resolve_counts(self, train: TokenSet) -> None:
        """Fix what depends on the size of the data, so that ``config.yaml`` repeats the run."""
        self.batches = Batches(train.lengths, self.config.batch_size, self.config.seed)
        iters = self.config.total_iters(self.batches.per_epoch)
        steps = -(-iters // self.config.grad_accumulation_steps)
        warmup = None if self.config.lr_schedule is not None else self.config.warmup_steps(steps)
        self.config = dataclasses.replace(
            self.config, iters=iters, epochs=None, warmup=self.config.warmup if warmup is None else warmup
        )
        self.books = Books(self.config, self.folder, self.run_id, self.reader)

    def _engine(self, model: ResolvedModel, data: dict[str, TokenSet], resumed: Checkpoint | None) -> Engine:
        config, train = self.config, data["train"]
        if resumed is not None and resumed.progress.data_digest != train.digest:
            raise UserError(f"--resume: the training data is not what this run began with; put {config.data} back")
        validation = Evaluation(data["valid"], config.batch_size, config.val_batches) if "valid" in data else None
        assert config.iters is not None
        self.program = Program(
            total_iters=config.iters,
            accumulation=config.grad_accumulation_steps,
            save_every=config.save_every,
            steps_per_eval=config.steps_per_eval,
            steps_per_report=config.steps_per_report,
            validates=validation is not None,
        )
        largest = dataclasses.replace(config, batch_size=min(config.batch_size, len(train)))
        for warning in check_memory(largest, model, train.longest):
            self.reader.handle(Noted("warning", warning, "warning"))
        if resumed is not None and self.program.last_iter(resumed.progress.step) != resumed.progress.iteration:
            raise UserError(
                f"--iters {config.iters}: the run ended within a step of --grad-accumulation-steps"
                f" {config.grad_accumulation_steps}, which cannot be taken up again; start a new run from its adapter"
                " with --resume-adapter-file"
            )
        steps = StepSource(train, self.batches, self.program)
        steps.token_limit = fitting_tokens(largest, model, train.longest)
        if validation is not None:
            validation.limit_tokens(steps.token_limit)
        # Loading a tokenizer takes seconds; a resumed run with cached tokens and no samples needs none.
        prompter = Prompter(model.path, trust_remote_code=config.trust_remote_code) if config.sample_prompt else None
        work = Work(
            job=job_spec(self._beginning(resumed), model.path, self.run_id, self.work_folder, self.cache_threshold),
            program=self.program,
            steps=steps,
            validation=validation,
            samples=sample_prompts(config, prompter) if prompter else (),
            decode=prompter.decode if prompter else lambda _: "",
            early_stop=config.early_stop,
            save_best=config.early_stop is not None or config.keep_last is not None,
            data_digest=train.digest,
        )
        return Engine(
            work, self._start_worker, Checkpoints(self.folder, config.keep_last), self.reader, resumed, self.stop
        )

    def _beginning(self, resumed: Checkpoint | None) -> TrainConfig:
        """The options with the file that the weights begin from, where it cannot be moved away or overwritten."""
        given = self.config.resume_adapter_file
        if given is None:
            return self.config
        if resumed is not None:
            # A checkpoint holds all weights that are trained; the file that they began from may be gone by now.
            return dataclasses.replace(self.config, resume_adapter_file=None)
        self.work_folder.mkdir(parents=True, exist_ok=True)
        kept = self.work_folder / INITIAL_WEIGHTS
        shutil.copyfile(given, kept)
        return dataclasses.replace(self.config, resume_adapter_file=str(kept))

    async def _start_worker(self) -> WorkerLink:
        return await LocalWorker.start(self.work_folder)

    def _open_books(self, engine: Engine) -> None:
        """From here on the run writes: everything that could be checked before has been."""
        if self.resume:
            engine.replayed_steps += self.books.take_up(engine.progress.step)
        else:
            self.books.begin()

    # --- training and after -----------------------------------------------------------------------------------------

    async def _train(self, engine: Engine, ready: Ready, model: ResolvedModel, data: dict[str, TokenSet]) -> RunResult:
        self.reader.handle(
            RunStarted(
                run=self.run_id,
                name=self.config.adapter_path,
                config=dataclasses.asdict(self.config),
                total_iters=self.program.total_iters,
                total_steps=self.program.total_steps,
                first_step=engine.progress.step + 1,
                facts=self._facts(ready, model, data, engine),
                history=tuple(self.books.history),
            )
        )
        for note in ready.notes:
            self.reader.handle(Noted("model", note))
        try:
            await engine.run()
            return await self._finish(engine, model, data)
        except (TandemError, OSError) as error:
            self._finish_failed(engine, error)
            raise

    def _facts(
        self, ready: Ready, model: ResolvedModel, data: dict[str, TokenSet], engine: Engine
    ) -> tuple[tuple[str, str], ...]:
        config, train = self.config, data["train"]
        share = 100 * ready.trainable_parameters / max(ready.parameters, 1)
        method = {"lora": "LoRA", "dora": "DoRA", "full": "full"}[config.fine_tune_type]
        if ready.quantized:
            method = "Q" + method
        if config.fine_tune_type != "full":
            method += f" rank {config.lora_rank}, scale {config.scale:g}"
        method += f", {ready.trained_layers} of {ready.layers} layers"
        method += f", {ready.trainable_parameters:,} parameters trained ({share:.2g} %)"
        rows = f"{len(train):,} rows, {self.batches.per_epoch:,} batches of {config.batch_size} in an epoch"
        if "valid" in data:
            rows += f"; {len(data['valid']):,} rows to validate on"
        lines = [
            ("model", f"{model.name} · {ready.model_type} · {ready.parameters:,} parameters"),
            ("nodes", f"this machine alone: {describe(facts())}"),
            ("method", method),
            ("data", rows),
        ]
        if engine.progress.step:
            lines.append(("resumed", f"from step {engine.progress.step} of {self.program.total_steps}"))
        return tuple(lines)

    async def _finish(self, engine: Engine, model: ResolvedModel, data: dict[str, TokenSet]) -> RunResult:
        progress = engine.progress
        if engine.saved_step != progress.step:
            raise TandemError(
                f"training reached step {progress.step}, but the last checkpoint that could be written to"
                f" {self.folder.path} is of step {engine.saved_step}; make room on the disk and go on with --resume"
            )
        best = self._publish_best(engine)
        test_loss = None
        if "test" in data:
            evaluation = Evaluation(data["test"], self.config.batch_size, self.config.test_batches)
            loss_sum, tokens = await engine.evaluate_at(best, evaluation, "testing")
            test_loss = loss_sum / max(tokens, 1)
            self.reader.handle(Tested(test_loss, tokens))
        await engine.close()
        written = await fuse_result(self.config, model.path, model.name, self.folder, self.reader)
        status = "stopped_early" if engine.stopped_early else "done"
        result = RunResult(
            run=self.run_id,
            status=status,
            folder=self.folder.path,
            steps=progress.step,
            best_step=progress.best_step,
            best_val_loss=progress.best_loss,
            test_loss=test_loss,
            replayed_steps=engine.replayed_steps,
            written=written,
        )
        published = progress if best is None else dataclasses.replace(progress, step=best.progress.step)
        lines = summary(self.folder, published, test_loss, engine.replayed_steps, written)
        self.books.close(status, lines, next_commands(self.config, self.config.model, status, written))
        return result

    def _publish_best(self, engine: Engine) -> Checkpoint | None:
        """After an early stop the best checkpoint is the result, if it could be written; None: the last step is."""
        if not engine.stopped_early:
            return None
        checkpoints = Checkpoints(self.folder, None)
        for checkpoint in checkpoints.newest_first():
            if checkpoint.progress.step == engine.progress.best_step:
                checkpoints.publish(checkpoint.folder)
                return checkpoint
        return None

    def _finish_failed(self, engine: Engine, error: TandemError | OSError) -> None:
        self.reader.handle(Noted("failed", str(error), "error"))
        lines: tuple[tuple[str, str], ...] = (("failed", str(error)),)
        commands: tuple[tuple[str, str], ...] = ()
        if engine.saved_step:
            lines += (("saved", f"checkpoint of step {engine.saved_step} in {self.folder.path}"),)
            commands = next_commands(self.config, self.config.model, "failed", ())
        self.books.close("failed", lines, commands)

    def _interrupted(self, engine: Engine) -> Interrupted:
        commands = next_commands(self.config, self.config.model, "interrupted", ())
        if not engine.saved_step:
            line = "stopped before the first step was saved"
            if self.books.opened:
                self.books.close("interrupted", (("stopped", line),), ())
            return Interrupted(line)
        total, last = self.program.total_steps, engine.saved_step
        line = f"stopped at step {last} of {total}; everything is saved"
        if last != engine.progress.step:
            line = f"stopped at step {engine.progress.step} of {total}; the last checkpoint is of step {last}"
        self.books.close("interrupted", (("stopped", line),), commands)
        return Interrupted(line)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C: finish the running step, save, end. Second: leave at once; what is on disk is whole."""
        loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

        def on_signal(number: signal.Signals) -> None:
            if self.stop.is_set():
                if number == signal.SIGHUP:
                    return  # a closing terminal tells its programs more than once
                self.view.close()
                os._exit(Interrupted.exit_code)
            self.stop.set()
            line = "stopping; Ctrl-C again leaves at once"
            self.reader.handle(Noted("stopping", line))

        try:
            for number in handled:
                loop.add_signal_handler(number, on_signal, number)
        except (RuntimeError, ValueError):
            # Not in the main thread (a notebook, a test): Ctrl-C is not ours there.
            yield
            return
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)
