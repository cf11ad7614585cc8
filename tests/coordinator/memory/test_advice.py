from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.commands.estimate import estimate as command
from coordinator.memory import EstimateOptions, advise, estimate
from coordinator.memory.architecture import architecture
from node.clikit import run_cli
from node.hardware import GIB
from tests.coordinator.memory.test_step import TABLE
from tests.fixtures.models import tiny_model

SEVEN: dict[str, Any] = TABLE["7B"][0]
ORDER = [
    "quantize the base",
    "smaller batch",
    "fewer layers",
    "shorter rows",
    "gradient checkpointing",
    "lower rank",
]


def test_the_measures_come_in_the_order_that_guides_give() -> None:
    advice = advise(SEVEN, None, EstimateOptions(max_seq_length=512), 1, "org/Seven-7B")
    assert [measure.name for measure in advice.measures] == ORDER
    assert [measure.command for measure in advice.measures] == [
        "mlx_lm.convert --hf-path org/Seven-7B -q --q-bits 4 --mlx-path Seven-7B-4bit, then --model Seven-7B-4bit",
        "--batch-size 1",
        "--num-layers 4",
        "--max-seq-length 256",
        "--grad-checkpoint",
        "--lora-rank 4",
    ]
    assert advice.best is None
    assert advice.combined is not None
    assert not advice.combined.fits
    strongest = EstimateOptions(bits=4, batch_size=1, num_layers=4, max_seq_length=256, grad_checkpoint=True, rank=4)
    assert advice.combined.options == strongest


def test_each_measure_is_recomputed_and_the_mildest_that_fits() -> None:
    options = EstimateOptions(max_seq_length=512)
    available = estimate(SEVEN, None, replace(options, micro_batch_rows=1)).total
    assert estimate(SEVEN, None, options).total > available
    advice = advise(SEVEN, None, options, available)
    for measure in advice.measures:
        assert measure.estimate == estimate(SEVEN, None, measure.options)
        assert measure.fits == (measure.estimate.total <= available)
    batch = next(measure for measure in advice.measures if measure.name == "smaller batch")
    assert batch.fits
    milder = replace(options, batch_size=2 * batch.options.batch_size)
    assert estimate(SEVEN, None, milder).total > available
    assert advice.best is not None
    assert advice.best.fits


def test_a_combination_takes_no_more_measures_than_it_needs() -> None:
    options = EstimateOptions(max_seq_length=2048)
    advice = advise(SEVEN, None, options, 9 * GIB)
    assert not any(measure.fits for measure in advice.measures)
    combined = advice.combined
    assert combined is not None
    assert combined is advice.best
    assert combined.estimate.total <= 9 * GIB
    assert combined.options.bits == 4
    assert combined.options.batch_size == options.batch_size, "long rows are computed one by one anyway"
    assert combined.options.rank == options.rank
    assert combined.command.endswith(f"--num-layers {combined.options.num_layers}")


def test_what_is_done_already_is_not_advised() -> None:
    quantized = SEVEN | {"quantization": {"bits": 4, "group_size": 64}}
    options = EstimateOptions(batch_size=1, num_layers=2, max_seq_length=200, grad_checkpoint=True, rank=4)
    assert advise(quantized, None, options, 1).measures == ()
    assert advise(quantized, None, options, 1).best is None


def test_full_fine_tuning_is_told_of_adapters_first() -> None:
    measures = advise(SEVEN, None, EstimateOptions(fine_tune_type="full", max_seq_length=128), 24 * GIB).measures
    assert measures[0].command == "--fine-tune-type lora"
    assert measures[0].fits
    assert measures[1].options.fine_tune_type == "lora"
    assert "lower rank" not in [measure.name for measure in measures]


@pytest.fixture
def seven(tmp_path: Path) -> str:
    """A folder like that of Llama 2 7B: true header, and weights that are a hole in the file."""
    model = architecture(SEVEN)
    shapes = {f"model.layers.{i}.{li.name}.weight": [li.outputs, li.inputs] for i in range(32) for li in model.block}
    shapes |= {"model.embed_tokens.weight": [model.vocab, model.hidden], "lm_head.weight": [model.vocab, model.hidden]}
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (tmp_path / "config.json").write_text(json.dumps(SEVEN))
    return str(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_cli(command, list(arguments), "coordinator estimate")
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_table(seven: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "--model", seven, "--memory", "32GB")
    assert code == 0
    assert "llama, 32 layers, 6.74 B parameters; size of the weights exact" in shown
    table = shown.split("\n\n")[1].splitlines()[1:]
    weights = {line[:12].strip(): line[12:21].strip() for line in table}
    assert weights == {"lora 4-bit": "3.5", "lora": "12.6", "dora": "12.6", "full": "12.6"}  # GiB
    assert "a Mac with 32 GB: 21.3 GB for training" in shown
    assert "too much" in shown
    assert "To need less, any of:" in shown
    code, shown, _ = run(capsys, "--model", seven, "--memory", "512GB")
    assert "To need less" not in shown
    assert "fits" in shown


def test_json(seven: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = run(capsys, "--model", seven, "--memory", "16GB", "--max-seq-length", "128", "--json")
    data = json.loads(shown)
    assert [line["method"] for line in data["methods"]] == ["lora 4-bit", "lora", "dora", "full"]
    totals = [line["total_bytes"] for line in data["methods"]]
    assert data["chosen"]["weights_bytes"] == 2 * data["chosen"]["parameters"]
    assert totals == sorted(totals)
    assert data["machine"]["limit_bytes"] == 16 * GIB * 2 // 3
    assert data["chosen"]["verdict"] == "too much"
    assert data["advice"][0]["name"] == "quantize the base"


def test_a_quantized_model_has_no_full_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_model(tmp_path / "tiny", "llama", quantize=4)
    capsys.readouterr()
    _, shown, _ = run(capsys, "--model", str(folder), "--json")
    assert [line["method"] for line in json.loads(shown)["methods"]] == ["lora 4-bit", "dora 4-bit"]
    _, shown, _ = run(capsys, "--model", str(folder))
    assert "exact, from its files" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "no such folder"),
        (["--model", ".", "--memory", "lots"], "no config.json"),
        (["--model", ".", "--batch-size", "0"], "--batch-size"),
        ([], "--model"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(capsys, *arguments)
    assert code == 2
    assert message in said
    assert said.count("\n") == 1


def test_a_size_that_is_none(seven: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(capsys, "--model", seven, "--memory", "lots")
    assert (code, said) == (2, "error: --memory: 'lots' is no size; write it as 12GB or 500MB\n")
