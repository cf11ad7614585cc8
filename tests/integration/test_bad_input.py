"""Mistakes that people make: exit code 2, one clear line, nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from coordinator.cli import coordinator
from coordinator.runfolder import RunFolder
from node.clikit import run_cli
from node.hardware import Facts, facts
from node.identity import credentials
from tests.fixtures.models import tiny_model
from tests.fixtures.processes import command_of, descendants
from tests.fixtures.runs import ENTRY, write_chat_data

MIB = 1 << 20
Refused = Callable[..., str]


@dataclass(frozen=True)
class Inputs:
    """What is right, to be made wrong in one place each."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def adapter(self, name: str, rank: int, block: int, **config: Any) -> Path:
        """A folder with adapter weights of one layer, in ``mlx_lm``'s form."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        stem = f"model.layers.{block}.self_attn.q_proj"
        weights = {f"{stem}.lora_a": mx.zeros((64, rank)), f"{stem}.lora_b": mx.zeros((rank, 64))}
        mx.save_safetensors(str(path / "adapters.safetensors"), weights)
        parameters = {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        entries = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "model": str(self.model)}
        (path / "adapter_config.json").write_text(json.dumps(entries | config))
        return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model", "llama")
    tiny_model(folder / "model-without-template", "llama", chat_template=False)
    tiny_model(folder / "model-4bit", "llama", quantize=4)
    write_chat_data(folder / "data", train=6, valid=2)
    (folder / "text").mkdir()
    (folder / "text" / "train.jsonl").write_text('{"text": "the quick brown fox"}\n')
    return Inputs(folder)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mtime_ns, state.st_size)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(inputs: Inputs, here: Path, tandem_home: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused, check all that every refusal promises, and give its line."""

    def run(*arguments: str | Path) -> str:
        before = contents(here), contents(inputs.folder)
        code = run_cli(coordinator, [str(argument) for argument in arguments], prog_name="coordinator")
        output, errors = capsys.readouterr()
        assert code == 2, output + errors
        assert "Traceback" not in output + errors
        assert errors.count("\n") == 1, errors
        assert errors.startswith("error: ")
        assert (contents(here), contents(inputs.folder)) == before
        assert not (tandem_home / "runs").exists(), "a run was registered"
        assert not any((tandem_home / "jobs").glob("*")), "a job's folder was left behind"
        assert not any("node.worker" in command_of(pid) for pid in descendants(os.getpid())), "a worker was left behind"
        return errors.strip()

    return run


@pytest.fixture
def refused_training(refused: Refused, inputs: Inputs) -> Refused:
    """A training that would be fine without these flags."""

    def run(*flags: str | Path) -> str:
        good = ["--model", inputs.model, "--data", inputs.data, "--iters", "2", "--num-layers", "1"]
        return refused("train", *good, *flags)

    return run


