"""Clocks: the wall clock on the CPU, events on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Step = Callable[[], object]
"""One call of what is measured."""


class Timer(Protocol):
    """Times work on one kind of device."""

    def __call__(self, step: Step, count: int) -> float:
        """Seconds that `count` calls of `step` take together."""


_clock = time.perf_counter
"""Taken before any implementation is loaded, which might put a clock of its own in its place."""


def wall_clock(step: Step, count: int, clock: Callable[[], float] = _clock) -> float:
    """Seconds of `count` calls by the monotonic clock."""
    start = clock()
    for _ in range(count):
        step()
    return clock() - start


def cuda_events(step: Step, count: int) -> float:
    """Seconds of `count` calls on the current CUDA stream, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def timer_for(device: str) -> Timer:
    """The timer of a device: wall clock on the CPU, events on CUDA."""
    return cuda_events if device == "cuda" else wall_clock
