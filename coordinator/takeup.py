"""Where a resumed run goes on from: the newest state that anyone still holds.

That is its newest checkpoint, or what a node or this machine kept when the coordinator went away. A kept state may be
ahead of the metrics: steps that a worker had applied and nobody had recorded. They are recorded from what it said of
them, so nothing is computed twice and no step is missing. What belongs to a state is decided purely (``History``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.checkpoint import OPTIMIZER, WEIGHTS, Checkpoint, Checkpoints, Progress
from coordinator.discovery import SeenNode
from coordinator.ledger import metrics_of
from coordinator.program import Action, Program
from coordinator.stream import Noted, Reader
from node import rpc, wire
from node.client import NodeClient
from node.copies import StateCopy
from node.errors import NodeError, NodeLost, TandemError
from node.events import Copied, StepDone
from node.files import link_or_copy, make_private_folder, sha256_of
from node.home import hold_leftovers, holds
from node.listener import SLOWEST_COPY_BYTES_PER_SECOND
from node.spec import FileRef
from node.tensors import check_numbers

BUSY_SECONDS = 45.0
"""For a node that still works for the run: to notice that its coordinator is gone, and to write its worker's state."""

Entry = dict[str, Any]


# --- deciding: pure ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """What is known of a run that was cut off.

    Attributes:
        before: of its newest checkpoint; of its beginning where there is none.
        entries: of ``metrics.jsonl``, in their order.
        then, now: the program as it was, and as the run is to go on.
    """

    before: Progress
    entries: Sequence[Entry]
    then: Program
    now: Program

    def unrecorded(self, step: int) -> list[int]:
        """Steps after the checkpoint, up to this one, that do not stand in the metrics."""
        recorded = {entry.get("step") for entry in self.entries if "loss" in entry}
        return [number for number in range(self.before.step + 1, step + 1) if number not in recorded]

    def iteration(self, step: int) -> int:
        """Batches trained on when this step was done."""
        for entry in self.entries:
            if entry.get("step") == step and "iter" in entry:
                return int(entry["iter"])
        return self.then.last_iter(step)

    def objection(self, step: int, told: Mapping[int, StepDone]) -> str:
        """Why a run cannot go on from the state of a step; "" when it can.

        Args:
            step: that the state follows.
            told: what its worker said of the steps before.
        """
        if step > self.now.total_steps or self.now.last_iter(step) != self.iteration(step):
            return f"with --iters {self.now.total_iters} the run has no such step"
        missing = self.unrecorded(step)
        if not missing:
            return ""
        unknown = [number for number in missing if number not in told]
        if unknown:
            return f"step {unknown[0]} is recorded nowhere"
        for number in missing:
            if not math.isfinite(told[number].loss_sum) or not math.isfinite(told[number].grad_norm):
                return f"its loss or gradient was not finite at step {number}"
        # A validation is a barrier: only a state of another sitting, whose metrics were cut back, can be past one.
        validated = {entry.get("step") for entry in self.entries if "val_loss" in entry}
        for number in range(max(missing[0] - 1, self.before.validated_step + 1), step):
            if number not in validated and next(self.then.actions(number, -1), None) == Action("validate", number):
                return f"the validation of step {number} is recorded nowhere"
        return ""

    def recovered(self, step: int, told: Mapping[int, StepDone]) -> list[Entry]:
        """What belongs into ``metrics.jsonl`` of the steps that do not stand there."""
        steps = [entry for entry in self.entries if "loss" in entry]
        last = steps[-1] if steps else {}
        return [_entry(told[number], self.then.last_iter(number), last) for number in self.unrecorded(step)]

    def progress(self, step: int, recovered: Sequence[Entry] = ()) -> Progress:
        """What the coordinator would remember at a step, as it did when it recorded it.

        Args:
            step: at or after the checkpoint's.
            recovered: further entries; see above.
        """
        progress = dataclasses.replace(self.before, step=step, iteration=self.iteration(step))
        for entry in (*self.entries, *recovered):
            number = entry.get("step", 0)
            if number > step:
                continue
            if "val_loss" in entry:
                if number > self.before.validated_step:
                    progress = _validated(progress, number, float(entry["val_loss"]))
                    progress = _spent(progress, entry)
            elif number > self.before.step:
                progress = _spent(progress, entry)
        return progress

    def scheduled(self, step: int) -> bool:
        """Whether a checkpoint was due since the last one: the one of this step takes its place."""
        return any(self.now.saves(number) for number in range(self.before.step + 1, step + 1))


def _entry(done: StepDone, iteration: int, last: Entry) -> Entry:
    """As ``engine`` writes it. Of several ranks only one is known here: what needs all of them is left out.

    Args:
        done: what one rank said.
        iteration: of the step.
        last: the entry of the last step that was recorded: of as many ranks, with as many rows.
    """
    entry: Entry = {
        "step": done.step,
        "iter": iteration,
        "loss": done.loss_sum / max(done.tokens, 1),
        "tokens": done.tokens,
        "learning_rate": done.learning_rate,
        "grad_norm": done.grad_norm,
        "seconds": done.seconds,
    }
    if last.get("nodes") != 1:
        return entry
    rows = {name: int(part["rows"]) for name, part in last.get("per_node", {}).items()}
    return {**entry, **metrics_of(dict.fromkeys(rows or [""], done), rows)}


def _spent(progress: Progress, entry: Entry) -> Progress:
    return dataclasses.replace(progress, seconds=progress.seconds + float(entry.get("seconds", 0.0)))


def _validated(progress: Progress, step: int, loss: float) -> Progress:
    """As ``engine`` enters a validation: the loss before any update neither is the best nor uses up patience."""
    progress = dataclasses.replace(progress, validated_step=step)
    if step == 0:
        return progress
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        return dataclasses.replace(progress, best_loss=loss, best_step=step, stale_validations=0)
    return dataclasses.replace(progress, stale_validations=progress.stale_validations + 1)


def told_by(copy: StateCopy) -> dict[int, StepDone]:
    """What a worker said of the steps up to its copy.

    Raises:
        WireError: something else than steps is among it.
    """
    told: dict[int, StepDone] = {}
    for data in copy.steps:
        _, event = wire.decode_event(data)
        if not isinstance(event, StepDone):
            raise wire.WireError(f"a {type(event).__name__} where steps are expected")
        if event.step <= copy.step:
            told[event.step] = event
    return told


# --- finding and fetching ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A kept state of the run.

    Attributes:
        copy: which it is.
        holder: who has it, for people.
        address: of the node; "" where its files are in this ``TANDEM_HOME``.
        certificate: of the node's ``TANDEM_HOME``, in PEM.
    """

    copy: StateCopy
    holder: str
    address: str = ""
    certificate: bytes | None = None


