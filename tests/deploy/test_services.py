"""What launchd and systemd are told: files that they take, and a command in them that serves."""

from __future__ import annotations

import importlib.util
import os
import plistlib
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from node.advert import SERVICE_TYPE
from tests.fixtures.installs import LABEL, ROOT, UNIT, Machine, is_there

READY_SECONDS = 60.0
AWKWARD = ("--name", 'Ada\'s "Mac" & 100% <$HOME> \\')


def services() -> ModuleType:
    """deploy/services.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("services", ROOT / "deploy" / "services.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plist(machine: Machine, start: str) -> dict[str, Any]:
    loaded: dict[str, Any] = plistlib.loads(machine.service(start).read_bytes())
    return loaded


def unit(path: Path) -> dict[str, list[str]]:
    """A unit's settings, whatever their section."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def words(value: str) -> list[str]:
    """Words as systemd reads them."""
    return [word.replace("%%", "%") for word in shlex.split(value)]


def test_an_agent_is_started_by_the_app(tmp_path: Path) -> None:
    mac = Machine(tmp_path, "Darwin")
    mac.install("--", *AWKWARD)
    made = plist(mac, "login")
    assert made["Label"] == LABEL
    launcher, patience, *command = made["ProgramArguments"]
    assert launcher == str(mac.app / "Contents" / "MacOS" / "mlx-tandem")
    assert os.access(launcher, os.X_OK)
    assert int(patience) > 0
    assert command == [str(mac.lib / "current" / "bin" / "node"), "serve", *AWKWARD, "--log", str(mac.log)]
    assert made["RunAtLoad"] is True
    assert made["KeepAlive"] == {"SuccessfulExit": False}
    assert made["AssociatedBundleIdentifiers"] == [LABEL]
    assert made["StandardOutPath"] == made["StandardErrorPath"] == str(mac.log)
    assert mac.log.parent.is_dir(), "launchd makes no folders"
    assert made["EnvironmentVariables"]["TANDEM_HOME"] == str(mac.tandem_home)
    assert "UserName" not in made
    assert any("codesign" in line and LABEL in line for line in mac.told())


def test_a_daemon_runs_as_the_user(tmp_path: Path) -> None:
    mac = Machine(tmp_path, "Darwin")
    mac.install("--at-boot")
    made = plist(mac, "boot")
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert made["UserName"] == user
    assert made["EnvironmentVariables"]["HOME"] == str(mac.home)
    assert made["ProgramArguments"][0] == str(mac.lib / "current" / "bin" / "node")
    assert made["ProgramArguments"][-2:] == ["--log", str(mac.log)]
    assert "LimitLoadToSessionType" not in made
    assert mac.service("boot").stat().st_mode & 0o777 == 0o644, "launchd refuses what others can write"


def test_every_key_of_a_plist_is_one_of_launchds() -> None:
    known = {
        *(
            "Label",
            "UserName",
            "ProgramArguments",
            "EnvironmentVariables",
            "RunAtLoad",
            "KeepAlive",
            "WorkingDirectory",
        ),
        *("ThrottleInterval", "ExitTimeOut", "ProcessType", "SoftResourceLimits", "Umask", "StandardOutPath"),
        *("StandardErrorPath", "LimitLoadToSessionType", "AssociatedBundleIdentifiers"),
    }
    for kind in ("agent", "daemon"):
        made = services().launchd_plist(
            kind, ["/x/node", "serve"], user="ada", home=Path("/h"), log=Path("/l"), launcher=None, environment={}
        )
        assert plistlib.loads(made).keys() <= known


def test_the_app_says_why_it_wants_the_network() -> None:
    info = plistlib.loads((ROOT / "deploy" / "launchd" / "Info.plist").read_bytes())
    assert info["CFBundleIdentifier"] == LABEL
    assert info["CFBundleExecutable"] == "mlx-tandem"
    assert info["CFBundlePackageType"] == "APPL"
    assert info["NSBonjourServices"] == [SERVICE_TYPE.removesuffix(".local.")]
    assert len(info["NSLocalNetworkUsageDescription"]) > 20
    assert info["LSUIElement"] is True


