"""Every option of a training run, in one place.

``TrainConfig`` is the only list of options and defaults. The command line's flags are generated from it, YAML files are
checked against it, and ``config.yaml`` is written from it. Field names are those of ``mlx_lm``'s YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass, field
from typing import Any

from coordinator.update_rule import ARGUMENTS, check_arguments, check_schedule
from node.errors import UserError
from node.spec import MOST_LOCAL_STEPS

OPTIMIZERS = tuple(ARGUMENTS)
FINE_TUNE_TYPES = ("lora", "dora", "full")
REPORTERS = ("wandb", "swanlab", "tensorboard")
MASKS = ("all", "prompt", "assistant")
GGUF_TYPES = ("f16", "f32", "bf16", "q8_0")
PRESETS = ("mlx-lm",)
REDUCTIONS = ("auto", "ring", "jaccl", "grpc")
RING_ENCRYPTIONS = ("auto", "on", "off")
GRADIENT_DTYPES = ("fp32", "bf16", "auto")

LARGEST = (1 << 31) - 1  # of whole numbers, as MLX counts

LOCAL_PATHS = ("adapter_path", "resume_adapter_file", "save_path", "export_peft")

# What mlx_lm does where nothing is said, and this program does otherwise.
MLX_LM_SCALE = 20.0


def option(default: Any, help_text: str, *, flags: tuple[str, ...] = (), **extra: Any) -> Any:
    """A field with its help text; ``flags`` are further spellings, ``group`` its place in the help."""
    metadata = {"help": help_text, "flags": flags, **extra}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """A training run. None means: not said; ``resolved`` puts the default in its place.

    Raises:
        UserError: a value that cannot be; the message names the option.
    """

    model: str = option("", "Model: a Hugging Face repo or a local folder.", group="Model and data")
    data: str = option("data", "Folder with train.jsonl, valid.jsonl and test.jsonl, or a Hugging Face dataset name.")
    fine_tune_type: str = option("lora", "What is trained.", choices=FINE_TUNE_TYPES)
    trust_remote_code: bool = option(False, "Let the model's own Python files run.")
    mask: str | None = option(
        None, "Which tokens are trained on: all, the last completion, or every assistant turn.", choices=MASKS
    )
    mask_prompt: bool = option(False, "Train on the completion only; the same as --mask prompt.")
    max_seq_length: int = option(2048, "Longer rows are cut to so many tokens.", minimum=2)
    hf_dataset: Any = option(None, "Hugging Face data sets, in mlx_lm's YAML form.", yaml_only=True)
    prompt_feature: str = option("prompt", "Key of the prompt in completions rows.", yaml_only=True)
    completion_feature: str = option("completion", "Key of the completion in completions rows.", yaml_only=True)
    chat_feature: str = option("messages", "Key of the messages in chat rows.", yaml_only=True)
    text_feature: str = option("text", "Key of the text in text rows.", yaml_only=True)

    iters: int | None = option(None, "Batches to train on (default 1000).", minimum=1, group="Training")
    epochs: float | None = option(None, "Passes over the data, instead of --iters.", above=0)
    batch_size: int = option(4, "Rows in a batch, of the whole fleet.", minimum=1)
    grad_accumulation_steps: int = option(1, "Batches summed before each optimizer step.", minimum=1)
    learning_rate: float = option(1e-5, "Peak learning rate.", minimum=0)
    warmup: int | None = option(
        None, "Steps of linear warm-up (default 100, or a tenth of --iters when that is less).", minimum=0
    )
    lr_schedule: dict[str, Any] | None = option(
        None, "Schedule: {name: cosine_decay, arguments: [1e-5, 900], warmup: 9}."
    )
    optimizer: str = option("adam", "Update rule.", choices=OPTIMIZERS)
    optimizer_config: dict[str, Any] = option({}, "Further arguments, by optimizer name.", yaml_only=True)
    max_grad_norm: float = option(0.0, "Clip the global gradient norm to this; 0 is off.", minimum=0)
    neftune_alpha: float = option(0.0, "Noise on the embeddings while training (NEFTune); 0 is off.", minimum=0)
    grad_checkpoint: bool = option(False, "Recompute activations to save memory.")
    reuse_prefix: str = option(
        "auto", "Keep what the frozen layers make of a row, for its next epoch.", choices=("auto", "on", "off")
    )
    clear_cache_threshold: Any = option(0, "Clear MLX's cache between steps above this size, as 2GB; 0 never.")
    seed: int = option(0, "Of adapter weights, data order and dropout.", minimum=0, below=1 << 32)

    num_layers: int = option(
        16, "Layers to train, from the last; -1 all.", flags=("--lora-layers",), minimum=-1, group="Adapters"
    )
    lora_rank: int = option(
        8, "Rank of the adapters: 4 is about 0.1 % of the parameters, 8 0.2 %, 16 0.4 %.", minimum=1
    )
    lora_alpha: float = option(16.0, "Scale times rank.", above=0)
    lora_scale: float | None = option(None, "Scale of the adapters, instead of --lora-alpha.", above=0)
    rslora: bool = option(False, "Scale by alpha over the square root of the rank (rsLoRA).")
    lora_dropout: float = option(0.0, "Dropout on the adapters' inputs.", minimum=0, below=1)
    lora_keys: tuple[str, ...] | None = option(None, "Layers to adapt, comma-separated (default every linear layer).")
    loraplus_ratio: float = option(1.0, "Learning rate of B over that of A (LoRA+).", above=0)
    lora_parameters: dict[str, Any] | None = option(
        None, "rank, scale, alpha, dropout and keys in mlx_lm's form.", yaml_only=True
    )
    resume_adapter_file: str | None = option(None, "Start from these adapter weights, weights only.")

    adapter_path: str = option("adapters", "Folder for the adapter and all the run leaves behind.", group="Output")
    save_every: int = option(100, "Batches between checkpoints.", minimum=1)
    keep_last: int | None = option(
        None, "Keep so many checkpoints, and the best one; all of them otherwise.", minimum=1
    )
    val_batches: int = option(25, "Batches in a validation; -1 all, 0 no validation.", minimum=-1)
    steps_per_report: int = option(10, "Batches between reports.", minimum=1)
    steps_per_eval: int = option(200, "Batches between validations.", minimum=1)
    early_stop: int | None = option(None, "Stop after so many validations without a better one.", minimum=1)
    sample_prompt: tuple[str, ...] = option((), "Generate from this prompt at each validation; may be repeated.")
    sample_tokens: int = option(60, "Tokens of each sample.", minimum=1)
    test: bool = option(False, "Evaluate on test.jsonl when training ends.")
    test_batches: int = option(500, "Batches of the test; -1 all.", minimum=-1)
    report_to: tuple[str, ...] = option((), "wandb, swanlab, tensorboard; comma-separated.", choices=REPORTERS)
    project_name: str | None = option(None, "Project name for --report-to.")

    fuse: bool = option(False, "Merge the adapter into the model when training ends.", group="Afterwards")
    save_path: str = option("fused_model", "Folder for the fused model.")
    dequantize: bool = option(False, "Write full-precision weights from a quantized base.", flags=("--de-quantize",))
    export_gguf: bool = option(False, "Write a GGUF file too.")
    gguf_path: str = option("ggml-model-f16.gguf", "Its name, in the save path.")
    gguf_type: str = option("f16", "Its weights.", choices=GGUF_TYPES)
    export_peft: str | None = option(None, "Write the adapter in PEFT's layout to this folder.")
    upload_repo: str | None = option(None, "Upload the fused model to this Hugging Face repo.")
    hf_path: str | None = option(None, "Base model to name in the upload's model card.")

    nodes: str = option(
        "auto",
        "Who takes part: auto (all that are found), local, or names and host:port with commas.",
        group="Machines",
    )
    local: bool = option(True, "Whether this machine takes part, too.")
    min_nodes: int = option(1, "Refuse to start with fewer machines.", minimum=1)
    force_all: bool = option(False, "Use machines that make the step longer, too.")
    reduce: str = option(
        "auto",
        "How gradients are added up over machines: ring (TCP), jaccl (RDMA between two), grpc (through the"
        " coordinator), or auto: jaccl where it can be, else ring.",
        choices=REDUCTIONS,
    )
    ring_encryption: str = option(
        "auto",
        "Whether what the machines add up is encrypted on its way: auto (everywhere but on a Thunderbolt cable from one"
        " machine to the other), on, off.",
        choices=RING_ENCRYPTIONS,
    )
    gradient_dtype: str = option(
        "fp32",
        "As what gradients cross the network: fp32 (the same numbers on any machines), bf16 (half of the bytes; what"
        " rounding keeps back is added to the next step's), auto: bf16 where the plan finds it worth that.",
        choices=GRADIENT_DTYPES,
    )
    local_steps: int = option(
        1,
        "Steps that each machine trains by itself before the machines' weights are brought together, for slow links"
        " (DiLoCo); 1 adds up the gradients of every step.",
        minimum=1,
        below=MOST_LOCAL_STEPS + 1,
    )
    wait: bool = option(False, "Wait in line for machines that are busy.")
    force: bool = option(False, "Start even when the estimate says that memory will not do.")
    preset: str | None = option(None, "mlx-lm: scale 20 and no warm-up where nothing else is said.", choices=PRESETS)

    def __post_init__(self) -> None:
        for name in LOCAL_PATHS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("~"):
                object.__setattr__(self, name, os.path.expanduser(value))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None and value is not item.default:
                _check(item, value)
        if self.mask_prompt and self.mask not in (None, "prompt"):
            raise UserError(f"--mask-prompt and --mask {self.mask} exclude each other; give one of them")
        if self.iters is not None and self.epochs is not None:
            raise UserError("--iters and --epochs exclude each other; give one of them")
        if self.fine_tune_type == "full" and self.loraplus_ratio != 1:
            raise UserError("--loraplus-ratio needs adapters; it does nothing with --fine-tune-type full")
        if self.reduce == "jaccl" and self.ring_encryption == "on":
            raise UserError(
                "--reduce jaccl and --ring-encryption on exclude each other: RDMA cannot be encrypted; leave one out"
            )
        if self.reduce == "jaccl" and self.gradient_dtype == "bf16":
            raise UserError(
                "--reduce jaccl and --gradient-dtype bf16 exclude each other: RDMA adds up fp32 only; leave one out"
            )
        if self.num_layers == 0:
            raise UserError("--num-layers: 0 layers would train nothing; say how many, or -1 for all")
        if self.test and self.test_batches == 0:
            raise UserError("--test-batches: 0 batches measure nothing; say how many, or -1 for all")
        if self.lora_keys is not None and not self.lora_keys:
            raise UserError("--lora-keys: empty; name at least one layer, as self_attn.q_proj, or leave it out")
        if self.hf_dataset is not None and not isinstance(self.hf_dataset, dict | list):
            raise UserError("hf_dataset: give a mapping with path, or a list of them")
        check_arguments(self.optimizer_config)
        if self.lora_scale is not None and self.lora_alpha != TrainConfig.lora_alpha:
            raise UserError("--lora-scale and --lora-alpha exclude each other; give one of them")
        if self.lr_schedule is not None:
            check_schedule(self.lr_schedule)
            if self.warmup is not None and self.lr_schedule.get("warmup"):
                raise UserError("the warm-up is given twice: by --warmup and in lr_schedule; give one of them")

    @property
    def target_mask(self) -> str:
        """Which tokens are trained on: ``all``, ``prompt`` (all but the prompt) or ``assistant``."""
        return self.mask or ("prompt" if self.mask_prompt else "all")

    @property
    def scale(self) -> float:
        """Scale of the adapters' contribution."""
        if self.lora_scale is not None:
            return self.lora_scale
        divisor = math.sqrt(self.lora_rank) if self.rslora else self.lora_rank
        return self.lora_alpha / divisor

    def total_iters(self, batches_per_epoch: int) -> int:
        """Batches to train on."""
        if self.epochs is not None:
            return max(1, round(self.epochs * batches_per_epoch))
        return self.iters if self.iters is not None else 1000

    def warmup_steps(self, total_iters: int) -> int:
        """Optimizer steps of warm-up, when no schedule brings its own."""
        if self.warmup is not None:
            return self.warmup
        return 0 if self.lr_schedule is not None else min(100, total_iters // 10)


def names() -> list[str]:
    """All option names, as YAML spells them."""
    return [item.name for item in dataclasses.fields(TrainConfig)]


def unknown_option(name: str, source: str) -> UserError:
    """The error for a key that is no option, with the nearest one that is."""
    near = difflib.get_close_matches(name, [*names(), "lora_layers", "de_quantize", "train", "config"], 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else "; see coordinator train --help"
    return UserError(f"{source}: unknown option {name}{hint}")


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    name, rules = flag(item.name), item.metadata
    kinds = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "tuple": tuple}
    kind = kinds.get(str(item.type).split(" |", maxsplit=1)[0].split("[", maxsplit=1)[0])
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        kind = int
    if kind is not None and (not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))):
        raise UserError(f"{name}: {value!r} is not {_KIND_NAMES[kind]}")
    if kind is tuple and not all(isinstance(word, str) for word in value):
        raise UserError(f"{name}: {list(value)!r} is not a list of words")
    if kind is int and abs(value) > LARGEST and "below" not in rules:
        raise UserError(f"{name}: {value} is too large; at most {LARGEST}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: {value} is not a finite number")
    if "minimum" in rules and value < rules["minimum"]:
        raise UserError(f"{name} must be at least {rules['minimum']}, not {value}")
    if "above" in rules and value <= rules["above"]:
        raise UserError(f"{name} must be above {rules['above']}, not {value}")
    if "below" in rules and value >= rules["below"]:
        raise UserError(f"{name} must be below {rules['below']}, not {value}")
    if "choices" in rules:
        for word in value if isinstance(value, tuple) else (value,):
            if word not in rules["choices"]:
                raise UserError(f"{name}: {word!r} is none of {', '.join(rules['choices'])}")


_KIND_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping of 'key: value' lines",
    tuple: "a list of words",
}
