"""Tests that start a real Slurm cluster run only when they are asked for: `make test-slurm`, or `pytest -m slurm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = "slurm" in config.option.markexpr
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if not asked:
                item.add_marker(pytest.mark.skip(reason="starts a Slurm cluster; `make test-slurm` runs it"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path / "cluster")
    found.start()
    yield found
    found.stop()
