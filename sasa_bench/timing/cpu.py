"""Timing on the CPU: interleaved samples, with inputs that change from one to the next, and cold calls.

samples  every sample follows an untimed call of its own, with new values in the inputs: `samples_s`
cold      one call, after every cache was filled with something else: `cold_samples_s`
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sasa_bench.timing import host
from sasa_bench.timing.proof import Feed
from sasa_bench.timing.sampling import interleave
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import Step, wall_clock

COLD_CALLS = 1
"""Cold calls of each implementation in each worker."""

LEAST_FLUSH, MOST_FLUSH = 32 << 20, 256 << 20
"""Bytes that are written between cold calls: twice the last cache, within these bounds."""

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


SPOILED = 1.25
"""A sample is spoiled where the fixed work beside it took so many times its least, or the hypervisor took time away."""


@dataclass
class Probes:
    """A fixed piece of work after each sample: how fast the clock was, and whether the host disturbed the sample."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    stolen: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    at: str = ""
    before_s: float = 0.0

    def begin(self, name: str) -> None:
        """A sample of this step is about to be taken."""
        self.at, self.before_s = name, host.stolen_s()

    def end(self) -> bool:
        """The sample is taken; it counts whatever is seen."""
        self.seconds[self.at].append(min(host.probe(), host.probe()))
        self.stolen[self.at].append(host.stolen_s() > self.before_s)
        return True

    def figures(self, name: str) -> dict[str, float]:
        """clock: the least time of the fixed work over its median beside this step; spoiled_samples."""
        least = min(min(values) for values in self.seconds.values())
        own = self.seconds[name]
        spoiled = sum(
            seconds > SPOILED * least or stolen for seconds, stolen in zip(own, self.stolen[name], strict=True)
        )
        return {"clock": least / statistics.median(own), "spoiled_samples": spoiled}


def sample(
    steps: Mapping[str, Step],
    feeds: Mapping[str, Feed],
    settings: Settings,
    before_sample: Callable[[str], None] = lambda name: None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Fields of a Record for each step.

    `extra` gets `disturbed`, the share of the processors that others had meanwhile, `stolen`, that of the hypervisor
    alone, and what Probes.figures gives.
    """
    share, probes = random.Random(seed), Probes()

    def ready(name: str) -> None:
        if name in feeds:
            feeds[name].vary(share.uniform(0.5, 1.0))
        steps[name]()
        probes.begin(name)

    before = host.read()
    found = interleave(wall_clock, steps, settings, before_sample, seed, keep=probes.end, ready=ready)
    disturbance = host.between(before, host.read())
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
            "extra": {"disturbed": disturbance.total, "stolen": disturbance.stolen} | probes.figures(name),
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
        text = path.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes)
