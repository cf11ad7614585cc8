"""What several of these tests train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.models import tiny_model
from tests.fixtures.runs import write_chat_data


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a few conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model", "llama")
    write_chat_data(folder / "data")
    return folder
