"""A model's own Python files run only where the coordinator and the machine's owner both want it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.cli import coordinator as program
from node.client import NodeClient
from node.clikit import run_cli
from node.errors import NodeError, UserError
from node.events import Ready
from node.manifest import digest as manifest_digest
from node.manifest import manifest_of
from node.spec import JobSpec, ModelSpec, Setup
from node.store import Store
from node.supervisor import LocalWorker, WorkerLink
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.pairs import pair
from tests.fixtures.runs import ENTRY, write_chat_data

ALLOWS = "--trust-remote-code"


@dataclass(frozen=True)
class Inputs:
    """Models that would leave a mark if any of their Python files ran, an adapter and data."""

    folder: Path
    own_model: Path
    own_tokenizer: Path
    marks: Path

    @property
    def ran(self) -> list[str]:
        """Which files have run since the last look."""
        found = sorted(path.name for path in self.marks.iterdir())
        for path in self.marks.iterdir():
            path.unlink()
        return found


def _spying(marks: Path, name: str) -> str:
    return f"import os, pathlib\npathlib.Path({str(marks)!r}, f'{name}-{{os.getpid()}}').touch()\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    marks = folder / "marks"
    marks.mkdir()
    own_model = tiny_model(folder / "own-model", "llama")
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"model_file": "custom.py"}))
    (own_model / "custom.py").write_text(
        _spying(marks, "model") + "from mlx_lm.models.llama import Model, ModelArgs  # noqa: F401\n"
    )
    own_tokenizer = tiny_model(folder / "own-tokenizer", "llama")
    settings = json.loads((own_tokenizer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (own_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((own_tokenizer / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineModel"}
    (own_tokenizer / "config.json").write_text(json.dumps(config))
    (own_tokenizer / "mine.py").write_text(
        _spying(marks, "tokenizer")
        + "from transformers import PreTrainedTokenizerFast, PretrainedConfig\n"
        + "class Mine(PreTrainedTokenizerFast): pass\n"
        + "class MineConfig(PretrainedConfig): pass\n"
    )
    # Names that Python or a library might pick up by itself.
    for model in (own_model, own_tokenizer):
        for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "__init__.py", "llama.py", "mlx.py"):
            (model / name).write_text(_spying(marks, "stray"))
    from tests.fixtures.adapters import random_adapter

    plain = tiny_model(folder / "plain", "llama")
    for model in (own_model, own_tokenizer):
        random_adapter(folder / f"adapter-of-{model.name}", plain, num_layers=-1)
    write_chat_data(folder / "data", train=6, valid=2, test=2)
    return Inputs(folder, own_model, own_tokenizer, marks)


def coordinator(*arguments: str | Path, cwd: Path, home: Path) -> tuple[int, str]:
    environment = {**os.environ, "TANDEM_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ENTRY, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


async def until_it_fails(worker: WorkerLink) -> None:
    while True:
        await worker.receive()


def commands(inputs: Inputs, model: Path, adapter: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    data = inputs.folder / "data"
    small = ("--iters", "2", "--batch-size", "2", "--lora-layers", "1", "--val-batches", "1")
    return {
        "train": ("train", "--model", model, "--data", data, *small, "--nodes", "local", "--adapter-path", out / "a"),
        "test": ("test", "--model", model, "--data", data, "--test-batches", "1"),
        "generate": ("generate", "--model", model, "--prompt", "the quick", "--max-tokens", "2"),
        "fuse": ("fuse", "--model", model, "--adapter-path", adapter, "--save-path", out / "fused", "--export-gguf"),
        "check": ("data", "check", data, "--model", model),
        "estimate": ("estimate", "--model", model),
    }


@pytest.mark.parametrize("command", ["train", "test", "generate", "fuse", "check", "estimate"])
def test_no_command_runs_a_models_files_by_itself(
    command: str,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model in (inputs.own_model, inputs.own_tokenizer):
        monkeypatch.chdir(model)
        adapter = inputs.folder / f"adapter-of-{model.name}"
        arguments = commands(inputs, model, adapter, tmp_path / model.name)[command]
        code = run_cli(program, [str(argument) for argument in arguments], prog_name="coordinator")
        said = "".join(capsys.readouterr())
        assert inputs.ran == [], said
        if command == "estimate" or (command == "check" and model == inputs.own_model):
            assert code == 0, said  # it needs nothing of them
        else:
            assert code == 2, said
            (line,) = said.splitlines()
            assert line.endswith(
                "which runs only with --trust-remote-code"
                if model == inputs.own_model
                else "which run only with --trust-remote-code"
            )


def test_with_leave_they_run(inputs: Inputs, tmp_path: Path) -> None:
    used = {"generate": (inputs.own_model, "model"), "check": (inputs.own_tokenizer, "tokenizer")}
    for command, (model, name) in used.items():
        arguments = commands(inputs, model, Path(), tmp_path)[command]
        code, said = coordinator(*arguments, ALLOWS, cwd=tmp_path, home=tmp_path / "home")
        assert code == 0, said
        assert {mark.split("-")[0] for mark in inputs.ran} == {name}


def test_a_worker_refuses_what_it_was_given_no_leave_for(inputs: Inputs, tmp_path: Path) -> None:
    async def work() -> None:
        worker = await LocalWorker.start(tmp_path)
        try:
            await worker.send(Setup(JobSpec("job", str(tmp_path), ModelSpec(str(inputs.own_model)))))
            with pytest.raises(UserError, match=r"own Python file 'custom\.py', which runs only with --trust-remote-c"):
                await until_it_fails(worker)
        finally:
            await worker.close()

    asyncio.run(work())
    assert inputs.ran == []


@pytest.mark.parametrize("agrees", [False, True], ids=["owner says nothing", "owner agrees"])
def test_a_nodes_owner_must_agree(agrees: bool, inputs: Inputs, tmp_path: Path) -> None:
    """The coordinator wants it in each case."""

    async def work(giver: ServingNode, node: ServingNode) -> None:
        pair(giver.home, node.home)
        certificates = {giver.address: giver.certificate}
        found = manifest_of(inputs.own_model, "own", "", tmp_path / "digests.json", with_code=True)
        Store(giver.home / "store").adopt(found, inputs.own_model)
        client = NodeClient(node.address, "Studio", node.certificate)
        try:
            link = await client.open_worker("run", "somebody")
            if not agrees:
                with pytest.raises(NodeError, match=r"own Python files.*node serve --trust-remote-code"):
                    await client.pull(found, [giver.address], lambda done, total: None, certificates)
                assert not (node.home / "store").exists() or not list((node.home / "store").rglob("blobs/*"))
                # Nor does it help that the files are there: the model is shared by somebody else on that machine.
                Store(node.home / "store").adopt(found, inputs.own_model)
            digest = (
                manifest_digest(found)
                if not agrees
                else await client.pull(found, [giver.address], lambda done, total: None, certificates)
            )
            model = ModelSpec("", trust_remote_code=True, manifest=digest)
            await link.send(Setup(JobSpec("job", "", model)))
            if agrees:
                while not isinstance(await link.receive(), Ready):
                    pass
            else:
                with pytest.raises(UserError, match="own Python file"):
                    await until_it_fails(link)
            await link.close()
        finally:
            await client.close()

    with (
        ServingNode("giver", tmp_path / "giver", arguments=[ALLOWS]) as giver,
        ServingNode("Studio", tmp_path / "studio", arguments=[ALLOWS] if agrees else []) as node,
    ):
        asyncio.run(work(giver, node))
    assert [mark.split("-")[0] for mark in inputs.ran] == (["model"] if agrees else [])


def test_without_leave_the_files_are_not_even_listed(inputs: Inputs, tmp_path: Path) -> None:
    names = {file.name for file in manifest_of(inputs.own_model, "own", "", tmp_path / "digests.json").files}
    assert not {name for name in names if name.endswith(".py")}
    assert "config.json" in names


def test_a_node_without_leave_is_left_out_with_a_line(inputs: Inputs, tmp_path: Path) -> None:
    with ServingNode("Studio", tmp_path / "studio", friends=[tmp_path / "home"]) as node:
        arguments = commands(inputs, inputs.own_model, Path(), tmp_path)["train"]
        arguments = tuple(node.address if argument == "local" else argument for argument in arguments)
        code, said = coordinator(*arguments, ALLOWS, cwd=tmp_path, home=tmp_path / "home")
        studio = {pid.split("-")[1] for pid in inputs.ran}
    assert code == 0, said
    line = next(line for line in said.splitlines() if "Studio is left out" in line)
    assert "its owner agrees: node serve --trust-remote-code" in line
    assert len(studio) == 1, "only this machine's worker ran it"
