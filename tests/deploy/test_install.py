"""deploy/install.sh: what it puts where, how it upgrades and fails, and that it takes all of it away again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from node.identity import credentials
from node.pairing.tokens import new_token
from node.peers import Peers
from tests.fixtures.installs import LABEL, SYSTEM_PATH, UNIT, Machine

SYSTEMS = ("Darwin", "Linux")
WAITING = """
import click, signal
from node.clikit import run_cli

@click.command()
def waiting():
    click.echo("runs")
    signal.pause()

run_cli(waiting, [], prog_name="waiting")
"""
"""A program of ours that waits for a signal."""


@pytest.fixture(params=SYSTEMS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, request.param)


@pytest.fixture
def mac(tmp_path: Path) -> Machine:
    return Machine(tmp_path, "Darwin")


@pytest.fixture
def linux(tmp_path: Path) -> Machine:
    return Machine(tmp_path, "Linux")


def links(machine: Machine) -> set[str]:
    return {path.name for path in machine.bin.iterdir()}


def test_what_is_installed_runs_and_is_taken_away_whole(machine: Machine) -> None:
    before = machine.tree()
    said = machine.install()
    assert links(machine) == {"coordinator", "node", "tandem"}
    version = subprocess.run(
        [machine.bin / "tandem", "--version"], capture_output=True, text=True, check=True, env={"PATH": SYSTEM_PATH}
    )
    assert version.stdout.startswith("mlx-tandem")
    assert machine.service("login").exists()
    assert not machine.service("boot").exists()
    assert "tandem node-pair" in said
    assert "sudo" not in "\n".join(machine.told())
    assert "kept: " in machine.install("--uninstall")
    left = machine.tree() - before
    made = {machine.service("login").parent, machine.home / "Applications", machine.home / ".local"}
    folders = {str(path) for folder in made for path in [folder, *folder.parents]} | {
        str(machine.home / "Library/Logs")
    }
    assert {path for path in left - folders if not path.startswith(str(machine.tandem_home))} == set()
    assert not [path for path in left if Path(path).is_file()]


def test_the_copy_that_stays_uninstalls_without_the_checkout(machine: Machine) -> None:
    said = machine.install()
    copy = machine.lib / "deploy" / "install.sh"
    assert f"{copy} --uninstall" in said
    refused = subprocess.run([copy], env=machine.environment(), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--uninstall" in refused.stderr
    subprocess.run([copy, "--uninstall"], env=machine.environment(), check=True, capture_output=True)
    assert not machine.lib.exists()
    assert not machine.service("login").exists()


def test_what_was_learnt_stays_unless_it_is_purged(machine: Machine) -> None:
    machine.install()
    kept = machine.tandem_home / "identity"
    kept.write_text("a key")
    machine.install("--uninstall")
    assert kept.read_text() == "a key"
    machine.install()
    machine.install("--uninstall", "--purge")
    assert not machine.tandem_home.exists()


def test_a_purge_spares_the_home_folder(machine: Machine) -> None:
    machine.install(TANDEM_HOME=str(machine.home))
    (machine.home / "thesis.txt").write_text("years of work")
    refused = machine.run("--uninstall", "--purge", TANDEM_HOME=str(machine.home))
    assert refused.returncode == 2
    assert (machine.home / "thesis.txt").exists()
    assert machine.lib.exists()


def test_launchd_is_told_in_order(mac: Machine) -> None:
    domain = f"gui/{os.getuid()}"
    start = [f"launchctl enable {domain}/{LABEL}", f"launchctl bootstrap {domain} {mac.service('login')}"]
    mac.install()
    assert [line for line in mac.told() if line.startswith("launchctl")] == start
    mac.install()
    assert mac.told() == [f"launchctl bootout {domain}/{LABEL}", *start]
    mac.install("--uninstall")
    assert mac.told() == [f"launchctl bootout {domain}/{LABEL}"]


def test_systemd_is_told_in_order(linux: Machine) -> None:
    start = [f"systemctl --user {what}" for what in ("daemon-reload", f"enable {UNIT}", f"restart {UNIT}")]
    stop = [f"systemctl --user {what}" for what in (f"disable --now {UNIT}", "daemon-reload")]
    linux.install()
    assert linux.told() == start
    linux.install()
    assert linux.told() == stop + start
    linux.install("--uninstall")
    assert linux.told() == stop


def test_at_boot_and_back(machine: Machine) -> None:
    machine.install("--at-boot")
    assert machine.service("boot").exists()
    assert not machine.service("login").exists()
    assert not machine.app.exists(), "a daemon needs no app to be let into the network"
    machine.install()
    assert machine.service("boot").exists(), "what is not said again stays"
    machine.install("--at-login")
    assert machine.service("login").exists()
    assert not machine.service("boot").exists()
    machine.install("--no-service")
    assert not machine.service("login").exists()
    assert not machine.app.exists()


def test_only_what_starts_at_boot_needs_sudo(machine: Machine) -> None:
    for_all = {"DESTDIR": "", "FAKE_UID": "501"}
    assert "sudo" not in machine.install("--dry-run", "--at-login", **for_all)
    said = machine.install("--dry-run", "--at-boot", **for_all)
    system = {"Darwin": "launchctl bootstrap system", "Linux": "systemctl --system restart"}[machine.system]
    assert f"would run: sudo {system}" in said
    assert not machine.told()


def test_under_sudo_it_would_serve_the_wrong_user(machine: Machine) -> None:
    refused = machine.run(SUDO_USER="ada", FAKE_UID="0")
    assert refused.returncode == 2
    assert "without sudo" in refused.stderr


def test_a_dry_run_changes_nothing(machine: Machine) -> None:
    empty = machine.tree()
    assert str(machine.service("login")) in machine.install("--dry-run")
    assert machine.tree() == empty
    machine.install()
    machine.told()
    full = machine.tree()
    machine.install("--dry-run", "--at-boot")
    said = machine.install("--dry-run", "--uninstall", "--purge")
    assert f"would run: rm -rf {machine.lib}" in said
    assert machine.tree() == full
    assert machine.told() == []


def test_an_upgrade_keeps_options_and_the_app_and_drops_the_old_version(machine: Machine) -> None:
    machine.install("--", "--name", "Ada's Mac", "--port", "0")
    (first,) = machine.versions
    service = machine.service("login").read_bytes()
    program = machine.app / "Contents" / "MacOS" / "mlx-tandem"
    before = program.stat() if machine.system == "Darwin" else None
    machine.install(TANDEM_BONJOUR="")
    (second,) = machine.versions
    assert first != second
    assert (machine.lib / "current").resolve() == second
    assert machine.service("login").read_bytes() == service
    if before is not None:
        assert (program.stat().st_ino, program.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    machine.install("--")
    assert b"Ada" not in machine.service("login").read_bytes()


def test_a_version_that_runs_is_not_pulled_from_under_it(linux: Machine) -> None:
    linux.install("--no-service")
    (first,) = linux.versions
    running = subprocess.Popen([first / "bin" / "python", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert "in use" in linux.install()
        assert first in linux.versions
    finally:
        running.communicate(b"\n")
    linux.install()
    assert first not in linux.versions
    assert len(linux.versions) == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_version_that_runs_under_another_name_is_not_pulled_from_under_it(
    linux: Machine, how: signal.Signals
) -> None:
    linux.install("--no-service")
    (first,) = linux.versions
    # As under a framework build of Python: no path of the version in what ps shows.
    with subprocess.Popen(
        ["./python", "-P", "-c", WAITING], cwd=first / "bin", env=linux.environment(), stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"runs\n"
        try:
            shown = subprocess.run(["ps", "-A", "-ww", "-o", "command="], capture_output=True, text=True, check=True)
            assert str(first) not in shown.stdout
            assert "in use" in linux.install()
            assert first in linux.versions
        finally:
            running.send_signal(how)
    linux.install()
    assert first not in linux.versions
    assert len(linux.versions) == 1


def test_what_fails_half_way_leaves_all_as_it_was(machine: Machine) -> None:
    empty = machine.tree()
    failed = machine.run(FAKE_BUILD="fail")
    assert failed.returncode != 0
    assert "could not install" in failed.stderr
    assert {path for path in machine.tree() - empty if Path(path).is_file()} == set()
    assert not machine.lib.exists()
    machine.install()
    machine.told()
    good = machine.tree()
    assert machine.run(FAKE_BUILD="fail").returncode != 0
    assert machine.run("--", "--no-such-option").returncode == 2
    assert machine.tree() == good
    assert machine.told() == []


def test_values_that_keep_the_service_from_starting_are_refused_before_anything_is_replaced(linux: Machine) -> None:
    linux.install("--", "--max-memory", "12GB")
    linux.told()
    good = linux.tree()
    missing = str(linux.home / "token")
    for option, value in (("--max-memory", "banana"), ("--host", "192.0.2.7"), ("--join", f"@{missing}")):
        refused = linux.run("--", option, value)
        assert refused.returncode == 2, refused.stdout
        assert f"{option} {value}: " in refused.stderr or f"{option}: '{value}'" in refused.stderr
        assert "nothing was changed" in refused.stderr
    assert linux.tree() == good
    assert linux.told() == []
    assert (linux.lib / "serve-options").read_text() == "--max-memory\n12GB\n"


def test_a_paired_machine_is_upgraded_without_the_file_of_its_used_token(linux: Machine) -> None:
    token = linux.home / "token"
    token.write_text(f"{new_token('ab' * 32)}\n")
    linux.install("--", "--join", f"@{token}")
    token.unlink()
    assert linux.run().returncode == 2, "it was not paired yet"
    Peers(linux.tandem_home).add("Air", credentials(linux.home / "air").certificate)
    # Where it is paired is what the service was handed, not what is set now.
    linux.install(TANDEM_HOME="")


def test_relative_paths_hold_in_another_folder(linux: Machine) -> None:
    (linux.home / "token").write_text(f"{new_token('ab' * 32)}\n")
    options = ("--", "--join", "@token", "--log=logs/node.log", "--name", "@token")
    linux.install("--no-service", "--prefix", "elsewhere", *options, TANDEM_HOME="data/here", HF_HOME="~/models")
    lib = linux.home / "elsewhere" / "lib" / "mlx-tandem"
    assert (lib / "serve-options").read_text().splitlines() == [
        "--join",
        f"@{linux.home}/token",
        f"--log={linux.home}/logs/node.log",
        "--name",
        "@token",
    ]
    kept = (lib / "environment").read_text().splitlines()
    assert f"TANDEM_HOME={linux.home}/data/here" in kept
    assert f"HF_HOME={linux.home}/models" in kept
    linux.install("--uninstall", "--purge", "--prefix", "elsewhere", TANDEM_HOME="data/here")
    assert not (linux.home / "data" / "here").exists()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_killed_half_way_is_made_good_by_the_next_run(linux: Machine, how: signal.Signals) -> None:
    linux.install()
    (version,) = linux.versions
    hanging = linux.popen(FAKE_BUILD="hang")
    assert hanging.stdout is not None
    while "hanging" not in hanging.stdout.readline():
        assert hanging.poll() is None
    second = linux.run()
    assert second.returncode == 1
    assert f"process {hanging.pid}" in second.stderr
    os.killpg(hanging.pid, how)
    hanging.communicate(timeout=60)
    assert hanging.returncode != 0
    assert (linux.lib / "current").resolve() == version
    linux.install()
    assert len(linux.versions) == 1
    assert not (linux.lib / ".lock").exists()


def test_a_service_that_does_not_start_is_said(machine: Machine) -> None:
    failed = machine.run(FAKE_REFUSE="1")
    assert failed.returncode == 1
    assert "did not start" in failed.stderr
    machine.install()


def test_without_a_screen_launchd_starts_it_later(mac: Machine) -> None:
    assert "next login" in mac.install(FAKE_NO_SCREEN="1")
    assert mac.service("login").exists()
    assert not [line for line in mac.told() if "bootstrap" in line]


def test_without_a_session_systemd_cannot_serve_a_user(linux: Machine) -> None:
    empty = linux.tree()
    for arguments in ((), ("--dry-run",)):
        refused = linux.run(*arguments, FAKE_NO_BUS="1")
        assert refused.returncode == 1
        assert refused.stderr == "install.sh: systemd does not run here: --no-service installs without\n"
        assert linux.tree() == empty
    (linux.root / "run" / "systemd" / "system").mkdir(parents=True)
    empty = linux.tree()
    refused = linux.run(FAKE_NO_BUS="1")
    assert refused.returncode == 1
    assert "has no session of systemd here" in refused.stderr
    assert "--at-boot" in refused.stderr
    assert linux.tree() == empty


def test_the_path_is_put_where_the_shell_reads_it(machine: Machine) -> None:
    mac = machine.system == "Darwin"
    for shell, file in (
        ("/bin/zsh", ".zprofile" if mac else ".zshrc"),
        ("/usr/bin/bash", ".bash_profile" if mac else ".bashrc"),
        ("/bin/dash", ".profile"),
        ("", ".profile"),
    ):
        said = machine.install("--no-service", SHELL=shell)
        assert f"""echo 'export PATH="{machine.bin}:$PATH"' >> ~/{file}\n""" in said
    assert f"as in: fish_add_path '{machine.bin}'\n" in machine.install("--no-service", SHELL="/usr/bin/fish")


def test_another_node_keeps_its_name(machine: Machine) -> None:
    machine.bin.mkdir(parents=True)
    nodejs = machine.bin / "node"
    nodejs.write_text("#!/bin/sh\necho v22\n")
    nodejs.chmod(0o755)
    assert "tandem serve" in machine.install()
    machine.install("--uninstall")
    assert nodejs.read_text() == "#!/bin/sh\necho v22\n"


def test_a_program_of_that_name_is_not_replaced(machine: Machine) -> None:
    machine.bin.mkdir(parents=True)
    (machine.bin / "coordinator").write_text("somebody else's")
    refused = machine.run()
    assert refused.returncode == 1
    assert "--prefix" in refused.stderr
    assert (machine.bin / "coordinator").read_text() == "somebody else's"
    machine.install("--prefix", str(machine.home / "elsewhere"))
    assert (machine.home / "elsewhere" / "bin" / "coordinator").exists()


def test_two_installations_do_not_share_a_service(machine: Machine) -> None:
    machine.install()
    refused = machine.run("--prefix", str(machine.home / "elsewhere"))
    assert refused.returncode == 1
    assert "of another installation" in refused.stderr
    machine.install("--prefix", str(machine.home / "elsewhere"), "--no-service")
    machine.install("--prefix", str(machine.home / "elsewhere"), "--uninstall")
    assert machine.service("login").exists()
    if machine.system == "Darwin":
        assert machine.app.exists()
        assert machine.log.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--no-such",), "--no-such"),
        (("--at-boot", "--at-login"), "one of"),
        (("--purge",), "--uninstall"),
        (("--prefix",), "needs a folder"),
        (("--uninstall", "--at-boot"), "--uninstall"),
        (("--", "--help"), "node serve --help"),
    ],
)
def test_mistakes(linux: Machine, arguments: tuple[str, ...], word: str) -> None:
    refused = linux.run(*arguments)
    assert refused.returncode == 2
    assert word in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_other_systems_are_refused(tmp_path: Path) -> None:
    refused = Machine(tmp_path, "FreeBSD").run()
    assert refused.returncode == 1
    assert "only macOS and Linux" in refused.stderr
