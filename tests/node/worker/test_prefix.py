"""Frozen blocks run once for each row, and nothing of the training shows that."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from node.spec import OptimizerSpec, Share, TuningSpec
from node.worker import prefix
from node.worker.prefix import Kept
from node.worker.trainer import Trainer
from tests.fixtures.models import FAMILIES, tiny_model
from tests.fixtures.training import InProcess, as_rows, difference, random_batches

UPPER = TuningSpec(num_layers=2, rank=4, scale=10.0, dropout=0.2)
OPTIMIZER = OptimizerSpec(learning_rate=1e-3)
EPOCHS = 3
BATCHES = random_batches(2, masked=True)
ROWS = sum(len(batch) for batch in BATCHES)


def trained(model: Path, spec: Any = UPPER, folder: Path | None = None, *, cut: bool = True) -> InProcess:
    """Two batches, met in each epoch in other company and padding."""

    def adapt(trainer: Trainer) -> None:
        if not cut:
            trainer.prefix = None
        elif trainer.prefix is not None and folder is not None:
            trainer.prefix.kept = Kept(folder)

    run = InProcess(model, spec, OPTIMIZER, adapt=adapt)
    rows = [row for batch in BATCHES for row in batch]
    for epoch in range(EPOCHS):
        turned = rows[epoch:] + rows[:epoch]
        for start in range(0, ROWS, 4):
            run.step(as_rows(turned[start : start + 4], extra_padding=epoch))
    return run


def kept(run: InProcess) -> Kept:
    assert run.trainer.prefix is not None
    assert run.trainer.prefix.kept is not None
    return run.trainer.prefix.kept


@pytest.fixture(autouse=True)
def reading_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as small as these are computed as fast as they are read."""
    monkeypatch.setattr(prefix, "JUDGED_POSITIONS", 1 << 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_trains_as_if_it_were_whole(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "model", family, layers=4)
    whole = trained(model, cut=False)
    run = trained(model, folder=tmp_path)
    assert run.losses == pytest.approx(whole.losses, abs=2e-5)
    assert difference(run.weights, whole.weights) < 1e-3
    assert (kept(run).misses, kept(run).hits) == (ROWS, (EPOCHS - 1) * ROWS)


@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float16", None), ("float32", 4)])
def test_outputs_are_kept_in_the_models_own_precision(tmp_path: Path, dtype: str, quantize: int | None) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=4, dtype=dtype, quantize=quantize)
    computed, read = trained(model), trained(model, folder=tmp_path)
    assert read.losses == pytest.approx(computed.losses, abs=1e-5 if dtype == "float32" else 5e-3)
    positions = sum(len(tokens) - 1 for batch in BATCHES for tokens, _ in batch)
    assert kept(read)._end == positions * 64 * getattr(mx, dtype).size


def test_checkpointed_and_full(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=4)
    for spec in (
        replace(UPPER, grad_checkpoint=True),
        replace(UPPER, fine_tune_type="full"),
        replace(UPPER, num_layers=1),
    ):
        whole, run = trained(model, spec, cut=False), trained(model, spec, tmp_path)
        assert run.losses == pytest.approx(whole.losses, abs=2e-5)
        assert kept(run).hits > 0


def test_noise_on_the_embeddings_is_that_of_the_step(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=4)
    noisy = replace(UPPER, neftune_alpha=5.0)
    whole, run = trained(model, noisy, cut=False), trained(model, noisy)
    assert run.trainer.prefix is not None
    assert run.losses == pytest.approx(whole.losses, abs=2e-5)


@pytest.mark.parametrize("layers", [-1, 4])
def test_nothing_is_below_when_all_blocks_are_trained(tmp_path: Path, layers: int) -> None:
    run = trained(tiny_model(tmp_path / "model", "llama", layers=4), replace(UPPER, num_layers=layers))
    assert run.trainer.prefix is None


def test_blocks_that_share_more_than_their_output_are_not_parted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where upper blocks take the keys and values, or the embeddings, of lower ones."""
    from mlx_lm.models.llama import LlamaModel

    plain = LlamaModel.__call__
    monkeypatch.setattr(
        LlamaModel,
        "__call__",
        lambda self, inputs, *rest, **more: plain(self, inputs, *rest, **more) + self.embed_tokens(inputs),
    )
    model = tiny_model(tmp_path / "model", "llama", layers=4)
    assert trained(model).trainer.prefix is None


def test_code_that_asks_what_a_block_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As hybrids of attention and recurrence may: what stands in for a block is none."""
    from mlx_lm.models.llama import LlamaModel, TransformerBlock

    plain = LlamaModel.__call__

    def asking(self: Any, *given: Any, **more: Any) -> Any:
        blocks = sum(isinstance(block, TransformerBlock) for block in self.layers)
        return plain(self, *given, **more) * blocks

    monkeypatch.setattr(LlamaModel, "__call__", asking)
    assert trained(tiny_model(tmp_path / "model", "llama", layers=4)).trainer.prefix is None


def test_what_does_not_fit_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=4)
    monkeypatch.setattr(prefix, "MOST_BYTES", 3 * 24 * 64 * 4)
    run = trained(model, folder=tmp_path)
    assert 0 < kept(run).hits < (EPOCHS - 1) * ROWS
    assert kept(run)._end <= prefix.MOST_BYTES
    assert run.losses == pytest.approx(trained(model).losses, abs=2e-5)


def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model", "llama", layers=4)
    written = os.pwrite

    def full(descriptor: int, data: Any, offset: int) -> int:
        if offset > 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(descriptor, data[: len(data) // 2 or 1], offset)  # a short write is no error

    monkeypatch.setattr(os, "pwrite", full)
    run = trained(model, folder=tmp_path)
    assert not kept(run).pays
    assert kept(run)._file is None
    assert run.losses == pytest.approx(trained(model).losses, abs=2e-5)


def test_reading_that_is_slower_than_computing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "JUDGED_POSITIONS", 1)
    monkeypatch.setattr(prefix._Timed, "each", property(lambda timed: timed.positions))
    run = trained(tiny_model(tmp_path / "model", "llama", layers=4), folder=tmp_path)
    assert not kept(run).pays
    assert kept(run).hits < (EPOCHS - 1) * ROWS


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    run = trained(tiny_model(tmp_path / "model", "llama", layers=4), folder=folder)
    assert kept(run).hits
    assert list(folder.iterdir()) == []


def test_measuring_a_share_keeps_nothing(tmp_path: Path) -> None:
    """Else it would measure the second time what a later epoch costs."""
    run = InProcess(
        tiny_model(tmp_path / "model", "llama", layers=4),
        UPPER,
        OPTIMIZER,
        adapt=lambda trainer: setattr(trainer.prefix, "kept", Kept(tmp_path)),
    )
    for _ in range(2):
        run.trainer.time(Share(1, (as_rows(BATCHES[0]),)))
    assert (kept(run).hits, kept(run).misses) == (0, 0)
