from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import TrainConfig
from coordinator.models import ResolvedModel, resolve
from coordinator.preflight import (
    check_before_loading,
    check_disk,
    check_memory,
    check_writable,
    fitting_tokens,
    memory_limit,
)
from node.errors import UserError
from node.hardware import GIB, Facts, facts
from node.sizes import parse_size, show_size
from tests.fixtures.models import tiny_model

MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    return resolve(str(tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama")))


def machine(megabytes: int, free: int | None = None) -> Facts:
    return replace(
        facts(),
        total_memory_bytes=2 * megabytes * MIB,
        gpu_memory_bytes=megabytes * MIB,
        free_memory_bytes=(free or megabytes) * MIB,
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * GIB),
        ("1.5 g", 3 * GIB // 2),
        ("500MB", 500 * MIB),
        ("2GiB", 2 * GIB),
        ("64", 64),
        (7, 7),
        ("0", 0),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "12 potatoes", "1e9", "12GBs", -1, None, True])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(UserError, match=r"--memory: .* is no size; write it as 12GB or 500MB"):
        parse_size(text, "--memory")


def test_sizes_as_people_read_them() -> None:
    assert [show_size(size * GIB) for size in (0.04, 11.44, 99.9, 512.4)] == ["41 MB", "11.4 GB", "99.9 GB", "512 GB"]


def test_a_job_that_cannot_fit_is_refused_with_what_would(model: ResolvedModel) -> None:
    config = TrainConfig(model="tiny", max_seq_length=2048)
    with pytest.raises(UserError, match=r"needs about .* this would fit: --max-seq-length \d+ \(--force"):
        check_memory(config, model, 2048, found=machine(500))
    with pytest.raises(UserError, match="nothing makes it fit; take a smaller model"):
        check_memory(config, model, 2048, found=machine(100))
    [warning] = check_memory(replace(config, force=True), model, 2048, found=machine(100))
    assert "needs about" in warning


def test_a_batch_that_is_too_large_is_computed_in_parts(model: ResolvedModel) -> None:
    config = TrainConfig(model="tiny", batch_size=64, fine_tune_type="full")
    [warning] = check_memory(config, model, 512, found=machine(1000))
    assert "computed in parts" in warning
    fitting = fitting_tokens(config, model, 512, machine(1000))
    assert fitting is not None
    assert 512 <= fitting < 64 * 512
    assert check_memory(config, model, 512, fitting // 512, machine(1000)) == []
    assert fitting_tokens(config, model, 512, machine(64000)) is None


def test_other_programs_in_the_way_are_a_warning(model: ResolvedModel) -> None:
    [warning] = check_memory(TrainConfig(model="tiny"), model, 64, found=machine(4000, free=100))
    assert "close other programs" in warning


def test_unknown_memory_is_not_judged(model: ResolvedModel) -> None:
    found = replace(facts(), total_memory_bytes=None, gpu_memory_bytes=None)
    assert memory_limit(found) is None
    assert check_memory(TrainConfig(model="tiny"), model, 2048, found=found) == []
    assert fitting_tokens(TrainConfig(model="tiny"), model, 2048, found) is None


def test_before_the_data_is_known_only_the_impossible_is_refused(model: ResolvedModel, tmp_path: Path) -> None:
    config = TrainConfig(model="tiny", adapter_path=str(tmp_path / "adapters"), batch_size=64, max_seq_length=8192)
    assert check_before_loading(config, model, machine(2000)) == []
    assert not (tmp_path / "adapters").exists()
    with pytest.raises(UserError, match="needs about"):
        check_before_loading(config, model, machine(300))


def test_a_quantized_model_is_not_trained_in_full(tmp_path: Path) -> None:
    quantized = resolve(str(tiny_model(tmp_path / "tiny-4bit", "llama", quantize=4)))
    with pytest.raises(UserError, match="use lora or dora"):
        check_before_loading(TrainConfig(model="tiny", fine_tune_type="full"), quantized)


def test_a_full_disk_is_noticed(model: ResolvedModel, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path / "not" / "there", 0)
    with pytest.raises(UserError, match=r"the disk has .* free, this run needs about"):
        check_disk(tmp_path / "not" / "there", free)
    config = TrainConfig(model="tiny", adapter_path=str(tmp_path / "a"), iters=2 * 10**9, save_every=1)
    with pytest.raises(UserError, match="--keep-last 1"):
        check_before_loading(config, model, machine(4000))
    assert check_before_loading(replace(config, keep_last=2), model, machine(4000)) == []


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; choose another folder"):
        check_writable(tmp_path / "file" / "adapters")
    check_writable(tmp_path / "new" / "adapters")
    assert os.listdir(tmp_path) == ["file"]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() != 0:
        with pytest.raises(UserError, match="cannot write there"):
            check_writable(closed / "adapters")
    with pytest.raises(UserError, match="cannot write there"):
        check_writable(Path("/proc/adapters"))
