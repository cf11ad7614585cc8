"""The how-to pages: what they tell people to type works, in their order, from beginning to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.commands import PROGRAMS, ROOT, assert_understood, blocks, our_commands, typed_lines
from tests.fixtures.pages import MODEL, Follower, hub_cache
from tests.fixtures.runs import losses, metrics

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "README.md")
THEIRS = ("mlx_lm.generate", "mlx_lm.fuse")
"""Other programs that our environment has."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def follower(hub: Path, tmp_path: Path) -> Iterator[Follower]:
    with Follower(tmp_path, hub) as person:
        yield person


def follow(follower: Follower, name: str) -> Path:
    """Do what a page says; the folder that its person works in."""
    follower.follow((DOCS / name).read_text())
    return follower["Studio"].work


def members(run: Path) -> set[int]:
    """How many machines had rows of a step."""
    return {entry["nodes"] for entry in metrics(run) if "loss" in entry}


def three_macs(work: Path) -> None:
    assert 3 in members(work / "adapters-all")


def resume(work: Path) -> None:
    steps = [step for step, _ in losses(work / "adapters")]
    assert steps == list(range(1, len(steps) + 1)), "each step once, whatever came between"
    assert 2 in members(work / "adapters"), "and Air took part in the last ones"
    assert len(list((work / "adapters" / "previous").iterdir())) == 1


def wifi(work: Path) -> None:
    assert 2 in members(work / "adapters")


def scaling(work: Path) -> None:
    assert members(work / "adapters") == {1}


def memory(work: Path) -> None:
    assert (work / "adapters" / "adapters.safetensors").is_file()


def export(work: Path) -> None:
    assert (work / "fused_model" / "ggml-model-f16.gguf").is_file()
    assert (work / "fused_q8" / "Modelfile").read_text().startswith("FROM ./model-q8_0.gguf")
    assert (work / "fused_model-2" / "ggml-model-f16.gguf").is_file()
    assert not json.loads((work / "fused_full" / "config.json").read_text()).get("quantization")


def from_mlx_lm(work: Path) -> None:
    scale = {
        name: json.loads((work / name / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        for name in ("adapters", "adapters-yaml", "adapters-preset")
    }
    assert scale == {"adapters": 2.0, "adapters-yaml": 20.0, "adapters-preset": 20.0}


def security(work: Path) -> None:
    assert 2 in members(work / "adapters")


OUTCOMES: dict[str, Callable[[Path], None]] = {
    "three-macs.md": three_macs,
    "resume.md": resume,
    "wifi.md": wifi,
    "scaling.md": scaling,
    "memory.md": memory,
    "export.md": export,
    "from-mlx-lm.md": from_mlx_lm,
    "security.md": security,
}


@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_page_can_be_followed(name: str, follower: Follower) -> None:
    OUTCOMES[name](follow(follower, name))


def test_each_page_is_followed_and_listed() -> None:
    names = {path.name for path in PAGES}
    assert names == set(OUTCOMES)
    listed = set(re.findall(r"^- \[[^\]]*\]\(([^)]+)\): ", (DOCS / "README.md").read_text(), re.M))
    assert listed == names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    text = page.read_text()
    assert typed_lines(text)
    for line in our_commands(text):
        assert_understood(line)
    others = [line for line in typed_lines(text) if line.split(" ")[0] not in {*PROGRAMS, *THEIRS}]
    assert not others, "blocks without a language hold commands that can be typed and tested; others name one"
    models = {match for line in typed_lines(text) for match in re.findall(r"mlx-community/\S+", line)}
    assert models <= {MODEL}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_nothing_to_its_follower_that_is_not_understood(page: Path) -> None:
    said = [block.marks for block in blocks(page.read_text())]
    comments = re.findall(r"<!--", page.read_text())
    assert len([marks for marks in said if marks]) == len(comments), "a comment stands right before its block"
    assert {name for marks in said for name in marks} <= {"on", "then", "exit"}


def anchors(text: str) -> set[str]:
    """Names of a document's headings in links, as GitHub makes them."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*)$", bare, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in LINK.findall(text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there.read_text()), f"{page.name}: {target}"
