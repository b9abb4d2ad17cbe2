"""The builds of the fused kernel, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fused_builds import ATTENTION_BUILDS, PRODUCT_BUILDS, compiled_quickly

from sasa_bench.impls import _native, fused


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every build that this machine runs; afterwards the one that it chooses is in place."""
    if reason := fused.missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--exhaustive"):
            patch.setattr(fused, "kernels", compiled_quickly)
        fused.build(_native.executable_isas())
        yield
    fused.load()


@pytest.fixture(params=ATTENTION_BUILDS)
def isa(request: pytest.FixtureRequest, builds: None) -> str:
    """A build of the attention, loaded."""
    fused.load(request.param)
    return str(request.param)


@pytest.fixture(params=PRODUCT_BUILDS)
def products(request: pytest.FixtureRequest, builds: None) -> str:
    """A build of the products of matrices, loaded."""
    fused.load(request.param)
    return str(request.param)


@pytest.fixture
def kernel() -> Any:
    """The operator of the core, with the build that this machine chooses."""
    if reason := fused.missing():
        pytest.skip(reason)
    fused.load()
    import torch

    return torch.ops.sasa_bench.fused_local_attention
