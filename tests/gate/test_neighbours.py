"""A neighbour disturbs for as long as it is asked to, and not longer."""

from __future__ import annotations

import time

import psutil
import pytest

from sasa_bench.gate.neighbours import IDLE, NEIGHBOURS, beside


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_a_neighbour_uses_the_processor_and_ends(kind: str) -> None:
    before = set(psutil.Process().children())
    with beside(kind):
        (process,) = set(psutil.Process().children()) - before
        used = 0.0
        for _ in range(1200):
            time.sleep(0.05)
            used = process.cpu_times().user
            if used > 0.3:
                break
        assert used > 0.3
    assert not process.is_running()


def test_no_neighbour_is_no_process() -> None:
    before = psutil.Process().children()
    with beside(IDLE):
        assert psutil.Process().children() == before
