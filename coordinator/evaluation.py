"""``coordinator test``: the loss of a model, with or without an adapter, on rows that it was not trained on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from coordinator.adapters import Adapter, model_of, read_adapter
from coordinator.background import in_background
from coordinator.checks import data_warnings
from coordinator.config import TrainConfig
from coordinator.data.source import SPLITS
from coordinator.models import resolve
from coordinator.shares import Evaluation
from coordinator.stream import Advanced, Noted, Reader, perplexity
from coordinator.summing import sum_losses
from coordinator.tokens import token_sets
from coordinator.workers import next_event, task_worker
from node.errors import OutOfMemory, UserError
from node.events import Event
from node.spec import ModelSpec

# Options that a run's own record answers for when they are not said.
FROM_RUN = (
    "data",
    "batch_size",
    "max_seq_length",
    "mask",
    "mask_prompt",
    "hf_dataset",
    "prompt_feature",
    "completion_feature",
    "chat_feature",
    "text_feature",
)


@dataclass(frozen=True)
class TestOptions:
    """What to measure. None means: as the adapter's run had it, or the default of training.

    Attributes:
        model: a Hugging Face repo or a folder; "" is the adapter's.
        adapter_path: folder of an adapter, or "" for the model as it is.
        data: folder or Hugging Face data set.
        split: ``test``, ``valid`` or ``train``.
        test_batches: at most so many batches, spread over the data; -1 all.
        batch_size, max_seq_length, mask, mask_prompt, hf_dataset, prompt_feature, completion_feature, chat_feature,
            text_feature, trust_remote_code: as in ``TrainConfig``.
    """

    __test__: ClassVar[bool] = False

    model: str = ""
    adapter_path: str = ""
    data: str | None = None
    split: str = "test"
    test_batches: int = 500
    batch_size: int | None = None
    max_seq_length: int | None = None
    mask: str | None = None
    mask_prompt: bool | None = None
    hf_dataset: Any = None
    prompt_feature: str | None = None
    completion_feature: str | None = None
    chat_feature: str | None = None
    text_feature: str | None = None
    trust_remote_code: bool | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"--split {self.split!r} is none of {', '.join(SPLITS)}")
        if self.test_batches < -1 or self.test_batches == 0:
            raise UserError(f"--test-batches must be at least 1, or -1 for all, not {self.test_batches}")


@dataclass(frozen=True)
class TestResult:
    """What was measured.

    Attributes:
        loss: mean over the target tokens, in nats.
        perplexity: exp(loss).
        tokens: target tokens.
        rows: rows that were used, of ``total_rows``.
        total_rows: rows of the split.
        batches: chunks of rows.
        seconds: of the evaluation, without loading.
        model, adapter_path, data, split: what was measured on what.
    """

    __test__: ClassVar[bool] = False

    loss: float
    perplexity: float
    tokens: int
    rows: int
    total_rows: int
    batches: int
    seconds: float
    model: str
    adapter_path: str
    data: str
    split: str


async def test(options: TestOptions, view: Reader) -> TestResult:
    """Measure the loss of a data set.

    Args:
        options: what to measure.
        view: is told of progress and warnings.

    Raises:
        UserError: a mistake in what was asked for.
        TandemError: the worker failed.
    """
    adapter = read_adapter(options.adapter_path) if options.adapter_path else None
    config = _settled(options, adapter)
    model = await in_background(
        lambda advance: resolve(config.model, progress=advance, trust_remote_code=config.trust_remote_code), view
    )
    split: Any = options.split
    sets = await in_background(lambda advance: token_sets(config, model, advance, (split,), required=(split,)), view)
    tokens = sets[split]
    for line in data_warnings(options.split, tokens):
        view.handle(Noted("warning", line, "warning"))
    evaluation = Evaluation(tokens, config.batch_size, options.test_batches)
    spec = ModelSpec(str(model.path), str(adapter.path) if adapter else "", config.trust_remote_code)
    try:
        async with task_worker(spec, view) as worker:

            async def answer() -> tuple[int, Event]:
                return 0, await next_event(worker)

            async def pass_over(_worker: int, _event: Event) -> None:
                """Only the answers count."""

            began = time.monotonic()
            loss_sum, count = await sum_losses(
                evaluation,
                0,
                lambda _, request: worker.send(request),
                answer,
                advance=lambda done, total: view.handle(Advanced("testing", done, total)),
                pass_on=pass_over,
            )
            seconds = time.monotonic() - began
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}; try a smaller --batch-size or --max-seq-length") from error
    loss = loss_sum / max(count, 1)
    return TestResult(
        loss=loss,
        perplexity=perplexity(loss),
        tokens=count,
        rows=evaluation.rows,
        total_rows=len(tokens),
        batches=len(evaluation),
        seconds=seconds,
        model=model.name,
        adapter_path=str(adapter.path) if adapter else "",
        data=config.data,
        split=options.split,
    )


def _settled(options: TestOptions, adapter: Adapter | None) -> TrainConfig:
    """What was said, over what the adapter's run had, over the defaults; checked as training's options are."""
    recorded = adapter.settings if adapter is not None else {}
    values = {name: recorded[name] for name in FROM_RUN if recorded.get(name) is not None}
    said = {name: value for name in (*FROM_RUN, "trust_remote_code") if (value := getattr(options, name)) is not None}
    for name, twin in (("mask", "mask_prompt"), ("mask_prompt", "mask"), ("data", "hf_dataset")):
        if name in said and twin not in said:
            values.pop(twin, None)
    return TrainConfig(model=model_of(options.model, adapter), **{**values, **said})
