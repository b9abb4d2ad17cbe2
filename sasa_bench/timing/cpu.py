"""Timing on the CPU: samples in turns, with inputs that change from one to the next, and cold calls.

in turns  every sample follows an untimed call of its own, with new values in the inputs: `samples_s`
cold      one call, after every cache was filled with something else: `cold_samples_s`
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sasa_bench.timing import host
from sasa_bench.timing.proof import Feed
from sasa_bench.timing.sampling import interleave
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import Step, wall_clock

COLD_CALLS = 3
"""Cold calls of each implementation in each worker."""

LEAST_FLUSH, MOST_FLUSH = 32 << 20, 256 << 20
"""Bytes that are written between cold calls: twice the last cache, within these bounds."""

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def sample(
    steps: Mapping[str, Step],
    feeds: Mapping[str, Feed],
    settings: Settings,
    before_sample: Callable[[str], None] = lambda name: None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Fields of a Record for each step.

    `extra` gets disturbed: the share of the processors that others had meanwhile.
    """
    share = random.Random(seed)

    def ready(name: str) -> None:
        if name in feeds:
            feeds[name].vary(share.uniform(0.5, 1.0))
        steps[name]()

    before = host.read()
    found = interleave(wall_clock, steps, settings, before_sample, seed, ready=ready)
    disturbance = host.between(before, host.read()).total
    flush, rows = flusher(), {}
    for name, step in steps.items():
        before_sample(name)
        cold = []
        for _ in range(COLD_CALLS):
            flush()
            cold.append(wall_clock(step, 1))
        rows[name] = {
            "samples_s": found[name].seconds,
            "inner_count": found[name].inner_count,
            "cold_samples_s": cold,
            "extra": {"disturbed": disturbance},
        }
    return rows


@cache
def flusher() -> Callable[[], object]:
    """What fills the caches of every core that torch uses with something else."""
    size = min(MOST_FLUSH, max(LEAST_FLUSH, 2 * last_cache_bytes()))
    buffer = torch.zeros(size // 4)
    return lambda: buffer.add_(1.0)


def last_cache_bytes() -> int:
    """Size of the largest cache of the first processor; 0 where the system does not show it."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for path in CACHES.glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes)
