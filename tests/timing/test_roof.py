"""Peak and bandwidth of a device: rates, of the best of several tries after one that warms up."""

from __future__ import annotations

import pytest
import torch

from sasa_bench.timing import roof as module
from sasa_bench.timing.roof import COPIES, FITS_CACHE, TRIES, roof


def test_the_roof_is_a_rate() -> None:
    peak, bandwidth, cached = roof("cpu", "float32", seconds=0.02)
    assert cached >= bandwidth
    assert 1e8 < peak < 1e15
    assert 1e8 < bandwidth < 1e13


def test_a_try_that_was_disturbed_does_not_lower_it_and_the_first_touch_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each kind of work takes 10 s, 0.1 s and 0.2 s; a first call that nobody times comes before."""
    calls: list[int] = []
    untimed: list[bool] = []

    def timer_for(device: str) -> object:
        def timer(step: object, count: int) -> float:
            calls.append(count)
            return [10.0, 0.1, 0.2][(len(calls) - 1) % TRIES] * count

        return timer

    mm = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        untimed.append(not calls)
        return mm(a, b)

    monkeypatch.setattr(module, "timer_for", timer_for)
    monkeypatch.setattr(torch, "mm", counted)
    threads = torch.get_num_threads()
    peak, bandwidth, cached = roof("cpu", "float32", seconds=0.0)
    assert untimed == [True]
    assert calls == [1] * 3 * TRIES + [COPIES] * TRIES
    convolution = 2 * (2 * 256 * 28 * 28) * 256 * 9
    assert peak == pytest.approx(max(2 * 768**3, convolution) / 0.1)
    assert bandwidth == pytest.approx(2 * (4 << 26) / 0.1)
    assert cached == pytest.approx(max(bandwidth, 2 * threads * FITS_CACHE / 0.1))
