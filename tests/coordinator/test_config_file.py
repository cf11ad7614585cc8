"""YAML files, ours and ``mlx_lm``'s, under the flags of the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coordinator.checks import check_options
from coordinator.commands.train import load
from coordinator.config import TrainConfig
from coordinator.config_file import merge, parse_mapping, read_yaml, write_yaml
from coordinator.resume import taken_up
from coordinator.runfolder import RunFolder
from coordinator.specs import adapter_config, job_spec
from node.errors import UserError


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return read_yaml(file)


def test_every_key_of_an_mlx_lm_file_is_accepted(tmp_path: Path) -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    options = read(tmp_path, yaml.safe_dump(CONFIG_DEFAULTS))
    config = merge(options, {})
    ours = dataclasses.asdict(config)
    for key, value in CONFIG_DEFAULTS.items():
        if key in ours and value is not None and key != "lora_parameters":
            assert ours[key] == value, key
    assert (config.lora_rank, config.lora_dropout, config.scale) == (8, 0.0, 20.0)


def test_what_mlx_lm_documents_is_accepted(tmp_path: Path) -> None:
    options = read(
        tmp_path,
        """
model: mlx-community/Llama-3.2-1B-Instruct-4bit
train: true
lora_layers: 8
learning_rate: 1e-5
iters: 600
warmup: null
lora_parameters:
  keys: [self_attn.q_proj, self_attn.v_proj]
  rank: 16
  scale: 10.0
  dropout: 0.05
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
hf_dataset: {path: billsum, prompt_feature: text, completion_feature: summary, train_split: "train[:100]"}
clear_cache_threshold: 2GB
report_to: wandb
project_name: mine
""",
    )
    config = merge(options, {})
    assert config.learning_rate == 1e-5
    assert config.num_layers == 8
    assert config.warmup is None
    assert config.lora_keys == ("self_attn.q_proj", "self_attn.v_proj")
    assert (config.lora_rank, config.scale, config.lora_dropout) == (16, 10.0, 0.05)
    assert config.lr_schedule == {
        "name": "cosine_decay",
        "warmup": 100,
        "warmup_init": 1e-7,
        "arguments": [1e-5, 1000, 1e-7],
    }
    assert config.hf_dataset["path"] == "billsum"
    assert config.report_to == ("wandb",)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E-5", 1e-5),
        ("1.0e-5", 1e-5),
        (".5", 0.5),
        ("5.", 5.0),
        ("2e3", 2000.0),
        ("0.1", 0.1),
        ("1", 1),
        ("+1", 1),
        ("010", 10),
        ("08", 8),
    ],
)
def test_numbers_as_people_write_them(written: str, value: float, tmp_path: Path) -> None:
    found = read(tmp_path, f"learning_rate: {written}")["learning_rate"]
    assert found == value
    assert type(found) is type(value)
    assert merge({"learning_rate": found}, {}).learning_rate == value


@pytest.mark.parametrize("written", ["1e", "e5", "1-5", "1.2.3", "."])
def test_what_is_no_number_stays_text(written: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"data: {written}") == {"data": written}


def test_lists_of_words(tmp_path: Path) -> None:
    assert read(tmp_path, "report_to: wandb, tensorboard")["report_to"] == ("wandb", "tensorboard")
    assert read(tmp_path, "report_to: [wandb]")["report_to"] == ("wandb",)
    prompt = "sample_prompt: Red, green, or blue?"
    assert read(tmp_path, prompt)["sample_prompt"] == ("Red, green, or blue?",)
    keys = merge({"lora_parameters": {"keys": "self_attn.q_proj, mlp.up_proj"}}, {}).lora_keys
    assert keys == ("self_attn.q_proj", "mlp.up_proj")


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "") == {}
    assert read(tmp_path, "# nothing\n") == {}
    assert read(tmp_path, "iters: null\n") == {}


def test_dashes_are_as_good(tmp_path: Path) -> None:
    assert read(tmp_path, "batch-size: 2\nde-quantize: true") == {"batch_size": 2, "dequantize": True}


# --- who wins ---------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults() -> None:
    config = merge({"batch_size": 2, "iters": 50}, {"iters": 7, "batch_size": None, "seed": None})
    assert (config.iters, config.batch_size, config.seed) == (7, 2, 0)


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        ({"lora_parameters": {"rank": 4}}, {"lora_rank": 16}, {"lora_rank": 16}),
        ({"lora_parameters": {"rank": 4}, "lora_rank": 2}, {}, {"lora_rank": 2}),
        ({"lora_parameters": {"scale": 20.0}}, {"lora_alpha": 8.0}, {"scale": 1.0, "lora_scale": None}),
        ({"lora_alpha": 8.0}, {"lora_scale": 5.0}, {"scale": 5.0}),
        ({"epochs": 2.0}, {"iters": 5}, {"iters": 5, "epochs": None}),
        ({"iters": 5}, {"epochs": 2.0}, {"iters": None, "epochs": 2.0}),
        ({"mask_prompt": True}, {"mask": "assistant"}, {"target_mask": "assistant"}),
        ({"mask": "assistant"}, {"mask_prompt": True}, {"target_mask": "prompt"}),
        ({"mask_prompt": True}, {"mask_prompt": False}, {"target_mask": "all"}),
    ],
)
def test_a_flag_takes_the_place_of_its_twin_in_the_file(
    in_file: dict[str, Any], flags: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = merge(in_file, flags)
    assert {name: getattr(config, name) for name in expected} == expected


def test_twins_in_one_place_exclude_each_other() -> None:
    with pytest.raises(UserError, match="--iters and --epochs"):
        merge({}, {"iters": 5, "epochs": 1.0})
    with pytest.raises(UserError, match="--iters and --epochs"):
        merge({"iters": 5, "epochs": 1.0}, {})


SCHEDULE = {"name": "cosine_decay", "arguments": [1e-5, 10], "warmup": 5}


@pytest.mark.parametrize(
    ("said", "scale", "warmup"),
    [
        ({}, 20.0, 0),
        ({"lora_rank": 4}, 20.0, 0),
        ({"lora_scale": 3.0}, 3.0, 0),
        ({"lora_alpha": 8.0}, 1.0, 0),
        ({"lora_parameters": {"scale": 7.0}}, 7.0, 0),
        ({"rslora": True, "lora_rank": 4}, 8.0, 0),
        ({"warmup": 9}, 20.0, 9),
        ({"lr_schedule": SCHEDULE}, 20.0, 0),
    ],
)
def test_the_preset_speaks_where_nothing_else_is_said(said: dict[str, Any], scale: float, warmup: int) -> None:
    for config in (
        merge(said, {"preset": "mlx-lm"}),
        merge({"preset": "mlx-lm", **said}, {}),
        merge({"preset": "mlx-lm"}, said),
    ):
        assert config.scale == scale
        assert config.warmup_steps(1000) == warmup


# --- writing ----------------------------------------------------------------------------------------------------------

configs = st.builds(
    TrainConfig,
    model=st.text(st.characters(blacklist_categories=("Cs", "Cc"))),
    data=st.sampled_from(["data", "1e5", "true", "null", "a: b", "#x", "- a", " "]),
    learning_rate=st.floats(0, 1),
    iters=st.none() | st.integers(1, 10**6),
    lora_keys=st.none() | st.lists(st.text("abc._,1", min_size=1), min_size=1).map(tuple),
    lora_scale=st.none() | st.floats(1e-6, 100),
    sample_prompt=st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)).map(tuple),
    mask_prompt=st.booleans(),
    clear_cache_threshold=st.sampled_from([0, "2GB", 100]),
    lr_schedule=st.none() | st.just({"name": "step_decay", "arguments": [1e-5, 0.9, 10]}),
    optimizer_config=st.sampled_from([{}, {"adam": {"betas": [0.9, 0.95], "eps": 1e-8}}]),
    project_name=st.none() | st.text("0123456789eE.+-", min_size=1),
)


@given(config=configs)
def test_what_is_written_reads_back_the_same(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(write_yaml(config), encoding="utf-8")
    assert merge(read_yaml(file), {}) == config


def test_the_preset_does_not_speak_twice(tmp_path: Path) -> None:
    """A resolved configuration repeats the run, whatever chose its values."""
    resolved = dataclasses.replace(merge({}, {"preset": "mlx-lm", "lora_alpha": 4.0}), warmup=0)
    options = read(tmp_path, write_yaml(resolved))
    assert merge(options, {}).scale == resolved.scale == 0.5


# --- what becomes of it -----------------------------------------------------------------------------------------------


def test_adapter_config_is_what_mlx_lm_reads(tmp_path: Path) -> None:
    config = TrainConfig(model="m", lora_rank=4, lora_alpha=8, lora_keys=("self_attn.q_proj",), lora_dropout=0.1)
    written = adapter_config(config)
    assert written["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}
    assert written["num_layers"] == 16
    assert written["fine_tune_type"] == "lora"
    assert written["train"] is True
    assert adapter_config(TrainConfig(fine_tune_type="full"))["lora_parameters"] is None


def test_the_worker_is_told_all_of_it() -> None:
    config = TrainConfig(
        model="m", optimizer="adamw", optimizer_config={"adamw": {"eps": 1e-6}, "sgd": {"momentum": 1}}, warmup=3
    )
    job = job_spec(config, Path("/m"), "run", Path("/f"), 5)
    assert job.optimizer is not None
    assert job.optimizer.arguments == {"eps": 1e-6}
    assert job.optimizer.warmup_steps == 3
    assert job.clear_cache_threshold == 5
    scheduled = TrainConfig(model="m", lr_schedule={"name": "exponential_decay", "arguments": [1e-4, 0.9]}, warmup=7)
    job = job_spec(scheduled, Path("/m"), "run", Path("/f"), 0)
    assert job.optimizer is not None
    assert job.optimizer.schedule == {"name": "exponential_decay", "arguments": [1e-4, 0.9], "warmup": 7}


@pytest.mark.parametrize(
    ("wanted", "noise", "rows_return", "kept"),
    [
        ("auto", 0.0, True, True),
        ("auto", 0.0, False, False),
        ("auto", 5.0, True, False),
        ("on", 0.0, False, True),
        ("off", 0.0, True, False),
    ],
)
def test_outputs_of_frozen_layers_are_kept_where_rows_return(
    wanted: str, noise: float, rows_return: bool, kept: bool
) -> None:
    config = TrainConfig(model="m", warmup=0, reuse_prefix=wanted, neftune_alpha=noise)
    assert job_spec(config, Path("/m"), "run", Path("/f"), 0, rows_return=rows_return).reuse_prefix is kept


def test_noise_leaves_nothing_to_keep() -> None:
    with pytest.raises(UserError, match="--reuse-prefix on: with --neftune-alpha"):
        check_options(TrainConfig(model="m", reuse_prefix="on", neftune_alpha=5.0), resume=False)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder(tmp_path / "adapters")
    folder.path.mkdir()
    before = TrainConfig(
        model="m",
        data=str(tmp_path / "data"),
        iters=10,
        warmup=1,
        resume_adapter_file="gone.safetensors",
        mask="prompt",
    )
    folder.begin("run", write_yaml(before))
    return folder.path


def resumed(run: Path, **flags: Any) -> TrainConfig:
    return load({}, {"adapter_path": str(run), **flags}, resume=True)


def test_leave_for_python_files_is_never_taken_from_a_folder(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert "trust_remote_code: false" in text
    (run / "config.yaml").write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert resumed(run).trust_remote_code is False
    assert resumed(run, trust_remote_code=True).trust_remote_code is True


def test_resuming_takes_the_options_of_the_run(run: Path) -> None:
    config = resumed(run, iters=None, batch_size=None)
    assert (config.model, config.iters, config.mask) == ("m", 10, "prompt")
    assert config.adapter_path == str(run)
    assert config.resume_adapter_file == "gone.safetensors"


def test_what_may_change_when_resuming(run: Path) -> None:
    config = resumed(run, iters=20, keep_last=2, save_every=5, test=True)
    assert (config.iters, config.keep_last, config.save_every, config.test) == (20, 2, 5, True)
    assert resumed(run, reduce="grpc").reduce == "grpc"
    assert resumed(run, ring_encryption="on").ring_encryption == "on"
    assert resumed(run, gradient_dtype="auto").gradient_dtype == "fp32", "the plan chooses once"
    longer = resumed(run, epochs=3.0)
    assert (longer.iters, longer.epochs) == (None, 3.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lora_rank": 4}, "--lora-rank was 8 in this run and cannot become 4"),
        ({"seed": 1}, "--seed was 0 in this run and cannot become 1"),
        ({"gradient_dtype": "bf16"}, "--gradient-dtype was fp32 in this run and cannot become bf16"),
        ({"model": "other"}, "--model was m in this run and cannot become other"),
        ({"learning_rate": 1e-3}, "--learning-rate was 1e-05 in this run"),
        ({"lr_schedule": SCHEDULE}, "--lr-schedule was None|warm-up is given twice"),
        ({"lora_parameters": {"rank": 4}}, "--lora-rank was 8 in this run and cannot become 4"),
        ({"mask": "assistant"}, "--mask was prompt in this run"),
        ({"mask_prompt": True, "mask": "all"}, "exclude"),
        ({"preset": "mlx-lm"}, "--lora-scale was 2.0 in this run|--preset was None"),
        ({"lora_alpha": 8.0}, "--lora-scale was 2.0 in this run and cannot become 1.0"),
    ],
)
def test_what_may_not_change_when_resuming(run: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        resumed(run, **flags)


def test_saying_the_same_again_is_no_change(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert resumed(run, lora_rank=8, data="data", mask="prompt").data == str(run.parent / "data")
    assert resumed(run, mask_prompt=True, lora_scale=2.0, lora_parameters={"rank": 8}).target_mask == "prompt"


def test_a_program_that_resumes_takes_the_options_of_the_run_too(run: Path) -> None:
    config = taken_up(TrainConfig(adapter_path=str(run), keep_last=2))
    assert (config.model, config.iters, config.mask, config.keep_last) == ("m", 10, "prompt", 2)
    assert taken_up(config) == config
    with pytest.raises(UserError, match="--lora-rank was 8 in this run and cannot become 4"):
        taken_up(dataclasses.replace(config, lora_rank=4))


def test_resuming_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        resumed(tmp_path)


def test_a_key_that_is_given_twice(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("iters: 5\nlora_parameters:\n  rank: 4\n  rank: 8\n")
    with pytest.raises(UserError, match=r"c\.yaml:4: not YAML: rank is given twice"):
        read_yaml(file)


def test_the_older_way_to_name_a_wandb_project(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("wandb: mine\n")
    assert read_yaml(file) == {"report_to": ("wandb",), "project_name": "mine"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "cosine_decay", "arguments": [1e-5, 900]}', {"name": "cosine_decay", "arguments": [1e-5, 900]}),
        ("{name: cosine_decay, arguments: [1e-5, 900]}", {"name": "cosine_decay", "arguments": [1e-5, 900]}),
        ("cosine_decay", None),
        ("{", None),
    ],
)
def test_mappings_on_the_command_line(text: str, found: Any) -> None:
    assert parse_mapping(text) == found
