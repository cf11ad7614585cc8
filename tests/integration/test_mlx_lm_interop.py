"""What we write opens in ``mlx_lm``, and what people type for ``mlx_lm`` works here."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import yaml
from mlx_lm.tuner.datasets import CompletionsDataset
from mlx_lm.tuner.utils import build_schedule

from coordinator.cli import coordinator
from node.clikit import run_cli
from node.spec import OptimizerSpec, TuningSpec
from tests.fixtures.models import tiny_model
from tests.fixtures.oracle import oracle_loss, oracle_run
from tests.fixtures.training import InProcess, difference, random_batches

# What people paste from a guide: every option that mlx_lm's own command has, except those of a configuration file.
PASTED = """
mlx_lm.lora --model {model} --train --data {data} --fine-tune-type dora --optimizer adamw --mask-prompt \
    --num-layers 1 --batch-size 2 --iters 4 --val-batches -1 --learning-rate 1e-3 --steps-per-report 2 \
    --steps-per-eval 2 --grad-accumulation-steps 2 --adapter-path {adapters} --save-every 2 --test --test-batches 1 \
    --max-seq-length 64 --grad-checkpoint --clear-cache-threshold 1GB --seed 3 --trust-remote-code
"""

# Every key of mlx_lm's example file and of its defaults. 1e-4 is text to YAML 1.1, and a number to mlx_lm.
CONFIG = """
model: {model}
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adam: {{}}
  adamw:
    weight_decay: 0.02
    betas: [0.9, 0.98]
    bias_correction: true
  muon: {{}}
  sgd: {{}}
  adafactor: {{}}
data: {data}
seed: 11
num_layers: 1
batch_size: 2
iters: 6
val_batches: 1
learning_rate: 1e-4
steps_per_report: 1
steps_per_eval: 6
report_to: null
project_name: null
resume_adapter_file: null
adapter_path: {adapters}
save_every: 6
test: false
test_batches: 1
max_seq_length: 64
config: null
grad_checkpoint: false
grad_accumulation_steps: 1
clear_cache_threshold: 0
mask_prompt: false
trust_remote_code: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 2
  warmup_init: 1e-5
  arguments: [1e-3, 100, 1e-7]