@dataclass(frozen=True)
class TakenUp:
    """What a run goes on from.

    Attributes:
        checkpoint: to go on from; where it is of a kept state it is on disk after ``store``.
        entries: for the metrics: steps that nobody had recorded.
        copied: the kept state, or None where the checkpoint was there.
        folder: where its files are.
        message: who had it, for people; "" where nobody had to be asked.
        details: likewise, for ``events.jsonl``.
    """

    checkpoint: Checkpoint
    entries: tuple[Entry, ...] = ()
    copied: Copied | None = None
    folder: Path = Path()
    message: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def store(self, checkpoints: Checkpoints) -> None:
        """Make a checkpoint of the kept state. The metrics must hold its steps by now.

        Raises:
            TandemError: it cannot be written; whoever has the state still has it.
        """
        if self.copied is None:
            return
        progress = self.checkpoint.progress
        try:
            checkpoints.save(self.copied, self.folder, progress, scheduled=self.checkpoint.scheduled)
        except OSError as error:
            raise TandemError(
                f"the checkpoint of step {progress.step} cannot be written to {self.checkpoint.folder.parent}:"
                f" {error.strerror or error}; make room there and try --resume again"
            ) from error


async def take_up(
    run: str,
    history: History,
    checkpoint: Checkpoint | None,
    checkpoints: Checkpoints,
    nodes: Sequence[SeenNode],
    folder: Path,
    reader: Reader,
) -> TakenUp | None:
    """Find the newest state to go on from, and have its files here. Nothing is written but into ``folder``.

    Args:
        run: its id.
        history: what is known of it.
        checkpoint: the newest that is intact, or None.
        checkpoints: of the run.
        nodes: to be asked; they have answered before.
        folder: for files that are fetched.
        reader: takes what is worth saying.

    Returns:
        None where there is nothing to go on from.
    """
    size = checkpoint.weights.size + checkpoint.optimizer.size if checkpoint is not None else 0
    found = [*await asyncio.to_thread(_kept_here, run), *await _kept_there(run, nodes, size, reader)]
    for source in sorted(found, key=lambda source: source.copy.step, reverse=True):  # of equal ones the nearest
        step = source.copy.step
        if step <= history.before.step:
            break
        try:
            told = told_by(source.copy)
            reason = history.objection(step, told)
            if not reason:
                await fetch(run, source, folder)
                return _taken(source, told, history, checkpoint, checkpoints, folder)
        except (TandemError, OSError) as error:
            reason = str(error)
        reader.handle(Noted("held_unused", f"{source.holder} holds step {step}, which is of no use: {reason}"))
    return TakenUp(checkpoint) if checkpoint is not None else None