@pytest.mark.parametrize("start", ["login", "boot"])
def test_a_unit_says_what_was_asked_for(tmp_path: Path, start: str) -> None:
    linux = Machine(tmp_path, "Linux")
    linux.install(f"--at-{start}", "--", *AWKWARD)
    made = unit(linux.service(start))
    (command,) = made["ExecStart"]
    assert words(command.replace("$$", "$")) == [str(linux.lib / "current" / "bin" / "node"), "serve", *AWKWARD]
    environment = dict(words(value)[0].split("=", 1) for value in made["Environment"])
    assert environment["TANDEM_HOME"] == str(linux.tandem_home)
    assert made["KillMode"] == ["mixed"], "workers are not to be ended between two steps"
    assert not re.search(r"@[A-Z]+@", linux.service(start).read_text())


def test_a_unit_may_write_to_folders_that_are_there(tmp_path: Path) -> None:
    linux = Machine(tmp_path, "Linux")
    models, log = linux.home / "models of mine", linux.home / "logs" / "node.log"
    linux.install("--at-boot", "--", "--log", "logs/node.log", HF_HOME=str(models))
    writable = [f"-{folder}" for folder in (linux.tandem_home, models, log.parent)]
    for _ in range(2):
        assert words(unit(linux.service("boot"))["ReadWritePaths"][0]) == writable
        # systemd passes over what is missing when it starts, and it stays read-only.
        for folder in (linux.tandem_home, models, log.parent):
            assert folder.is_dir()
            folder.rmdir()
        linux.install(HF_HOME="", TANDEM_HOME="")  # as it was at the last time


def test_what_a_unit_cannot_write_to_is_said_before_anything_is_replaced(tmp_path: Path) -> None:
    linux = Machine(tmp_path, "Linux")
    linux.install("--no-service")
    good = linux.tree()
    (linux.home / "file").write_text("")
    failed = linux.run("--at-boot", HF_HOME=str(linux.home / "file" / "models"))
    assert failed.returncode == 1
    assert str(linux.home / "file") in failed.stderr
    assert linux.tree() - good <= {str(linux.home / "file"), str(linux.tandem_home)}
    assert not linux.told()


@pytest.mark.skipif(not is_there("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("start", ["login", "boot"])
def test_systemd_takes_the_unit(tmp_path: Path, start: str) -> None:
    linux = Machine(tmp_path, "Linux")
    linux.install(f"--at-{start}", "--", "--name", "100% Ada")
    path = linux.service(start)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if UNIT in line or str(path) in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.skipif(not is_there("systemd-analyze"), reason="needs systemd-analyze")
def test_the_system_unit_exposes_little(tmp_path: Path) -> None:
    linux = Machine(tmp_path, "Linux")
    linux.install("--at-boot")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=30", "--no-pager", linux.service("boot")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def serves_and_ends(command: list[str], environment: dict[str, str], said: Path) -> None:
    """Start what a service would start, until it says that it serves; then stop it as a service manager does."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + READY_SECONDS
        while not (said.exists() and "serving as" in said.read_text()):
            assert process.poll() is None, said.read_text() if said.exists() else "it wrote no log"
            assert time.monotonic() < until, "it does not serve"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(READY_SECONDS) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("start", ["login", "boot"])
def test_the_command_of_the_plist_serves(tmp_path: Path, start: str) -> None:
    mac = Machine(tmp_path, "Darwin")
    mac.install(f"--at-{start}", "--", "--port", "0", "--host", "127.0.0.1")
    made = plist(mac, start)
    command = made["ProgramArguments"]
    if start == "login":
        command[1] = "0"  # this machine may have no network to wait for
    serves_and_ends(command, {"HOME": str(mac.home), **made["EnvironmentVariables"]}, mac.log)
    mac.install("--uninstall")
    assert not mac.log.parent.exists()


def test_the_command_of_the_unit_serves(tmp_path: Path) -> None:
    linux = Machine(tmp_path, "Linux")
    log = tmp_path / "said.log"
    linux.install("--", "--port", "0", "--host", "127.0.0.1", "--log", str(log))
    made = unit(linux.service("login"))
    environment = dict(words(value)[0].split("=", 1) for value in made["Environment"])
    serves_and_ends(words(made["ExecStart"][0].replace("$$", "$")), {"HOME": str(linux.home), **environment}, log)
