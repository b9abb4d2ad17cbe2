from __future__ import annotations

from sasa_bench.timing.timers import wall_clock


def test_the_wall_clock_counts_every_call() -> None:
    calls = []
    assert wall_clock(lambda: calls.append(1), 5) > 0
    assert len(calls) == 5