# --- rows -------------------------------------------------------------------------------------------------------------

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
ROWS = {
    "not JSON": ('{"text": "a"}\n{"text": "a"\n', "train.jsonl:2: not valid JSON"),
    "single quotes": ("{'text': 'a'}\n", "train.jsonl:1: not valid JSON"),
    "a JSON document": ('[\n{"text": "a"}\n]\n', "train.jsonl:1: not one JSON object per line"),
    "a list": ('["a"]\n', "train.jsonl:1: a row must be a JSON object, not"),
    "a number": ('{"text": "a"}\n\n5\n', "train.jsonl:3: a row must be a JSON object, not"),
    "null": ("null\n", "train.jsonl:1: a row must be a JSON object, not"),
    "unknown keys": ('{"txt": "a"}\n', 'train.jsonl:1: of no known format: it needs the keys "text"'),
    "no completion": ('{"prompt": "a"}\n', 'train.jsonl:1: has "prompt" but no "completion"'),
    "text is a number": ('{"text": 5}\n', 'train.jsonl:1: "text" must be a string, not'),
    "text is null": ('{"text": null}\n', 'train.jsonl:1: "text" must be a string, not'),
    "completion is a list": ('{"prompt": "a", "completion": []}\n', 'train.jsonl:1: "completion" must be a string'),
    "messages are text": ('{"messages": "hello"}\n', 'train.jsonl:1: "messages" must be'),
    "no messages": ('{"messages": []}\n', 'train.jsonl:1: "messages"'),
    "a message without a role": ('{"messages": [{"content": "a"}]}\n', "train.jsonl:1: message 1"),
    "a message that is text": ('{"messages": ["a"]}\n', "train.jsonl:1: message 1"),
    "content is a number": (
        '{"messages": [{"role": "user", "content": 5}]}\n',
        'train.jsonl:1: "content" of message 1 must be text',
    ),
    "mixed formats": (
        CHAT + '\n{"text": "a"}\n',
        "train.jsonl:2: a row of the format text in a file of the format chat",
    ),
    "a key is missing later": (CHAT + '\n{"id": 1}\n', 'train.jsonl:2: has no "messages"'),
    "tools are a number": (CHAT[:-1] + ', "tools": [5]}\n', 'train.jsonl:1: "tools" must be a list of objects'),
    "half a surrogate": ('{"text": "\\ud800"}\n', "train.jsonl:1: holds half of a surrogate pair"),
    "no rows": ("", "train.jsonl is empty; it needs at least one row"),
    "blank lines only": ("\n \n", "train.jsonl is empty; it needs at least one row"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, refused_training: Refused, here: Path) -> None:
    content, says = ROWS[name]
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_text(content)
    assert says in refused_training("--data", "data")


def test_rows_that_are_not_utf_8(refused_training: Refused, here: Path) -> None:
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    assert "data/train.jsonl:1: not UTF-8 text (byte 11 of the line); save the file as UTF-8" in refused_training(
        "--data", "data"
    )


def test_a_bad_row_in_the_other_files(refused_training: Refused, here: Path) -> None:
    (here / "data").mkdir()
    (here / "data" / "train.jsonl").write_text(CHAT + "\n")
    (here / "data" / "valid.jsonl").write_text(CHAT + '\n{"messages": 1}\n')
    assert "data/valid.jsonl:2:" in refused_training("--data", "data")
    (here / "data" / "valid.jsonl").unlink()
    (here / "data" / "test.jsonl").write_text("{}\n")
    assert "data/test.jsonl:1:" in refused_training("--data", "data", "--test")


# --- data folders -----------------------------------------------------------------------------------------------------


def test_data_folders(refused_training: Refused, inputs: Inputs, here: Path) -> None:
    assert "no data folder" in refused_training("--data", "./not-there")
    assert "is a file; --data takes the folder" in refused_training("--data", inputs.data / "train.jsonl")
    (here / "empty").mkdir()
    assert "holds no train.jsonl" in refused_training("--data", "empty")
    (here / "valid-only").mkdir()
    shutil.copy(inputs.data / "valid.jsonl", here / "valid-only")
    assert "valid-only has no train set; add train.jsonl" in refused_training("--data", "valid-only")
    assert "has no test set; add test.jsonl" in refused_training("--test")


def test_chat_data_for_a_model_without_a_chat_template(refused_training: Refused, inputs: Inputs) -> None:
    line = refused_training("--model", inputs.folder / "model-without-template")
    assert "chat template" in line
    assert "model-without-template" in line


@pytest.mark.parametrize("flags", [["--mask-prompt"], ["--mask", "assistant"]])
def test_text_has_no_prompt_to_mask(flags: list[str], refused_training: Refused, inputs: Inputs) -> None:
    line = refused_training("--data", inputs.folder / "text", *flags)
    assert f"{' '.join(flags)} needs chat or completions data" in line


def test_a_tokenizer_of_another_model(refused_training: Refused, inputs: Inputs, here: Path) -> None:
    other = tiny_model(here / "model", "llama", vocab_size=64)
    assert "the tokenizer of" in (line := refused_training("--model", other))
    assert "does not fit its model" in line
    assert "64" in line


# --- models -----------------------------------------------------------------------------------------------------------


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        entries = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))

    return change


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json, so this is no model folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights (model*.safetensors) in it"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer (tokenizer.json"),
    "config is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: not readable as JSON",
    ),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must hold a JSON"),
    "config has no model_type": (_config(model_type=None), "config.json: has no model_type"),
    "unknown model_type": (_config(model_type="lama"), "does not know model_type 'lama' (known and similar: llama"),
    "config has no width": (_config(hidden_size=None), "has no hidden_size"),
    "weights cut off": (_truncate, "model.safetensors: cut off at 5000 of"),
    "weights are no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4000),
        "model.safetensors: not a whole safetensors file",
    ),
    "weights are damaged": (
        lambda folder: (folder / "model.safetensors").write_bytes((40).to_bytes(8, "little") + b"{" * 4000),
        "model.safetensors: the header is damaged",
    ),
    "tokenizer is damaged": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
    "config of another width": (_config(hidden_size=128), "cannot load the model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, refused_training: Refused, inputs: Inputs, here: Path) -> None:
    spoil, says = MODELS[name]
    shutil.copytree(inputs.model, here / "model")
    spoil(here / "model")
    assert says in refused_training("--model", "model")


def test_a_model_that_is_not_there(refused: Refused, refused_training: Refused, inputs: Inputs) -> None:
    line = refused_training("--model", inputs.folder / "modle")
    assert "no such folder; did you mean" in line
    assert str(inputs.model) in line
    assert "a file; pass the folder" in refused_training("--model", inputs.model / "config.json")
    assert "cannot be reached" in refused_training("--model", "nobody/nothing")
    assert "neither a folder nor a repository id" in refused_training("--model", "what is this?")
    assert "--model: say which model" in refused("train", "--data", inputs.data)
    assert "no such folder" in refused("estimate", "--model", "./not-there")


# --- options ----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[list[str], str]] = {
    "rank 0": (["--lora-rank", "0"], "--lora-rank must be at least 1, not 0"),
    "negative rank": (["--lora-rank", "-4"], "--lora-rank must be at least 1, not -4"),
    "huge rank": (["--lora-rank", "4096"], "--lora-rank 4096 is more than the model is wide (64)"),
    "rank beyond numbers": (["--lora-rank", "9" * 20], "is too large"),
    "batch size 0": (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    "no iterations": (["--iters", "0"], "--iters must be at least 1, not 0"),
    "iters is text": (["--iters", "many"], "Invalid value for '--iters': 'many' is not a valid integer"),
    "iters and epochs": (["--epochs", "1"], "--iters and --epochs exclude each other"),
    "accumulation 0": (["--grad-accumulation-steps", "0"], "--grad-accumulation-steps must be at least 1, not 0"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate: nan is not a finite number"),
    "negative learning rate": (["--learning-rate", "-1"], "--learning-rate must be at least 0, not -1"),
    "dropout 1": (["--lora-dropout", "1.0"], "--lora-dropout must be below 1, not 1.0"),
    "no layers": (["--num-layers", "0"], "--num-layers: 0 layers would train nothing"),
    "scale 0": (["--lora-scale", "0"], "--lora-scale must be above 0, not 0"),
    "keys by their last part": (["--lora-keys", "q_proj"], "no layer q_proj; did you mean self_attn.q_proj?"),
    "misspelt keys": (["--lora-keys", "self_attn.qproj"], "no layer self_attn.qproj; did you mean self_attn.q_proj?"),
    "keys that are no linear layers": (["--lora-keys", "input_layernorm"], "input_layernorm is no linear layer"),
    "empty keys": (["--lora-keys", ","], "--lora-keys: empty"),
    "max-seq-length 1": (["--max-seq-length", "1"], "--max-seq-length must be at least 2, not 1"),
    "masks in conflict": (["--mask", "assistant", "--mask-prompt"], "--mask-prompt and --mask assistant exclude"),
    "unknown option": (["--learning-rte", "1"], "Did you mean '--learning-rate'? (options: coordinator train --help)"),
    "unknown argument": (["extra"], "unexpected extra argument (extra)"),
    "unknown optimizer": (["--optimizer", "lion"], "'lion' is not one of 'adam', 'adamw'"),
    "unknown reporter": (["--report-to", "wanbd"], "--report-to: 'wanbd' is none of wandb, swanlab, tensorboard"),
    "reporter not installed": (["--report-to", "swanlab"], "--report-to swanlab: not installed; "),
    "unknown preset": (["--preset", "mlx"], "'mlx' is not 'mlx-lm'"),
    "unknown node": (["--nodes", "studio"], "--nodes studio: no node of this name answers"),
    "size": (["--clear-cache-threshold", "much"], "--clear-cache-threshold: 'much' is no size; write it as 12GB"),
    "no validations to stop by": (["--val-batches", "0", "--early-stop", "2"], "--early-stop needs validations"),
    "upload without fuse": (["--upload-repo", "me/mine"], "--upload-repo needs --fuse"),
    "negative seed": (["--seed", "-1"], "--seed must be at least 0, not -1"),
    "no test batches": (["--test", "--test-batches", "0"], "--test-batches: 0 batches measure nothing"),
    "lora+ in full": (["--fine-tune-type", "full", "--loraplus-ratio", "4"], "--loraplus-ratio needs adapters"),
    "config not there": (["--config", "not-there.yaml"], "--config not-there.yaml: No such file"),
    "nothing to resume": (["--resume", "--adapter-path", "old"], "--resume: old holds no run"),
    "adapter file not there": (["--resume-adapter-file", "a.safetensors"], "--resume-adapter-file a.safetensors: no"),
    "adapter path below a file": (["--adapter-path", "/dev/null/adapters"], "/dev/null is a file; choose another"),
    "adapter path not writable": (["--adapter-path", "/proc/adapters"], "/proc/adapters: cannot write there"),
    "save path not writable": (["--fuse", "--save-path", "/proc/fused"], "/proc/fused: cannot write there"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, refused_training: Refused) -> None:
    flags, says = OPTIONS[name]
    assert says in refused_training(*flags)


def test_an_unknown_command(refused: Refused) -> None:
    assert "did you mean 'train'?" in refused("trian").lower()


def test_full_fine_tuning_of_a_quantized_model(refused_training: Refused, inputs: Inputs) -> None:
    line = refused_training("--model", inputs.folder / "model-4bit", "--fine-tune-type", "full")
    assert "a quantized model cannot be trained in full; use lora or dora" in line


def test_a_model_that_cannot_be_exported(refused_training: Refused, here: Path) -> None:
    model = tiny_model(here / "model", "minicpm")
    line = refused_training("--model", model, "--fuse", "--export-gguf")
    assert "--export-gguf: cannot write model type 'minicpm'; leave it out" in line


def test_an_adapter_path_that_is_a_file(refused_training: Refused, here: Path) -> None:
    (here / "adapters").write_text("mine")
    assert "adapters is a file; choose another" in refused_training()
    assert (here / "adapters").read_text() == "mine"


# --- YAML -------------------------------------------------------------------------------------------------------------

YAML: dict[str, tuple[str, str]] = {
    "unknown key": ("learning_rte: 1e-5", "unknown option learning_rte; did you mean learning_rate?"),
    "unknown key like none": ("zzz: 1", "unknown option zzz; see coordinator train --help"),
    "a list": ("- model\n- data", "expected 'option: value' lines, found list"),
    "text": ("hello", "expected 'option: value' lines, found str"),
    "broken": ("seed: 1\niters: [1, 2", "lora.yaml:3: not YAML"),
    "tabs": ("seed:\t1\n\titers: 2", "not YAML"),
    "text for a number": ("batch_size: four", "--batch-size: 'four' is not a whole number"),
    "a fraction for a whole number": ("batch_size: 1.5", "--batch-size: 1.5 is not a whole number"),
    "a number for yes": ("mask_prompt: 1", "--mask-prompt: 1 is not true or false"),
    "yes for a number": ("batch_size: true", "--batch-size: True is not a whole number"),
    "a list for text": ("project_name: [a, b]", "--project-name: ['a', 'b'] is not text"),
    "a number for words": ("lora_keys: 5", "--lora-keys: 5 is not a list of words"),
    "numbers for words": ("lora_keys: [5]", "--lora-keys: [5] is not a list of words"),
    "a value that is none of them": ("fine_tune_type: qlora", "--fine-tune-type: 'qlora' is none of lora, dora, full"),
    "lora_parameters is a list": ("lora_parameters: [8]", "lora_parameters must be a mapping with rank, scale"),
    "lora_parameters misspelt": ("lora_parameters: {rnk: 8}", "lora_parameters: unknown key rnk; known are rank"),
    "rank in lora_parameters": ("lora_parameters: {rank: 0}", "--lora-rank must be at least 1, not 0"),
    "schedule is text": ("lr_schedule: cosine_decay", "--lr-schedule: 'cosine_decay' is not a mapping"),
    "schedule without a name": ("lr_schedule: {arguments: [1]}", "lr_schedule: unknown name None; known are"),
    "unknown schedule": (
        "lr_schedule: {name: cosine_dcay, arguments: [1.0e-5, 10]}",
        "lr_schedule: unknown name cosine_dcay; did you mean cosine_decay?",
    ),
    "schedule misspelt": (
        "lr_schedule: {name: cosine_decay, argument: [1.0e-5, 10]}",
        "lr_schedule: unknown key argument; did you mean arguments?",
    ),
    "too few arguments": (
        "lr_schedule: {name: step_decay, arguments: [1e-5]}",
        "step_decay takes arguments: [init, decay_rate, step_size], not [1e-05]",
    ),
    "arguments of a wrong kind": (
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, long]}",
        "decay_steps of cosine_decay must be a whole number of at least 1, not 'long'",
    ),
    "warm-up given twice": (
        "lr_schedule: {name: cosine_decay, arguments: [1e-5, 9], warmup: 5}\nwarmup: 3",
        "the warm-up is given twice",
    ),
    "unknown optimizer": ("optimizer: lion", "--optimizer: 'lion' is none of adam, adamw, muon, sgd, adafactor"),
    "arguments of an unknown optimizer": ("optimizer_config: {lion: {}}", "optimizer_config: unknown optimizer lion"),
    "unknown argument of an optimizer": (
        "optimizer_config: {adam: {beta: [0.9, 0.99]}}",
        "optimizer_config: adam has no argument beta; did you mean betas?",
    ),
    "wrong argument of an optimizer": (
        "optimizer_config: {adam: {betas: 0.9}}",
        "betas of adam must be two numbers from 0 to below 1",
    ),
    "learning rate in the wrong place": (
        "optimizer_config: {adam: {learning_rate: 1e-4}}",
        "the learning rate is set by learning_rate, outside of it",
    ),
    "hf_dataset is a number": ("hf_dataset: 5", "hf_dataset: give a mapping with path"),
    "hf_dataset without a path": ("hf_dataset: {name: a}", 'hf_dataset needs a "path" in each entry'),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name: str, refused_training: Refused, here: Path) -> None:
    content, says = YAML[name]
    (here / "lora.yaml").write_text(content + "\n")
    assert says in refused_training("-c", "lora.yaml")


def test_a_configuration_that_is_not_text(refused_training: Refused, here: Path) -> None:
    (here / "lora.yaml").write_bytes(b"\xff\xfe\x00")
    assert "--config lora.yaml: not UTF-8 text" in refused_training("-c", "lora.yaml")
    assert "--config .: Is a directory" in refused_training("-c", ".")


# --- adapters to begin from or to use ---------------------------------------------------------------------------------


def test_adapter_files_that_do_not_fit(refused_training: Refused, inputs: Inputs, here: Path) -> None:
    other_rank = inputs.adapter("rank-4", 4, 1) / "adapters.safetensors"
    assert "its rank is 4; say --lora-rank 4" in refused_training("--resume-adapter-file", other_rank)
    other_layer = inputs.adapter("layer-0", 8, 0) / "adapters.safetensors"
    assert "holds layer 0, which --num-layers 1 of 2 does not train; say --num-layers 2" in refused_training(
        "--resume-adapter-file", other_layer
    )
    larger_model = inputs.adapter("layer-5", 8, 5) / "adapters.safetensors"
    assert "the model has 2; it belongs to another model" in refused_training("--resume-adapter-file", larger_model)
    assert "holds no adapter weights" in refused_training("--resume-adapter-file", inputs.model / "model.safetensors")
    (here / "broken.safetensors").write_bytes(b"nothing")
    assert "broken.safetensors: not a whole safetensors file" in refused_training(
        "--resume-adapter-file", "broken.safetensors"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fuse", "--save-path", "adapters"], "--save-path adapters: that is the folder of --adapter-path"),
        (["--export-peft", "adapters"], "--export-peft adapters: that is the folder of --adapter-path"),
        (["--fuse", "--save-path", "out", "--export-peft", "out"], "--export-peft out: that is the folder of --save-"),
    ],
)
def test_folders_that_are_wanted_twice(options: list[str], words: str, refused_training: Refused) -> None:
    assert words in refused_training(*options)


