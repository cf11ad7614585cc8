"""A real small model, from training to llama.cpp. Needs the dependency group ``slow``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler

from node.spec import Fuse, ModelSpec
from node.worker.export import fuse
from tests.fixtures.smollm import smollm2
from tests.node.export.adapters import random_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
TEXTS = [
    "Hello world",
    "  two spaces, a tab\tand 3.14159 or 1234567890 digits",
    "naïve café — “quotes” … 你好、世界 🦙🚀 \u200b",
    "def f(x):\n    return x ** 2\n\n\n# end\r\n",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "I've we'll THEY'RE don't",
    "",
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smollm2(tmp_path_factory.mktemp("smollm"))


@pytest.fixture(scope="session")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return random_adapter(folder, model_folder, layers=4, scale=1.0, keys=["self_attn.q_proj", "mlp.down_proj"])


@pytest.fixture(scope="session")
def exported(model_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model with its adapter, fused and as GGUF in every type, by type."""
    folder = tmp_path_factory.mktemp("exported")
    spec = ModelSpec(str(model_folder), str(adapter))
    for kind in ("f32", "f16", "q8_0"):
        request = Fuse(
            model=spec,
            save_path=str(folder / "fused"),
            gguf_path=str(folder / f"{kind}.gguf"),
            gguf_type=kind,
            source="HuggingFaceTB/SmolLM2-135M-Instruct",
            fused_model=kind == "f32",
        )
        fuse(spec, request, lambda _task, _done, _total: None)
    return {kind: folder / f"{kind}.gguf" for kind in ("f32", "f16", "q8_0")} | {"fused": folder / "fused"}


@pytest.fixture(scope="session")
def in_mlx(exported: dict[str, Path]) -> tuple[Any, Any]:
    model, tokenizer, *_ = load(str(exported["fused"]))
    return model, tokenizer


def in_llama_cpp(path: Path) -> Any:
    import llama_cpp

    return llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, seed=0)


@pytest.fixture(scope="session", params=["f16", "q8_0"])
def llama(request: pytest.FixtureRequest, exported: dict[str, Path]) -> Iterator[Any]:
    loaded = in_llama_cpp(exported[request.param])
    yield loaded
    loaded.close()


def greedy(llama: Any, prompt: list[int], count: int) -> list[int]:
    llama.reset()
    llama.eval(prompt)
    answer: list[int] = []
    while len(answer) < count:
        answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(answer[-1:])
    return answer


def test_the_model_answers(model_folder: Path) -> None:
    model, tokenizer, *_ = load(str(model_folder))
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    text = "".join(part.text for part in stream_generate(model, tokenizer, prompt, max_tokens=12))
    assert "Paris" in text


@pytest.mark.parametrize("text", TEXTS)
def test_llama_cpp_tokenizes_alike(in_mlx: tuple[Any, Any], llama: Any, text: str) -> None:
    _, tokenizer = in_mlx
    assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)
    assert llama.detokenize(tokenizer.encode(text), special=True).decode() == text


def test_llama_cpp_renders_the_chat_alike(in_mlx: tuple[Any, Any], llama: Any) -> None:
    from jinja2 import Template

    _, tokenizer = in_mlx
    written = Template(llama.metadata["tokenizer.chat_template"])
    rendered = written.render(messages=QUESTION, add_generation_prompt=True)
    tokens = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert llama.tokenize(rendered.encode(), add_bos=True, special=True) == tokens


def test_greedy_answers_agree_for_twenty_tokens(in_mlx: tuple[Any, Any], exported: dict[str, Path]) -> None:
    model, tokenizer = in_mlx
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    parts = stream_generate(model, tokenizer, prompt, max_tokens=20, sampler=make_sampler(temp=0.0))
    expected = [part.token for part in parts]
    for kind in ("f32", "f16"):
        llama = in_llama_cpp(exported[kind])
        assert greedy(llama, prompt, len(expected)) == expected, kind
        llama.close()


def test_logits_agree(in_mlx: tuple[Any, Any], exported: dict[str, Path]) -> None:
    model, tokenizer = in_mlx
    tokens = tokenizer.encode("The quick brown fox jumps over the lazy dog, 12345 times: déjà vu.")
    expected = np.array(model(mx.array([tokens]))[0].astype(mx.float32))
    # Logits of about 7 on average; how llama.cpp multiplies f16 depends on the processor (0.003 to 0.0102 were seen).
    for kind, mean, same in (("f32", 0.01, 1.0), ("f16", 0.02, 1.0), ("q8_0", 0.6, 0.8)):
        llama = in_llama_cpp(exported[kind])
        llama.eval(tokens)
        found = np.array(llama.scores[: len(tokens)])
        assert np.abs(found - expected).mean() < mean, kind
        assert (found.argmax(-1) == expected.argmax(-1)).mean() >= same, kind
        llama.close()


def test_q8_0_is_what_llama_cpp_itself_makes_of_f32(exported: dict[str, Path], tmp_path: Path) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    theirs = tmp_path / "theirs.gguf"
    done = llama_cpp.llama_model_quantize(str(exported["f32"]).encode(), str(theirs).encode(), ctypes.byref(settings))
    assert done == 0
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(exported["q8_0"]).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.tensor_type == expected[name].tensor_type, name
        assert np.array_equal(tensor.data, expected[name].data), name


def test_the_adapter_makes_a_difference(in_mlx: tuple[Any, Any], model_folder: Path) -> None:
    model, tokenizer = in_mlx
    tokens = mx.array([tokenizer.encode("The quick brown fox")])
    base, *_ = load(str(model_folder))
    assert np.abs(np.array(model(tokens)) - np.array(base(tokens))).max() > 0.5
