from __future__ import annotations

from sasa_bench.timing.roof import roof


def test_the_roof_is_a_rate() -> None:
    peak, bandwidth, cached = roof("cpu", "float32", seconds=0.02)
    assert cached >= bandwidth
    assert 1e8 < peak < 1e15
    assert 1e8 < bandwidth < 1e13
