"""Certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.identity import credentials


@pytest.fixture
def certificate(tmp_path: Path) -> bytes:
    return credentials(tmp_path / "some-home").certificate
