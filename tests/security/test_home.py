"""What the program keeps of its own, other users of the machine do not see: rows, weights, logs, keys."""

from __future__ import annotations

from pathlib import Path

from node.files import make_private_folder
from node.home import tidy_jobs
from tests.fixtures.models import tiny_model
from tests.fixtures.nodes import ServingNode
from tests.fixtures.runs import Run, write_chat_data


def test_a_run_leaves_nothing_that_others_may_read(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = write_chat_data(tmp_path / "data", train=8, valid=2)
    home = tmp_path / "new" / "home"
    with ServingNode("ann", tmp_path / "home-ann", friends=[]) as own:
        assert closed(own.home) >= {"identity", "nodes"}
    paired = tmp_path / "home-ben"
    make_private_folder(home.parent)
    with ServingNode("ben", paired, friends=[home]) as ben:
        run = Run(
            "train", "--model", model, "--data", data, "--iters", "2", "--batch-size", "4", "--nodes", ben.address,
            "--force-all", "--adapter-path", tmp_path / "adapter",
            environment={"TANDEM_HOME": str(home)},
        )  # fmt: skip
        code, errors = run.wait()
        assert code == 0, errors
        assert closed(paired) >= {"identity", "jobs", "peers", "store"}
    assert home.stat().st_mode & 0o077 == 0
    assert closed(home) >= {"cache", "identity", "jobs", "runs"}


def closed(home: Path) -> set[str]:
    """Names of the folders in a home; fails when one of them is open to others."""
    folders = [path for path in home.iterdir() if path.is_dir()]
    for folder in folders:
        assert folder.stat().st_mode & 0o077 == 0, folder
    return {folder.name for folder in folders}


def test_folders_that_were_there_stay_as_they_are(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    make_private_folder(there / "a" / "b")
    make_private_folder(there / "a" / "b")
    assert [path.stat().st_mode & 0o777 for path in (there, there / "a", there / "a" / "b")] == [0o755, 0o700, 0o700]


def test_what_a_link_leads_to_is_not_tidied(tandem_home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.safetensors").write_bytes(b"weights")
    (tandem_home / "jobs").mkdir()
    (tandem_home / "jobs" / "run-pid999999-abcd").symlink_to(elsewhere)
    tidy_jobs()
    assert (elsewhere / "mine.safetensors").exists()
