"""The project keeps its own rules: style, types, stubs, direction of imports, start-up."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("coordinator", "node", "tests", "deploy/run", "deploy/services.py")
TYPED = ("coordinator", "node", "tests/fixtures", "tests/benchmarks")


def check(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command that must succeed; what it printed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_style() -> None:
    check(sys.executable, "-m", "ruff", "check", *SOURCES)


def test_layout_of_the_code() -> None:
    check(sys.executable, "-m", "ruff", "format", "--check", *SOURCES)


@pytest.mark.timeout(280)
def test_types(tmp_path: Path) -> None:
    check(sys.executable, "-m", "mypy", *TYPED)


def test_stubs_are_what_the_proto_files_give(tmp_path: Path) -> None:
    check(ROOT / "deploy" / "stubs", tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*")}
    kept = {path.relative_to(ROOT / "proto"): path.read_bytes() for path in (ROOT / "proto").rglob("*_pb2*.py*")}
    kept = {path: content for path, content in kept.items() if "__pycache__" not in path.parts}
    assert made == kept, "run deploy/stubs and commit what it wrote"


def modules(package: str) -> list[Path]:
    """The Python files of a package."""
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at any depth of its code."""
    found: set[str] = set()
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            found.update(alias.name for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"{path}: relative imports hide the direction"
            found.add(item.module or "")
            found.update(f"{item.module}.{alias.name}" for alias in item.names)
    return found


def starts(names: set[str], *packages: str) -> set[str]:
    return {name for name in names for package in packages if name == package or name.startswith(package + ".")}


def forbidden(paths: list[Path], *packages: str) -> dict[str, set[str]]:
    """Which of these files import which of these packages."""
    found = {str(path.relative_to(ROOT)): starts(imported(path), *packages) for path in paths}
    return {path: names for path, names in found.items() if names}


def test_node_never_imports_the_coordinator() -> None:
    assert not forbidden(modules("node"), "coordinator", "tests")


def test_the_coordinator_imports_neither_mlx_nor_the_worker() -> None:
    assert not forbidden(modules("coordinator"), "mlx", "mlx_lm", "node.worker", "tests")


def test_only_worker_and_reducer_import_mlx() -> None:
    outside = [path for path in modules("node") if not {"worker", "reducer"} & set(path.relative_to(ROOT).parts)]
    assert not forbidden(outside, "mlx", "mlx_lm", "node.worker")


def test_generated_messages_are_touched_by_the_codec_only() -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ("node", "coordinator")
        for path in modules(package)
        if starts(imported(path), "tandem")
    }
    assert users <= {
        "node/wire.py",
        "node/supervisor.py",
        "node/rpc.py",
        "node/client.py",
        "node/daemon.py",
        "node/service.py",
        "node/file_service.py",
    }


@pytest.mark.parametrize("program", ["coordinator", "node", "tandem"])
def test_help_imports_nothing_heavy(program: str) -> None:
    module = {"coordinator": "coordinator.cli", "node": "node.cli", "tandem": "coordinator.tandem"}[program]
    code = (
        "import json, sys\n"
        f"from {module} import main\n"
        "sys.argv = ['x', '--help']\n"
        "code = main()\n"
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    exit_code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert exit_code == 0
    assert "Usage" in done.stdout
    heavy = {
        "mlx",
        "mlx_lm",
        "transformers",
        "numpy",
        "rich",
        "datasets",
        "huggingface_hub",
        "google.protobuf",
        "yaml",
        "grpc",
        "zeroconf",
        "cryptography",
        "starlette",
        "uvicorn",
        "chartkick",
    }
    assert not heavy & set(loaded)


def test_the_wheel_holds_our_packages_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    check("git", "clone", "--quiet", ROOT, copy)
    new = check("git", "ls-files", "--others", "--exclude-standard").splitlines()
    changed = check("git", "diff", "--name-only", "HEAD").splitlines()  # in the index or not
    for name in [*new, *changed]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    check(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=copy)
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]}
    assert tops == {"coordinator", "node", "tandem"}
    assert "tandem/v1/worker_pb2.py" in names
    assert {"coordinator/view/report.js", "coordinator/dashboard/dashboard.js"} <= set(names)
    assert {"coordinator/py.typed", "node/py.typed"} <= set(names)


def test_mlx_comes_in_the_right_kind_for_each_platform() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        text.split(";")[1].strip(): text.split(">")[0]
        for text in project["dependencies"]
        if text[:3] == "mlx" and ";" in text
    }
    assert wanted == {"sys_platform == 'darwin'": "mlx", "sys_platform == 'linux'": "mlx[cpu]"}
    assert set(project["scripts"]) == {"coordinator", "node", "tandem"}


def test_nothing_of_a_particular_machine_or_registry_is_committed() -> None:
    files = check("git", "ls-files").split()
    words = ("pypi" + ".org", "pythonhosted" + ".org", "/wo" + "rk/", "/ro" + "ot/", "/opt/" + "pypi")
    for name in files:
        path = ROOT / name
        if path.is_file():
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], name


def test_the_committed_locks_cover_the_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lock = (ROOT / "deploy" / "locks" / "base.txt").read_text()
    for requirement in project["project"]["dependencies"]:
        name = requirement.split(";")[0].split(">")[0].split("=")[0].split("[")[0]
        assert f"\n{name}==" in "\n" + lock or f"\n{name}[" in "\n" + lock, f"{name}: run deploy/lock"


def test_no_python_of_a_foreign_folder_is_picked_up(tmp_path: Path) -> None:
    (tmp_path / "node.py").write_text("raise SystemExit('the wrong node')")
    (tmp_path / "coordinator.py").write_text("raise SystemExit('the wrong coordinator')")
    script = Path(sys.executable).parent / "coordinator"
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from node import supervisor

    assert os.path.isabs(supervisor.worker_environment()["PYTHONPATH"].split(os.pathsep)[0])
