"""A training run from its options to its receipt."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.alone import Alone
from coordinator.books import Books
from coordinator.checkpoint import Checkpoint, Checkpoints, Progress
from coordinator.checks import check_model, check_options, data_warnings
from coordinator.config import TrainConfig
from coordinator.config_file import merge, read_yaml
from coordinator.crew import Member, StopRequested, unless_stopped
from coordinator.data.batches import Batches
from coordinator.data.padding import positions_at_once
from coordinator.data.tokenset import TokenSet
from coordinator.engine import Engine, Work
from coordinator.finish import fuse_result, next_commands, summary
from coordinator.fleet import Ahead, Fleet, Selection, Wanted, looking
from coordinator.growing import Growing
from coordinator.home import holds, new_job_folder
from coordinator.models import ResolvedModel, resolve
from coordinator.planner import Plan
from coordinator.preflight import check_before_loading, check_memory, fitting_tokens
from coordinator.program import Program
from coordinator.prompts import Prompter, sample_prompts
from coordinator.regroup import Muster
from coordinator.run_log import RunLog
from coordinator.runfolder import RunFolder, read_json_lines
from coordinator.running.control import STOP_SIGNAL
from coordinator.running.index import new_id
from coordinator.running.presence import present
from coordinator.shares import Evaluation, StepSource
from coordinator.specs import job_spec
from coordinator.stream import (
    DOWNLOADING,
    FAILED,
    STOPPED,
    Advanced,
    Broadcast,
    Noted,
    Reader,
    RunStarted,
    StepFinished,
    Tested,
)
from coordinator.takeup import History, TakenUp, take_up
from coordinator.tokens import token_sets
from node import power
from node.awake import Awake
from node.errors import Interrupted, TandemError, UserError, WorkerError
from node.files import sha256_of
from node.hardware import describe, facts
from node.ring_end import RingWorker
from node.sizes import parse_size
from node.spec import FileRef
from node.supervisor import WorkerLink

INITIAL_WEIGHTS = "initial.safetensors"


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run: its id.
        status: ``done``, ``stopped_early`` or, when it was stopped before its end, ``interrupted``.
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


class Stopped(Interrupted):
    """A run was stopped before its end.

    Args:
        message: where, what is saved, and how to go on.
        result: what there is so far.
    """

    def __init__(self, message: str, result: RunResult) -> None:
        super().__init__(message)
        self.result = result


async def plan(config: TrainConfig, view: Reader) -> Plan:
    """Find the nodes, have them load the model, measure, and say who would do what. Nothing is written.

    Raises:
        As ``train``.
    """
    with contextlib.closing(Broadcast([view, RunLog()])) as reader:
        job = _Job(config, reader, view, resume=False)
        job.plan_only = True
        await job.run()
        assert job.fleet is not None
        assert job.fleet.plan is not None
        return job.fleet.plan


async def train(
    config: TrainConfig,
    view: Reader,
    *,
    resume: bool = False,
    stop: asyncio.Event | None = None,
    run: str | None = None,
    log: Path | None = None,
) -> RunResult:
    """Run a training.

    Args:
        config: all options.
        view: shows the run; closed when it ends.
        resume: go on with the run in the adapter folder, from the newest state that anyone holds.
        stop: set, from this event loop, by whoever wants it to save and end. Ctrl-C does, too, where signals can be
            caught.
        run: the id of a new run; one is made when it is None.
        log: where the view writes when nobody sees it, for those who ask.

    Raises:
        UserError: a mistake in what was asked for; nothing was written.
        Stopped: by Ctrl-C or ``stop``; the state is saved.
        TandemError: the run failed.
    """
    with contextlib.closing(Broadcast([view, RunLog()])) as reader:
        job = _Job(config, reader, view, resume, stop, run, log)
        try:
            result = await job.run()
        except Interrupted as error:
            raise Stopped(str(error), job.result("interrupted")) from None
        assert result is not None
        return result


class _Job:
    """One run in the making: what each stage finds out, for the stages after it."""

    def __init__(
        self,
        config: TrainConfig,
        reader: Broadcast,
        view: Reader,
        resume: bool,
        stop: asyncio.Event | None = None,
        run: str | None = None,
        log: Path | None = None,
    ) -> None:
        self.config = config
        self.reader = reader
        self.view = view
        self.resume = resume
        self.folder = RunFolder(Path(config.adapter_path))
        self.stop = stop if stop is not None else asyncio.Event()
        self.run_id = (self.folder.run_id() if resume else None) or run or new_id()
        self.work_folder = new_job_folder(self.run_id)
        self.log = log
        self.plan_only = False
        self.selection: Selection | None = None
        self.fleet: Fleet | None = None
        self.taken: TakenUp | None = None
        self.engine: Engine | None = None
        self.progress = Progress(0, 0)
        self.validation: Evaluation | None = None
        self.token_limit: int | None = None
        self.early: asyncio.Task[RingWorker] | None = None

    async def run(self) -> RunResult | None:
        """Do all of it; None where only the plan was asked for."""
        check_options(self.config, resume=self.resume)
        with self._signals() as heeded, self._seen(heeded), Awake() as awake:
            if awake.trouble:
                self.reader.handle(Noted("awake", awake.trouble, "warning"))
            # While the model is looked for, so are the nodes.
            async with looking(self.config, self.reader, plan_only=self.plan_only) as nodes:
                resolving = asyncio.create_task(
                    asyncio.to_thread(
                        resolve,
                        self.config.model,
                        progress=self._advance,
                        trust_remote_code=self.config.trust_remote_code,
                    )
                )
                try:
                    self.selection = await nodes
                except BaseException:
                    self.stop.set()  # ends a download
                    await asyncio.gather(resolving, return_exceptions=True)
                    raise
                model = await resolving
            self._check_inputs(model)
            if await asyncio.to_thread(power.on_battery):
                line = "this machine runs on battery power: plug it in, or the run ends with the battery"
                self.reader.handle(Noted("battery", line, "warning"))
            try:
                async with self._early_worker():
                    return await self._prepared(model)
            except WorkerError:
                self._hold_copies()
                # The worker's log is what its message points to.
                for copy in self.work_folder.glob("*.safetensors"):
                    copy.unlink()
                raise
            except BaseException:
                self._hold_copies()
                shutil.rmtree(self.work_folder, ignore_errors=True)
                raise
            finally:
                if self.fleet is not None:
                    await self.fleet.close()
                self.folder.unlock()

    async def _prepared(self, model: ResolvedModel) -> RunResult | None:
        """The rest of the run, once the model is here."""
        checkpoint = None
        if self.resume:
            self.folder.lock()
            checkpoint = self._checkpoint()
            self.progress = checkpoint.progress if checkpoint is not None else self.progress
        if self.selection is not None:
            self.fleet = Fleet(Ahead(self.config, model, self.run_id), self.selection, self.reader, self.stop)
            if not self.resume:  # else the nodes are asked first what they hold of the run
                self.fleet.begin()
        data = await asyncio.to_thread(self._prepare, model)
        self._resolve_counts(data["train"])
        self.program = _program(self.config, validates="valid" in data)
        if self.resume:
            self.taken = await self._take_up(checkpoint, data)
        engine = self.engine = self._engine(model, data, self.taken.checkpoint if self.taken is not None else None)
        try:
            members = await engine.prepare()
            if self.fleet is not None and self.selection is not None:
                self.token_limit = self.fleet.token_limit
                if self.validation is not None:
                    self.validation.limit_tokens(self.token_limit)
            if self.plan_only:
                return None
            await self._open_books(engine)
            result = await self._train(engine, members, model, data)
        except StopRequested as error:
            raise self._interrupted(engine) from error
        except UserError as error:
            # The worker knows its own copy of the file only.
            given = self.config.resume_adapter_file
            raise UserError(
                re.sub(rf"\S*{re.escape(INITIAL_WEIGHTS)}", given or INITIAL_WEIGHTS, str(error))
            ) from error
        finally:
            if self.fleet is not None and engine.saved_step < engine.progress.step:
                self.fleet.keep_states()
            await engine.close()
        shutil.rmtree(self.work_folder, ignore_errors=True)
        self._drop_hold()
        return result

    # --- before training ------------------------------------------------------------------------------------------

    def _check_inputs(self, model: ResolvedModel) -> None:
        self.cache_threshold = parse_size(self.config.clear_cache_threshold, "--clear-cache-threshold")
        self.folder.check_free()
        warnings = check_model(self.config, model, resume=self.resume)
        # Of several machines, the plan decides who has the memory.
        here = self.selection is None
        for warning in [*warnings, *check_before_loading(self.config, model, memory=here)]:
            self.reader.handle(Noted("warning", warning, "warning"))

    def _checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is intact."""

        def damaged(message: str) -> None:
            self.reader.handle(Noted("damaged_checkpoint", message, "warning"))

        checkpoints = Checkpoints(self.folder, self.config.keep_last)
        checkpoints.sweep()
        return checkpoints.newest_intact(damaged)

    async def _take_up(self, checkpoint: Checkpoint | None, data: dict[str, TokenSet]) -> TakenUp:
        """The newest state of this run that anyone holds."""
        then = merge(read_yaml(self.folder.config), {})
        then = dataclasses.replace(then, iters=then.total_iters(self.batches.per_epoch), epochs=None)
        before = checkpoint.progress if checkpoint is not None else Progress(0, 0, data_digest=data["train"].digest)
        taken = None
        if checkpoint is not None or self.folder.data_digest() is not None:
            history = History(
                dataclasses.replace(before, data_digest=self.folder.data_digest() or before.data_digest),
                read_json_lines(self.folder.metrics),
                _program(then, validates="valid" in data and then.val_batches != 0),
                self.program,
            )
            nodes = self.selection.nodes if self.selection is not None else ()
            checkpoints = Checkpoints(self.folder, self.config.keep_last)
            folder = self.work_folder / "taken"
            finding = take_up(self.run_id, history, checkpoint, checkpoints, nodes, folder, self.reader)
            try:
                taken = await unless_stopped(finding, self.stop)
            except StopRequested as error:
                raise Interrupted("stopped before training began; nothing was written") from error
        if taken is None:
            raise UserError(
                f"--resume: no usable checkpoint in {self.folder.checkpoints}, and nobody holds a state of this run;"
                " start without --resume, perhaps with --resume-adapter-file to begin from the weights of an older one"
            )
        return taken

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
        self.reader.handle(Advanced(task, done, total, in_bytes=task == DOWNLOADING))

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
        self.validation = validation
        largest = dataclasses.replace(config, batch_size=min(config.batch_size, len(train)))
        if self.selection is None:
            for warning in check_memory(largest, model, train.longest):
                self.reader.handle(Noted("warning", warning, "warning"))
        if resumed is not None and self.program.total_iters < resumed.progress.iteration:
            raise UserError(
                f"--iters {self.program.total_iters}: the run has done {resumed.progress.iteration} already; give more"
                " to go on with it, or use what it has saved as it is"
            )
        if resumed is not None and self.program.last_iter(resumed.progress.step) != resumed.progress.iteration:
            raise UserError(
                f"--iters {config.iters}: the run ended within a step of --grad-accumulation-steps"
                f" {config.grad_accumulation_steps}, which cannot be taken up again; start a new run from its adapter"
                " with --resume-adapter-file"
            )
        if resumed is not None and config.local_steps > 1 and not self.program.saves(resumed.progress.step):
            line = f"the state of step {resumed.progress.step} was saved between two checkpoints"
            hint = f"every machine begins with the {config.optimizer} moments of the one that saved it"
            self.reader.handle(Noted("warning", f"--local-steps: {line}: {hint}", "warning"))
        steps = StepSource(train, self.batches, self.program, positions_at_once(config.fine_tune_type))
        steps.token_limit = fitting_tokens(largest, model, train.longest) if self.selection is None else None
        self.token_limit = steps.token_limit
        if validation is not None:
            validation.limit_tokens(steps.token_limit)
        # Loading a tokenizer takes seconds; a resumed run with cached tokens and no samples needs none.
        prompter = Prompter(model.path, trust_remote_code=config.trust_remote_code) if config.sample_prompt else None
        beginning, given = self._beginning(resumed)
        spec = job_spec(
            beginning,
            model.path,
            self.run_id,
            self.work_folder,
            self.cache_threshold,
            rows_return=self.program.total_iters > self.batches.per_epoch,
        )
        work = Work(
            folder=self.work_folder,
            program=self.program,
            steps=steps,
            validation=validation,
            samples=sample_prompts(config, prompter) if prompter else (),
            decode=prompter.decode if prompter else lambda _: "",
            early_stop=config.early_stop,
            save_best=config.early_stop is not None or config.keep_last is not None,
            data_digest=train.digest,
            reuse_prefix=spec.reuse_prefix,
        )
        muster = self._muster(Wanted(config, model, spec, given, steps, train, self.program))
        return Engine(work, muster, Checkpoints(self.folder, config.keep_last), self.reader, resumed, self.stop)

    def _muster(self, wanted: Wanted) -> Muster:
        """Where the workers come from."""
        if self.fleet is not None:
            self.fleet.want(wanted)
            return self.fleet
        alone = Alone(self._start_worker, wanted.job, wanted.given, self.reader, self.stop)
        if wanted.config.nodes == "local":
            return alone
        self.fleet = Growing(wanted, alone, self.reader, self.stop)
        return self.fleet

    def _beginning(self, resumed: Checkpoint | None) -> tuple[TrainConfig, dict[FileRef, Path]]:
        """The options as the workers are to know them, and the file that the weights begin from.

        It is copied, so that it can be moved away or overwritten meanwhile.
        """
        given = self.config.resume_adapter_file
        if given is None:
            return self.config, {}
        if resumed is not None:
            # A checkpoint holds all weights that are trained; the file that they began from may be gone by now.
            return dataclasses.replace(self.config, resume_adapter_file=None), {}
        kept = self.work_folder / "given" / INITIAL_WEIGHTS
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given, kept)
        ref = FileRef(INITIAL_WEIGHTS, sha256_of(kept), kept.stat().st_size)
        return dataclasses.replace(self.config, resume_adapter_file=INITIAL_WEIGHTS), {ref: kept}

    @contextlib.asynccontextmanager
    async def _early_worker(self) -> AsyncIterator[None]:
        """Where this machine trains alone, start the worker now: it imports for seconds, while the data is read."""
        if self.selection is None:
            self.early = asyncio.create_task(RingWorker.start(self.work_folder))
        try:
            yield
        finally:
            if self.early is not None:
                # Nobody came to ask for it.
                with contextlib.suppress(OSError):
                    worker = await self.early
                    worker.kill()
                    await worker.close()

    async def _start_worker(self) -> WorkerLink:
        early, self.early = self.early, None
        return await (early or RingWorker.start(self.work_folder))

    async def _open_books(self, engine: Engine) -> None:
        """From here on the run writes: everything that could be checked before has been."""
        if self.config.gradient_dtype == "auto":
            # Chosen once for the whole run, sittings to come among it.
            chosen = self.fleet.gradient_dtype if self.fleet is not None else "fp32"
            self.config = dataclasses.replace(self.config, gradient_dtype=chosen)
            self.books = Books(self.config, self.folder, self.run_id, self.reader)
        if self.taken is None:
            self.books.begin(engine.progress.data_digest)
            return
        taken = self.taken
        engine.replayed_steps += self.books.take_up(engine.progress.step, taken.entries)
        await asyncio.to_thread(taken.store, Checkpoints(self.folder, self.config.keep_last))
        if taken.message:
            self.reader.handle(Noted("taken_up", taken.message, details=taken.details))

    # --- training and after -----------------------------------------------------------------------------------------

    async def _train(
        self, engine: Engine, members: list[Member], model: ResolvedModel, data: dict[str, TokenSet]
    ) -> RunResult:
        self.reader.handle(
            RunStarted(
                run=self.run_id,
                name=self.config.adapter_path,
                config=dataclasses.asdict(self.config),
                total_iters=self.program.total_iters,
                total_steps=self.program.total_steps,
                first_step=engine.progress.step + 1,
                facts=self._facts(members, model, data, engine),
                history=tuple(self.books.history),
                recovered=tuple(
                    StepFinished(entry, self.program.reports(entry["step"]))
                    for entry in (self.taken.entries if self.taken is not None else ())
                ),
            )
        )
        for note in members[0].ready.notes:
            self.reader.handle(Noted("model", note))
        try:
            await engine.run()
            return await self._finish(engine, model, data)
        except (TandemError, OSError) as error:
            self._finish_failed(engine, error)
            raise

    def _facts(
        self, members: list[Member], model: ResolvedModel, data: dict[str, TokenSet], engine: Engine
    ) -> tuple[tuple[str, str], ...]:
        config, train, ready = self.config, data["train"], members[0].ready
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
            *(("nodes", line) for line in self._who()),
            ("method", method),
            ("data", rows),
        ]
        if engine.progress.step:
            lines.append(("resumed", f"from step {engine.progress.step} of {self.program.total_steps}"))
        return tuple(lines)

    def _who(self) -> list[str]:
        if self.fleet is None or self.fleet.plan is None:
            return [f"this machine alone: {describe(facts())}"]
        return self.fleet.lines()

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
            limits = [self.token_limit, self.fleet.token_limit if self.fleet is not None else None]
            evaluation.limit_tokens(min((limit for limit in limits if limit is not None), default=None))
            loss_sum, tokens = await engine.evaluate_at(best, evaluation, "testing")
            test_loss = loss_sum / max(tokens, 1)
            self.reader.handle(Tested(test_loss, tokens))
        speed = self.fleet.receipt(engine.tally, engine.final_digest, engine.faults) if self.fleet is not None else ()
        best_node = self.fleet.best_for_fusing() if self.fleet is not None else None
        await engine.close()
        written = await fuse_result(self.config, model, self.folder, self.reader, best_node)
        status = "stopped_early" if engine.stopped_early else "done"
        result = self.result(status, test_loss, written)
        published = progress if best is None else dataclasses.replace(progress, step=best.progress.step)
        lines = summary(self.folder, published, test_loss, engine.replayed_steps, written, speed)
        self.books.close(status, lines, next_commands(self.config, self.config.model, status, written))
        return result

    def result(self, status: str, test_loss: float | None = None, written: tuple[str, ...] = ()) -> RunResult:
        """What there is by now."""
        progress = self.engine.progress if self.engine is not None else self.progress
        return RunResult(
            run=self.run_id,
            status=status,
            folder=self.folder.path,
            steps=progress.step,
            best_step=progress.best_step,
            best_val_loss=progress.best_loss,
            test_loss=test_loss,
            replayed_steps=self.engine.replayed_steps if self.engine is not None else 0,
            written=written,
        )

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
        self.reader.handle(Noted(FAILED, str(error), "error"))
        lines: tuple[tuple[str, str], ...] = ((FAILED, str(error)),)
        commands: tuple[tuple[str, str], ...] = ()
        if engine.saved_step:
            lines += (("saved", f"checkpoint of step {engine.saved_step} in {self.folder.path}"),)
            commands = next_commands(self.config, self.config.model, "failed", ())
        exit_code = error.exit_code if isinstance(error, TandemError) else TandemError.exit_code
        self.books.close("failed", lines, commands, exit_code)

    def _hold_copies(self) -> None:
        """Before the worker's copies go: the newest is held where it is newer than any checkpoint."""
        saved = next(Checkpoints(self.folder, None).newest_first(), None)
        with contextlib.suppress(OSError, TandemError):
            holds().take(self.run_id, self.work_folder, newer_than=saved.progress.step if saved is not None else 0)

    def _drop_hold(self) -> None:
        """The run is over: nothing of it need be held here any more."""
        with contextlib.suppress(OSError, TandemError):
            holds().drop(self.run_id)

    def _interrupted(self, engine: Engine) -> Interrupted:
        commands = next_commands(self.config, self.config.model, "interrupted", ())
        if not engine.saved_step:
            line = "stopped before the first step was saved"
            if self.books.opened:
                self.books.close("interrupted", ((STOPPED, line),), (), Interrupted.exit_code)
            return Interrupted(line)
        total, last = self.program.total_steps, engine.saved_step
        line = f"stopped at step {last} of {total}; everything is saved"
        if last != engine.progress.step:
            line = f"stopped at step {engine.progress.step} of {total}; the last checkpoint is of step {last}"
        self.books.close("interrupted", ((STOPPED, line),), commands, Interrupted.exit_code)
        return Interrupted(line)

    @contextlib.contextmanager
    def _seen(self, signals: bool) -> Iterator[None]:
        """Other terminals see that this process is at work on the run, and whether it heeds signals."""
        with contextlib.ExitStack() as stack:
            if not self.plan_only:
                try:
                    stack.enter_context(
                        present(self.run_id, self.folder.path, self.config.model, signals=signals, log=self.log)
                    )
                except OSError as error:
                    line = f"{error.filename} cannot be written ({error.strerror}): no other terminal sees this run"
                    self.reader.handle(Noted("warning", line, "warning"))
            yield

    @contextlib.contextmanager
    def _signals(self) -> Iterator[bool]:
        """First Ctrl-C: finish the running step, save, end. Second: leave at once; what is on disk is whole.

        Gives whether signals reach us.
        """
        loop = asyncio.get_running_loop()
        handled: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP_SIGNAL)

        def on_signal(number: signal.Signals) -> None:
            if self.stop.is_set():
                if number in (signal.SIGHUP, STOP_SIGNAL):
                    return  # a closing terminal tells its programs more than once, and people ask more than once
                self.view.close()
                os._exit(Interrupted.exit_code)
            self.stop.set()
            typed = number == signal.SIGINT
            line = "stopping; Ctrl-C again leaves at once" if typed else "stopping: the step is finished and saved"
            self.reader.handle(Noted("stopping", line))

        # nohup is meant to outlive its terminal.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = tuple(number for number in handled if number != signal.SIGHUP or not nohup)
        try:
            for number in handled:
                loop.add_signal_handler(number, on_signal, number)
        except (RuntimeError, ValueError):
            # Not in the main thread (a notebook, a test): Ctrl-C is not ours there.
            yield False
            return
        try:
            yield True
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


def _program(config: TrainConfig, *, validates: bool) -> Program:
    """The order of a run with these options, whose ``iters`` are resolved."""
    assert config.iters is not None
    return Program(
        total_iters=config.iters,
        accumulation=config.grad_accumulation_steps,
        save_every=config.save_every,
        steps_per_eval=config.steps_per_eval,
        steps_per_report=config.steps_per_report,
        validates=validates,
        local_steps=config.local_steps,
    )
