"""Every option, its default and its limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from coordinator.commands.options import config_options
from coordinator.config import OPTIMIZERS, TrainConfig, flag, names
from coordinator.update_rule import check_arguments, check_schedule
from node.errors import UserError

DEFAULTS: dict[str, Any] = {
    "model": "",
    "data": "data",
    "fine_tune_type": "lora",
    "trust_remote_code": False,
    "mask": None,
    "mask_prompt": False,
    "max_seq_length": 2048,
    "hf_dataset": None,
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
    "iters": None,
    "epochs": None,
    "batch_size": 4,
    "grad_accumulation_steps": 1,
    "learning_rate": 1e-5,
    "warmup": None,
    "lr_schedule": None,
    "optimizer": "adam",
    "optimizer_config": {},
    "max_grad_norm": 0.0,
    "neftune_alpha": 0.0,
    "grad_checkpoint": False,
    "reuse_prefix": "auto",
    "clear_cache_threshold": 0,
    "seed": 0,
    "num_layers": 16,
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_scale": None,
    "rslora": False,
    "lora_dropout": 0.0,
    "lora_keys": None,
    "loraplus_ratio": 1.0,
    "lora_parameters": None,
    "resume_adapter_file": None,
    "adapter_path": "adapters",
    "save_every": 100,
    "keep_last": None,
    "val_batches": 25,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "early_stop": None,
    "sample_prompt": (),
    "sample_tokens": 60,
    "test": False,
    "test_batches": 500,
    "report_to": (),
    "project_name": None,
    "fuse": False,
    "save_path": "fused_model",
    "dequantize": False,
    "export_gguf": False,
    "gguf_path": "ggml-model-f16.gguf",
    "gguf_type": "f16",
    "export_peft": None,
    "upload_repo": None,
    "hf_path": None,
    "nodes": "auto",
    "local": True,
    "min_nodes": 1,
    "force_all": False,
    "reduce": "auto",
    "ring_encryption": "auto",
    "gradient_dtype": "fp32",
    "local_steps": 1,
    "wait": False,
    "force": False,
    "preset": None,
}


def test_every_default() -> None:
    assert dataclasses.asdict(TrainConfig()) == DEFAULTS
    assert names() == list(DEFAULTS)


def test_defaults_that_depend_on_the_run() -> None:
    config = TrainConfig()
    assert config.total_iters(7) == 1000
    assert config.warmup_steps(1000) == 100
    assert config.warmup_steps(600) == 60
    assert config.warmup_steps(9) == 0
    assert TrainConfig(warmup=30).warmup_steps(20) == 30
    assert TrainConfig(warmup=0).warmup_steps(1000) == 0
    schedule = {"name": "linear_schedule", "arguments": [1e-4, 0.0, 10]}
    assert TrainConfig(lr_schedule=schedule).warmup_steps(1000) == 0


def test_epochs() -> None:
    assert TrainConfig(epochs=2).total_iters(7) == 14
    assert TrainConfig(epochs=0.5).total_iters(7) == round(3.5)
    assert TrainConfig(epochs=0.01).total_iters(7) == 1


def test_scale() -> None:
    assert TrainConfig().scale == 2.0
    assert TrainConfig(lora_rank=4).scale == 4.0
    assert TrainConfig(lora_rank=4, lora_alpha=2).scale == 0.5
    assert TrainConfig(lora_rank=4, rslora=True).scale == 8.0
    assert TrainConfig(lora_rank=4, rslora=True, lora_scale=3).scale == 3


def test_masks() -> None:
    assert TrainConfig().target_mask == "all"
    assert TrainConfig(mask_prompt=True).target_mask == "prompt"
    assert TrainConfig(mask_prompt=True, mask="prompt").target_mask == "prompt"
    assert TrainConfig(mask="assistant").target_mask == "assistant"


# The smallest and, where there is a limit, the largest value of each number that has a limit.
EDGES: dict[str, tuple[Any, Any]] = {
    "max_seq_length": (2, None),
    "iters": (1, 2**31 - 1),
    "batch_size": (1, 2**31 - 1),
    "grad_accumulation_steps": (1, None),
    "learning_rate": (0, None),
    "warmup": (0, None),
    "max_grad_norm": (0, None),
    "neftune_alpha": (0, None),
    "seed": (0, 2**32 - 1),
    "num_layers": (-1, None),
    "lora_rank": (1, None),
    "lora_dropout": (0, 0.999),
    "save_every": (1, None),
    "keep_last": (1, None),
    "val_batches": (-1, None),
    "steps_per_report": (1, None),
    "steps_per_eval": (1, None),
    "early_stop": (1, None),
    "sample_tokens": (1, None),
    "test_batches": (-1, None),
}


@pytest.mark.parametrize("name", EDGES)
def test_limits(name: str) -> None:
    least, most = EDGES[name]
    TrainConfig(**{name: least})
    with pytest.raises(UserError, match=f"^{flag(name)}"):
        TrainConfig(**{name: least - 1})
    if most is not None:
        TrainConfig(**{name: most})
        with pytest.raises(UserError, match=f"^{flag(name)}"):
            TrainConfig(**{name: most + 1})


@pytest.mark.parametrize("name", ["epochs", "lora_alpha", "lora_scale", "loraplus_ratio"])
def test_numbers_above_zero(name: str) -> None:
    small: dict[str, Any] = {name: 0.001}
    assert getattr(TrainConfig(**small), name) == 0.001
    nothing: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=f"{flag(name)} must be above 0, not 0"):
        TrainConfig(**nothing)


def _wrong(item: dataclasses.Field[Any]) -> list[Any]:
    kind = str(item.type).split(" |")[0].split("[")[0]
    wrong: dict[str, list[Any]] = {
        "str": [5, True, ["a"]],
        "int": ["5", 1.5, True, [1]],
        "float": ["0.1", True, [0.1], float("inf"), float("nan")],
        "bool": [1, "true"],
        "dict": ["a", [1]],
        "tuple": ["a", 5, (5,)],
        "Any": [],
    }
    return wrong[kind]


@pytest.mark.parametrize("item", dataclasses.fields(TrainConfig), ids=lambda item: item.name)
def test_wrong_kinds_are_refused_by_name(item: dataclasses.Field[Any]) -> None:
    for value in _wrong(item):
        with pytest.raises(UserError, match=flag(item.name)):
            TrainConfig(**{item.name: value})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"iters": 5, "epochs": 1.0}, "--iters and --epochs exclude"),
        ({"mask": "all", "mask_prompt": True}, "--mask-prompt and --mask all exclude"),
        ({"fine_tune_type": "full", "loraplus_ratio": 2.0}, "--loraplus-ratio needs adapters"),
        ({"num_layers": 0}, "--num-layers: 0 layers"),
        ({"lora_keys": ()}, "--lora-keys: empty"),
        ({"report_to": ("wandb", "wandbb")}, "--report-to: 'wandbb' is none of wandb, swanlab, tensorboard"),
        ({"test": True, "test_batches": 0}, "--test-batches: 0 batches"),
    ],
)
def test_values_that_exclude_each_other(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TrainConfig(**values)


def test_every_option_has_a_flag_unless_it_is_for_yaml_only() -> None:
    flags = {option.name: option.opts for option in config_options()}
    for item in dataclasses.fields(TrainConfig):
        if item.metadata.get("yaml_only"):
            assert item.name not in flags
        else:
            assert flag(item.name) in flags[item.name]
        assert item.metadata["help"].endswith("."), item.name
    assert "--lora-layers" in flags["num_layers"]
    assert "--de-quantize" in flags["dequantize"]


def test_flags_that_are_not_given_say_nothing() -> None:
    assert all(option.default is None for option in config_options())


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ({"name": "cosine_decay", "arguments": [1e-4, 10, 0.0, 1]}, "takes arguments"),
        ({"name": "cosine_decay", "arguments": 1e-4}, "takes arguments"),
        ({"name": "cosine_decay"}, "takes arguments"),
        ({"name": "cosine_decay", "arguments": [1e-4, 10.5]}, "decay_steps of cosine_decay must be a whole number"),
        ({"name": "cosine_decay", "arguments": [1e-4, 0]}, "decay_steps"),
        ({"name": "exponential_decay", "arguments": [True, 0.5]}, "init of exponential_decay must be a number"),
        ({"name": "exponential_decay", "arguments": [1e-4, 0.5], "warmup": 1.5}, "warmup must be a whole number"),
        ({"name": "exponential_decay", "arguments": [1e-4, 0.5], "warmup_init": "a"}, "warmup_init must be a number"),
        ({"name": "join_schedules", "arguments": [[], []]}, "unknown name join_schedules"),
        ({"name": ["a"], "arguments": []}, "unknown name"),
    ],
)
def test_bad_schedules(schedule: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_schedule(schedule)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"adam": {"betas": [0.9, 1.0]}}, "betas of adam must be two numbers from 0 to below 1"),
        ({"adam": {"betas": [0.9]}}, "betas of adam"),
        ({"adam": {"eps": 0}}, "eps of adam must be a number above 0"),
        ({"adamw": {"weight_decay": "0.1"}}, "weight_decay of adamw must be a number"),
        ({"muon": {"ns_steps": 0}}, "ns_steps of muon must be a whole number of at least 1"),
        ({"sgd": {"nesterov": 1}}, "nesterov of sgd must be true or false"),
        ({"sgd": {"nesterov": True}}, "nesterov of sgd needs a momentum above 0"),
        ({"sgd": {"nesterov": True, "momentum": 0.9, "dampening": 0.1}}, "no dampening"),
        ({"adafactor": {"beta_1": 1}}, "beta_1 of adafactor must be a number from 0 to below 1"),
        ({"adam": [1]}, "adam must hold 'argument: value' lines"),
    ],
)
def test_bad_optimizer_arguments(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_arguments(config)


def test_optimizer_arguments_of_all_at_once_as_mlx_lm_writes_them() -> None:
    check_arguments({name: {} for name in OPTIMIZERS})
    check_arguments(dict.fromkeys(OPTIMIZERS))
    check_arguments({"adafactor": {"beta_1": None}})