"""
VALID = [{"prompt": f"what follows {i}", "completion": f"the number {i + 1}" * (1 + i % 2)} for i in range(5)]


class Workplace:
    """A model, a data set, and an adapter trained by a pasted command line and one by a YAML file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_model(folder / "model", "llama")
        self.data = folder / "data"
        self.data.mkdir()
        rows = [{"prompt": f"say {i}", "completion": "seven swift foxes jump " * (1 + i % 3)} for i in range(9)]
        for name, content in (("train", rows), ("valid", VALID), ("test", VALID)):
            text = "".join(json.dumps(row) + "\n" for row in content)
            (self.data / f"{name}.jsonl").write_text(text, encoding="utf-8")
        self.pasted = folder / "pasted"
        self.by_file = folder / "by_file"
        self.config = folder / "lora_config.yaml"
        self.config.write_text(CONFIG.format(model=self.model, data=self.data, adapters=self.by_file))

    def train(self) -> None:
        command = PASTED.format(model=self.model, data=self.data, adapters=self.pasted)
        assert run_cli(coordinator, ["train", *shlex.split(command)[1:]]) == 0
        assert run_cli(coordinator, ["train", "-c", str(self.config)]) == 0

    def mlx_lm(self, *arguments: str) -> str:
        """Run ``mlx_lm``'s own command line and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "mlx_lm", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=self.folder,
            env={**os.environ, "MLX_DISABLE_COMPILE": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("interop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TANDEM_HOME", str(folder / "home"))
        workplace = Workplace(folder)
        workplace.train()
    return workplace


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(path: Path) -> dict[str, mx.array]:
    loaded: Any = mx.load(str(path))
    return dict(loaded)


def test_a_pasted_command_does_what_it_says(place: Workplace) -> None:
    lines = metrics(place.pasted)
    steps = [line for line in lines if "loss" in line]
    assert [(line["step"], line["iter"]) for line in steps] == [(1, 2), (2, 4)]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 1, 2]
    saved = weights(place.pasted / "adapters.safetensors")
    assert {name.split(".")[2] for name in saved} == {"1"}
    assert {name.rsplit(".", 1)[1] for name in saved} == {"lora_a", "lora_b", "m"}
    for name in ("adapter_config.json", "0000002_adapters.safetensors", "0000004_adapters.safetensors"):
        assert (place.pasted / name).exists()


def test_mlx_lm_loads_the_adapter_and_measures_the_loss_that_we_measured(place: Workplace) -> None:
    """``oracle_loss`` loads with ``mlx_lm.load(model, adapter_path=...)``."""
    tokenizer = mlx_lm.load(str(place.model))[1]
    dataset = CompletionsDataset(VALID, tokenizer, "prompt", "completion", mask_prompt=True)
    rows = [dataset.process(row) for row in VALID]
    ours = [line for line in metrics(place.pasted) if "val_loss" in line]
    before, tokens = oracle_loss(place.model, rows)
    after, _ = oracle_loss(place.model, rows, place.pasted)
    assert ours[0]["val_loss"] == pytest.approx(before, abs=1e-4)
    assert ours[-1]["val_loss"] == pytest.approx(after, abs=1e-4)
    assert [line["val_tokens"] for line in ours] == [tokens] * 3
    assert abs(after - before) > 1e-3


def test_mlx_lm_generates_with_the_adapter(place: Workplace) -> None:
    said = place.mlx_lm(
        *("generate", "--model", str(place.model), "--adapter-path", str(place.pasted)),
        *("--prompt", "say 3", "--max-tokens", "5", "--temp", "0"),
    )
    assert "Generation: 5 tokens" in said
    model, tokenizer = mlx_lm.load(str(place.model), adapter_path=str(place.pasted))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "say 3"}], add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=5).strip() in said


def test_an_mlx_lm_file_does_what_it_says(place: Workplace) -> None:
    steps = [line for line in metrics(place.by_file) if "loss" in line]
    schedule = build_schedule(
        {"name": "cosine_decay", "warmup": 2, "warmup_init": 1e-5, "arguments": [1e-3, 100, 1e-7]}
    )
    expected = [float(schedule(mx.array(update))) for update in range(6)]
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected)
    saved = weights(place.by_file / "adapters.safetensors")
    layers = [f"model.layers.1.self_attn.{name}.lora_{side}" for name in ("q_proj", "v_proj") for side in "ab"]
    assert sorted(saved) == sorted(layers)
    assert {array.shape[name.endswith("a")] for name, array in saved.items()} == {4}
    written = json.loads((place.by_file / "adapter_config.json").read_text(encoding="utf-8"))
    asked = yaml.safe_load(place.config.read_text(encoding="utf-8"))
    assert written["lora_parameters"] == asked["lora_parameters"]
    assert (written["fine_tune_type"], written["num_layers"]) == ("lora", 1)


def test_mlx_lm_goes_on_from_our_adapter_by_the_same_file(place: Workplace) -> None:
    ours = place.by_file / "adapters.safetensors"
    theirs = place.folder / "theirs"
    place.mlx_lm(
        *("lora", "-c", str(place.config), "--iters", "2"),
        *("--resume-adapter-file", str(ours), "--adapter-path", str(theirs)),
    )
    before, after = weights(ours), weights(theirs / "adapters.safetensors")
    # Two small steps away from where we ended, and far from where a new adapter starts: B at zero.
    assert 0 < difference(before, after) < 2e-3
    moved = max(float(mx.abs(before[name]).max()) for name in before if name.endswith("lora_b"))
    assert moved > 3e-3


def test_training_goes_on_from_an_adapter_file_as_in_mlx_lm(place: Workplace) -> None:
    file = place.by_file / "adapters.safetensors"
    keys = ("self_attn.q_proj", "self_attn.v_proj")
    batches = random_batches(3)
    lora = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": list(keys)}
    oracle = oracle_run(
        place.model, batches, lora_parameters=lora, num_layers=1, learning_rates=1e-3, initial_weights=file
    )
    spec = TuningSpec(num_layers=1, rank=4, scale=20.0, keys=keys, initial_weights=str(file))
    ours = InProcess(place.model, spec, OptimizerSpec(learning_rate=1e-3)).run(batches)
    assert ours.losses == pytest.approx(oracle.losses, abs=1e-4)
    assert difference(ours.weights, oracle.weights) < 1e-4
    fresh = oracle_run(place.model, batches, lora_parameters=lora, num_layers=1, learning_rates=1e-3)
    assert abs(fresh.losses[0] - oracle.losses[0]) > 1e-3


def test_dora_on_experts_is_one_line_and_nothing_is_written(
    tmp_path: Path, place: Workplace, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "experts", "mixtral")
    command = ["train", "--model", str(model), "--data", str(place.data), "--fine-tune-type", "dora", "--quiet"]
    assert run_cli(coordinator, [*command, "--adapter-path", str(tmp_path / "adapters")]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: --fine-tune-type dora: ")
    assert "expert layers have no DoRA" in lines[-1]
    assert not (tmp_path / "adapters").exists()