@pytest.mark.parametrize("form", ["flags", "yaml"])
def test_a_pasted_command_that_only_evaluates(form: str, refused: Refused, inputs: Inputs, here: Path) -> None:
    (here / "adapters").mkdir()
    (here / "adapters" / "adapters.safetensors").write_bytes(b"somebody's")
    base = ["train", "--model", inputs.model, "--data", inputs.data]
    if form == "flags":
        line = refused(*base, "--test")
        assert "to evaluate it use coordinator test --adapter-path adapters" in line
    else:
        (here / "eval.yaml").write_text("train: false\ntest: true\n")
        assert "train: false; to evaluate only: coordinator test -c eval.yaml" in refused(*base, "-c", "eval.yaml")


def test_an_adapter_file_of_another_width(refused_training: Refused, here: Path) -> None:
    stem = "model.layers.1.self_attn.q_proj"
    weights = {f"{stem}.lora_a": mx.zeros((32, 8)), f"{stem}.lora_b": mx.zeros((8, 64))}
    mx.save_safetensors("wide.safetensors", weights)
    line = refused_training("--resume-adapter-file", "wide.safetensors")
    assert "--resume-adapter-file wide.safetensors" in line
    assert "has shape (32, 8), here it is (64, 8)" in line


@pytest.mark.parametrize("command", ["generate", "test", "fuse"])
def test_adapters_that_are_none(command: str, refused: Refused, inputs: Inputs, here: Path) -> None:
    options = ["--model", inputs.model, *(["--prompt", "hello"] if command == "generate" else [])]
    if command == "test":
        options += ["--data", inputs.data]

    def run(adapter: str | Path) -> str:
        return refused(command, *options, "--adapter-path", adapter)

    assert "--adapter-path nowhere: no such folder" in run("nowhere")
    assert "a whole model, not an adapter; pass it as --model" in run(inputs.model)
    assert "so this is no adapter" in run(inputs.data)
    foreign = inputs.adapter(f"foreign-{command}", 4, 1)
    (foreign / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "an adapter in PEFT's layout" in run(foreign)
    (foreign / "adapter_config.json").write_text("{")
    assert "adapter_config.json: not readable as JSON" in run(foreign)
    shutil.copytree(inputs.adapter(f"fine-{command}", 4, 1), here / "cut")
    os.truncate(here / "cut" / "adapters.safetensors", 300)
    assert "adapters.safetensors: cut off" in run("cut")


def test_the_other_commands(refused: Refused, inputs: Inputs, here: Path) -> None:
    model = ("--model", inputs.model)
    assert "has no test set; add test.jsonl" in refused("test", *model, "--data", inputs.data)
    assert "--prompt: empty" in refused("generate", *model, "--prompt", "")
    assert "--adapter-path adapters: no such folder" in refused("fuse", *model)
    assert "--memory: 'much' is no size" in refused("estimate", *model, "--memory", "much")
    assert "no data folder" in refused("data", "check", "./not-there")
    (here / "notes.txt").write_text("hello\n")
    assert "notes.txt" in refused("data", "convert", "notes.txt", "--out", "train.jsonl")
    assert "--valid" in refused("data", "split", inputs.data / "train.jsonl", "--out", "cut", "--valid", "2")


def test_data_check_lists_every_bad_row(
    here: Path, inputs: Inputs, tandem_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "train.jsonl").write_text('{"text": "a"}\n{"text": 1}\nfive\n')
    before = contents(here)
    assert run_cli(coordinator, ["data", "check", "."], prog_name="coordinator") == 2
    output, errors = capsys.readouterr()
    assert "train.jsonl:2: " in output + errors
    assert "train.jsonl:3: " in output + errors
    assert "Traceback" not in output + errors
    assert contents(here) == before


# --- machines ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_another_run_is_writing_to(refused_training: Refused, here: Path) -> None:
    other = RunFolder(here / "adapters")
    other.lock()
    try:
        assert "--adapter-path adapters: another run is writing here" in refused_training()
    finally:
        other.unlock()


def test_a_model_that_does_not_fit_the_memory(
    refused_training: Refused, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small: Facts = replace(facts(), gpu_memory_bytes=80 * MIB, total_memory_bytes=160 * MIB, free_memory_bytes=80 * MIB)
    monkeypatch.setattr("coordinator.preflight.facts", lambda: small)
    line = refused_training()
    assert "this machine has 80 MB for it" in line
    assert "(--force tries anyway)" in line
    command = ["train", "--model", str(inputs.model), "--data", str(inputs.data), "--iters", "1", "--force", "--plain"]
    assert run_cli(coordinator, command, prog_name="coordinator") == 0
    assert "this machine has 80 MB for it" in capsys.readouterr().out
    assert Path("adapters/adapters.safetensors").is_file()


def test_a_disk_that_is_full_before_the_run(refused_training: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * MIB))
    line = refused_training()
    assert "adapters: the disk has 5 MB free, this run needs about" in line
    assert "choose another folder" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small(refused_training: Refused, small_disk: Path) -> None:
    assert "the disk has 1 MB free" in refused_training("--adapter-path", small_disk / "adapters")
    assert not any(small_disk.iterdir())


def test_a_data_folder_on_a_disk_that_is_too_small(
    refused_training: Refused, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = small_disk / "home"
    home.mkdir()
    (small_disk / "filler").write_bytes(b"0" * (MIB - 4096 * 7))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "more").write_bytes(b"0" * MIB)
    (small_disk / "more").unlink()
    monkeypatch.setenv("TANDEM_HOME", str(home))
    line = refused_training()
    assert f"cannot write tokenised data to {home}/cache/tokens" in line
    assert "free some space or set TANDEM_HOME" in line


def test_files_that_may_not_grow(inputs: Inputs, here: Path, tandem_home: Path) -> None:
    """A quota: what the system refuses in the middle of writing leaves nothing half done."""
    credentials(tandem_home)
    before = contents(here)
    run = subprocess.run(
        [sys.executable, "-P", "-c", ENTRY, "train", "--model", inputs.model, "--data", inputs.data, "--iters", "2"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)),
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1
    assert "error: cannot write tokenised data" in run.stderr
    assert contents(here) == before
    assert not any((tandem_home / "cache" / "tokens").iterdir())
    assert not (tandem_home / "runs").exists()


def test_a_home_that_cannot_be(refused_training: Refused, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("TANDEM_HOME", str(here / "file" / "home"))
    assert "set TANDEM_HOME" in refused_training()


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_resuming_what_cannot_be_resumed(refused: Refused, inputs: Inputs, here: Path) -> None:
    folder = RunFolder(here / "adapters")
    folder.path.mkdir()
    folder.begin("20260101-000000-abcd", f"model: {inputs.model}\ndata: {inputs.data}\nbatch_size: 2\n")
    assert "--resume: --batch-size was 2 in this run and cannot become 3" in refused(
        "train", "--resume", "--batch-size", 3
    )
    assert "--resume: no usable checkpoint in adapters/checkpoints" in refused("train", "--resume")
    folder.config.write_text("batch_size: {")
    assert "adapters/config.yaml:1: not YAML" in refused("train", "--resume")
