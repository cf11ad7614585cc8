"""An environment is in use for as long as a program of it lives, and until the contrary is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from node import in_use

HOLDING = "import sys; from node import in_use; print(in_use.hold() is not None, flush=True); sys.stdin.read()"


@pytest.mark.skipif(not (Path(sys.prefix) / in_use.LOCKED).exists(), reason="needs an environment")
def test_an_environment_is_held_by_each_of_its_programs(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "ours.pth").write_text(f"{Path(in_use.__file__).parent.parent}\n")

    def program() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [environment / "bin" / "python", "-P", "-c", HOLDING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        return process

    assert in_use.is_free(environment)
    with program() as one, program() as other:
        assert not in_use.is_free(environment)
        one.kill()
        one.wait()
        assert not in_use.is_free(environment), "the other lives"
        other.kill()
        other.wait()
    assert in_use.is_free(environment)


@pytest.mark.skipif(not (Path(sys.prefix) / in_use.LOCKED).exists(), reason="needs an environment")
def test_a_child_that_outlives_its_program_holds_nothing() -> None:
    code = (
        "import subprocess, sys\nfrom node import in_use\nheld = in_use.hold()\n"
        # Whoever starts a child may leave open to it all that can be inherited.
        "open_there = f'test -e /dev/fd/{held} && echo held || echo free'\n"
        "sys.exit(subprocess.call(['sh', '-c', open_there], close_fds=False))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "free\n"


def test_what_cannot_be_found_out_is_taken_for_use(tmp_path: Path) -> None:
    assert in_use.is_free(tmp_path), "it was never finished"
    (tmp_path / in_use.LOCKED).mkdir()
    assert not in_use.is_free(tmp_path)
