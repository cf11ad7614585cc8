"""The installation as people do it, with the packages of the lock file: it fetches them, so it is a slow test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.installs import ROOT, SYSTEM_PATH, Machine

FROM_PIP = ("PIP_", "UV_", "SSL_", "REQUESTS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_locked_packages_are_installed_without_the_checkout(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "Linux")
    (machine.tools / "python3").unlink()  # the real one makes the environment
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", ROOT, checkout], check=True)
    # What is not committed yet counts, too.
    for name in ("deploy", "node", "coordinator", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, checkout / name)
    environment = machine.environment(PATH=f"{machine.tools}:{os.environ['PATH']}")
    environment |= {name: value for name, value in os.environ.items() if name.startswith(FROM_PIP)}
    environment |= {"UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache" / "uv"))}
    environment.pop("PYTHONPATH")
    done = subprocess.run(
        [checkout / "deploy" / "install.sh", "--no-service"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    changed = subprocess.run(
        ["git", "status", "--short", "--ignored"], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert "build" not in changed.stdout
    assert "egg-info" not in changed.stdout
    shutil.rmtree(checkout)
    outside = {"PATH": SYSTEM_PATH, "HOME": str(machine.home)}
    said = subprocess.run(
        [machine.bin / "tandem", "info", "--json"], capture_output=True, text=True, check=True, env=outside, cwd="/"
    )
    assert json.loads(said.stdout)["mlx"]
    subprocess.run([machine.bin / "tandem", "train", "--help"], check=True, env=outside, capture_output=True)
