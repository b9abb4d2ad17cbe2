from __future__ import annotations

import torch

from sasa_bench.timing.memory import peak_memory


def test_peak_memory_sees_a_temporary_that_is_freed_again() -> None:
    def step() -> float:
        return float(torch.ones(8 << 20).sum())

    step()
    peak, source = peak_memory(step, "cpu")
    assert peak is not None
    assert 30 << 20 < peak < 40 << 20
    assert "high-water" in source


def test_peak_memory_sees_memory_that_the_allocator_had_kept() -> None:
    blocks = [torch.ones(1 << 18) for _ in range(64)]
    del blocks
    peak, _ = peak_memory(lambda: [torch.ones(1 << 18) for _ in range(32)], "cpu")
    assert peak is not None
    assert peak > 30 << 20
