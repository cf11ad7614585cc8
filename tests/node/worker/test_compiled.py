"""The compiled gradient function, as it runs under Metal, computes what the plain one does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from node.spec import OptimizerSpec, TuningSpec
from node.worker.trainer import Compiled, Trainer
from tests.fixtures.models import tiny_model
from tests.fixtures.training import InProcess, difference, random_batches

NOISY = TuningSpec(num_layers=-1, rank=4, scale=10.0, dropout=0.3, neftune_alpha=5.0)


def compiled(trainer: Trainer) -> None:
    trainer._gradient = Compiled(trainer._gradient)


@pytest.fixture
def compiling() -> Iterator[None]:
    """Compiling as on a GPU; afterwards off again, as everywhere in the tests."""
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(
    ("family", "spec", "longest"),
    [
        ("llama", NOISY, 24),
        ("llama", replace(NOISY, grad_checkpoint=True), 24),
        ("llama", replace(NOISY, fine_tune_type="dora"), 24),
        ("llama", replace(NOISY, fine_tune_type="full"), 24),
        ("llama", replace(NOISY, num_layers=1), 24),
        ("mixtral", NOISY, 24),
        ("llama", NOISY, 200),
    ],
    ids=["lora", "checkpointed", "dora", "full", "frozen below", "experts", "attention in parts"],
)
def test_compiled_steps_are_the_plain_ones(tmp_path: Path, family: str, spec: Any, longest: int) -> None:
    model = tiny_model(tmp_path / "model", family)
    # Several shapes, each met more than once, and never with the same noise: what is frozen into the compiled
    # function at its first call would show.
    batches = random_batches(3, masked=True, longest=longest) * 2
    optimizer = OptimizerSpec(learning_rate=1e-3)
    plain = InProcess(model, spec, optimizer).run(batches, accumulation=2)
    fast = InProcess(model, spec, optimizer, adapt=compiled).run(batches, accumulation=2)
    assert fast.losses == pytest.approx(plain.losses, abs=1e-5)
    assert fast.grad_norms == pytest.approx(plain.grad_norms, rel=1e-4)
    assert difference(fast.weights, plain.weights) < 1e-4
    # Nothing of the tracing is left behind in the model or in the context.
    assert fast.context.keys is None
    assert mx.isfinite(fast.model(mx.array([[1, 2, 3]]))).all()


def test_only_the_first_shapes_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiled, "MOST", 2)
    monkeypatch.setattr(mx, "compile", lambda function: lambda *given: ("compiled", function(*given)))
    function = Compiled(lambda tree, *arrays: len(arrays))
    rows = [mx.zeros((n, 4)) for n in (1, 2, 3, 1, 2, 3)]
    assert [function({}, row) for row in rows] == [("compiled", 1), ("compiled", 1), 1] * 2
    assert function({}, rows[0], rows[0]) == 2
    assert function.shapes == {((1, 4),), ((2, 4),)}
