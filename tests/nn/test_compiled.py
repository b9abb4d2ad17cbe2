"""torch.compile with its default backend trains a network with `fused` in one graph, as exactly as eager mode."""

from __future__ import annotations

import compiled
import pytest
import torch

from sasa_bench import impls


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_compiled_network_trains_a_step_as_the_eager_one(autocast: bool) -> None:
    if reason := impls.get("fused").missing():
        pytest.skip(reason)
    compiled.assert_a_compiled_step_is_as_exact(compiled.small(), torch.randn(4, 3, 9, 8), autocast)
