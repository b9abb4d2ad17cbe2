"""A small suite to run."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import SUITE


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SUITE)
    return path