def _taken(
    source: Source,
    told: Mapping[int, StepDone],
    history: History,
    checkpoint: Checkpoint | None,
    checkpoints: Checkpoints,
    folder: Path,
) -> TakenUp:
    step = source.copy.step
    entries = history.recovered(step, told)
    progress = history.progress(step, entries)
    weights, optimizer = (FileRef(file.name, file.sha256, file.size) for file in source.copy.files)
    before = f"the checkpoint was of step {checkpoint.progress.step}" if checkpoint else "there was no checkpoint yet"
    return TakenUp(
        Checkpoint(
            checkpoints.place(progress),
            progress,
            dataclasses.replace(weights, name=WEIGHTS),
            dataclasses.replace(optimizer, name=OPTIMIZER),
            history.scheduled(step),
        ),
        tuple(entries),
        Copied(step, requested=True, weights=weights, optimizer=optimizer),
        folder,
        f"went on from step {step}, which {source.holder} held; {before}",
        {
            "step": step,
            "holder": source.holder,
            "checkpoint_step": checkpoint.progress.step if checkpoint else None,
            "recovered_steps": len(entries),
        },
    )


def _kept_here(run: str) -> list[Source]:
    try:
        # Nobody else works for this run while its folder is locked, so what its workers left here is left.
        hold_leftovers(run)
        copy = holds().find(run)
    except TandemError:
        return []  # an id that is none
    return [Source(copy, "this machine")] if copy is not None else []


async def _kept_there(run: str, nodes: Iterable[SeenNode], size: int, reader: Reader) -> list[Source]:
    """What nodes hold of a run; all are asked at the same time."""

    async def ask(node: SeenNode) -> Source | None:
        name = node.label or node.name
        busy = node.info is not None and node.info.busy is not None and node.info.busy.run == run
        patience = rpc.CALL_SECONDS
        if busy:
            patience = BUSY_SECONDS + size / SLOWEST_COPY_BYTES_PER_SECOND
            reader.handle(Noted("waiting", f"{name} still works for this run; waiting for what it has"))
        client = NodeClient(node.address, name, node.certificate)
        try:
            copy = await client.held(run, patience)
        except NodeLost as error:
            reader.handle(Noted("warning", f"{name} does not say what it holds of this run: {error}", "warning"))
            return None
        except TandemError:  # of a version that holds nothing, or nonsense
            return None
        finally:
            await client.close()
        return Source(copy, name, node.address, node.certificate) if copy is not None else None

    answers = await asyncio.gather(*(ask(node) for node in nodes))
    return [source for source in answers if source is not None]


async def fetch(run: str, source: Source, folder: Path) -> None:
    """Have a kept state's files in a folder, each of them verified.

    Raises:
        NodeError: they cannot be had.
        TandemError: they are not what they should be.
        OSError: they cannot be read or written here.
    """
    make_private_folder(folder)
    if source.address:
        client = NodeClient(source.address, source.holder, source.certificate)
        try:
            for file in source.copy.files:
                await client.fetch_held(run, file, folder / file.name)
        finally:
            await client.close()
    for file in source.copy.files:
        if not source.address:
            link_or_copy(holds().path(run, file.name), folder / file.name)
            if await asyncio.to_thread(sha256_of, folder / file.name) != file.sha256:
                raise NodeError(f"{file.name} is damaged")
        await asyncio.to_thread(check_numbers, folder / file.name)
