"""Scripts that are not Python: linted, read by the shells they are for, and said the same everywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.installs import ROOT, SYSTEM_PATH, Machine, is_there

SHELL_SCRIPTS = ("deploy/install.sh", "deploy/service.sh", "deploy/lock", "deploy/stubs", ".ci/run")
FORMULA = ROOT / "deploy" / "homebrew" / "mlx-tandem.rb"


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", *SHELL_SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_help_names_every_option() -> None:
    script = (ROOT / "deploy" / "install.sh").read_text()
    (parse,) = re.findall(r"^parse\(\) \{$.*?^\}$", script, re.M | re.S)
    taken = set(re.findall(r"^            (--[a-z-]+)\)", parse, re.M)) | {"--dry-run", "--prefix"}
    said = subprocess.run([ROOT / "deploy" / "install.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert {option for option in taken if option not in said} == set()


@pytest.fixture
def installed(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path, "Linux")
    machine.install("--no-service")
    return machine


def in_shell(machine: Machine, shell: str, script: str) -> str:
    environment = {"PATH": f"{machine.bin}:{os.environ['PATH']}", "HOME": str(machine.home), "TERM": "dumb"}
    done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def completion(machine: Machine, name: str) -> Path:
    return machine.home / ".local" / "share" / name


def test_bash_completes(installed: Machine) -> None:
    script = completion(installed, "bash-completion/completions/coordinator")
    asked = "COMP_WORDS=(coordinator tr); COMP_CWORD=1; _coordinator_completion coordinator; echo ${COMPREPLY[@]}"
    # `compopt` and `complete` are for a shell that a person types into.
    assert in_shell(installed, "bash", f"source '{script}'; {asked}") == "train\n"
    script = completion(installed, "bash-completion/completions/tandem")
    asked = "COMP_WORDS=(tandem serve --on); COMP_CWORD=2; _tandem_completion tandem; echo ${COMPREPLY[@]}"
    assert in_shell(installed, "bash", f"source '{script}'; {asked}") == "--only-when-idle\n"


@pytest.mark.skipif(not is_there("fish"), reason="needs fish")
def test_fish_completes(installed: Machine) -> None:
    script = completion(installed, "fish/vendor_completions.d/coordinator.fish")
    said = in_shell(installed, "fish", f"source '{script}'; complete -C 'coordinator tr'")
    assert said.startswith("train\t")


@pytest.mark.skipif(not is_there("zsh"), reason="needs zsh")
def test_zsh_reads_its_completion(installed: Machine) -> None:
    folder = completion(installed, "zsh/site-functions")
    said = in_shell(
        installed, "zsh", f"fpath=('{folder}' $fpath); autoload -Uz compinit; compinit -u; print $_comps[coordinator]"
    )
    assert said == "_coordinator\n"


def test_zsh_is_given_what_it_looks_for(installed: Machine) -> None:
    text = completion(installed, "zsh/site-functions/_coordinator").read_text()
    assert text.startswith("#compdef coordinator\n")


@pytest.mark.skipif(not is_there("ruby"), reason="needs ruby")
def test_the_formula_is_ruby() -> None:
    done = subprocess.run(["ruby", "-wc", FORMULA], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Syntax OK\n"), done.stderr


def test_the_formula_points_at_a_checkout_and_at_nothing_made_up() -> None:
    text = FORMULA.read_text()
    assert not re.findall(r"https?://", text)
    assert "file://#{ENV.fetch(" in text
    commands = re.findall(r"^#   (.+)$", text, re.M)
    assert [line for line in commands if line in (ROOT / "deploy" / "README.md").read_text()] == commands


@pytest.mark.skipif(shutil.which("bash", path=SYSTEM_PATH) is None, reason="needs bash")
def test_the_installer_is_read_by_a_macs_shell() -> None:
    # /bin/sh of macOS is bash as sh; Debian's is dash, which the other tests use.
    for name in ("install.sh", "service.sh"):
        subprocess.run(["bash", "--posix", "-n", ROOT / "deploy" / name], check=True)
