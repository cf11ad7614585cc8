"""The machine that fuses when training has ended is lost while it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from coordinator.api import fuse
from coordinator.fusing import FuseOptions
from tests.faults.harness import Inputs, make_inputs, run_through, tell_recovery
from tests.fixtures.runs import notes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ITERS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), iters=ITERS)


@pytest.mark.parametrize("what", ["kill worker", "kill host", "freeze worker", "freeze host"])
def test_who_fuses_is_lost_and_this_machine_does_it(inputs: Inputs, tmp_path: Path, what: str) -> None:
    fault = [{"at": "fuse", "do": what}]
    fused = tmp_path / "fused"
    more = ("--fuse", "--save-path", str(fused))
    outcome = run_through(inputs, tmp_path, {"anna": fault, "ben": fault}, *more, iters=ITERS)
    outcome.check(inputs)
    assert not outcome.repairs, "training was over"
    (lost,) = tmp_path.glob("faults-*/0")
    (line,) = notes(outcome.folder, "fuse_failed")
    assert line["message"].startswith(("anna could not fuse (", "ben could not fuse ("))
    assert line["message"].endswith("); fusing here")
    tell_recovery(f"{what} while it fuses", line["time"] - lost.stat().st_mtime)

    fuse(FuseOptions(str(inputs.folder / "model"), str(outcome.folder), str(tmp_path / "expected")))
    found, expected = (load_file(folder / "model.safetensors") for folder in (fused, tmp_path / "expected"))
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    assert {path.name for path in fused.iterdir()} == {path.name for path in (tmp_path / "expected").iterdir()}
