"""Says what is missing where the CUDA kernels cannot be checked."""

from __future__ import annotations

import importlib.util
import shutil

import emulation
import pytest


@pytest.fixture(autouse=True)
def _tools(request: pytest.FixtureRequest) -> None:
    """Of the checks without a GPU; those on one say themselves what is missing."""
    if request.node.get_closest_marker("gpu"):
        # A search would compile every candidate of every problem.
        request.getfixturevalue("monkeypatch").setenv("SASA_BENCH_TUNE", "0")
        return
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        pytest.skip("cuda-core is not installed: pip install 'sasa-bench[cuda-check]'")
    if shutil.which(emulation.COMPILER) is None:
        pytest.skip(f"the C++ compiler {emulation.COMPILER!r} is not installed")
