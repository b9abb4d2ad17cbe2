"""Samples of a step: calibration, interleaved rounds, when there are enough."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sasa_bench.results.statistics import half_width
from sasa_bench.timing.memory import peak_memory
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import Step, Timer, timer_for

MOST_CALLS = 1 << 24


@dataclass
class Samples:
    """Seconds per call, one value a round; `inner_count` calls make one value. `discarded` counts those not kept."""

    inner_count: int
    seconds: list[float] = field(default_factory=list)
    spent_s: float = 0.0
    discarded: int = 0

    def hopeless(self, settings: Settings) -> bool:
        """Whether at least half of the samples were thrown away, and as many as the settings or the budget allow."""
        over = self.discarded >= 3 and self.spent_s >= 4 * settings.budget_s
        return self.discarded >= max(1, len(self.seconds)) and (over or self.discarded >= settings.most_discarded)

    def enough(self, settings: Settings) -> bool:
        """As many as allowed, hopeless, or narrow enough."""
        count = len(self.seconds)
        if self.hopeless(settings) or count >= settings.most:
            return True
        return count >= settings.least and half_width(self.seconds) <= settings.precision


def lacks(sample: Samples, settings: Settings) -> bool:
    """Whether it has fewer than the least samples and time for more: four budgets where samples were thrown away."""
    budget = settings.budget_s * (4 if sample.discarded else 1)
    return len(sample.seconds) < settings.least and sample.spent_s < budget


def spent(samples: Collection[Samples], settings: Settings) -> bool:
    """Whether the budget of all is used up, and each has the least samples or has used up its own."""
    used = sum(sample.spent_s for sample in samples)
    return used >= len(samples) * settings.budget_s and not any(lacks(sample, settings) for sample in samples)


def calibrate(timer: Timer, step: Step, settings: Settings) -> int:
    """Warm up, and find how many calls fill one sample.

    The count doubles until a block reaches sample_s, then is scaled to it; blocks go on until warmup_s has passed.
    """
    count, spent = 1, 0.0
    while True:
        seconds = timer(step, count)
        spent += seconds
        if seconds >= settings.sample_s / 2 and spent >= settings.warmup_s:
            return max(1, round(count * settings.sample_s / seconds))
        if seconds < settings.sample_s / 2:
            count *= 2
        if count > MOST_CALLS:
            raise RuntimeError(
                f"{count} calls took {seconds:.3g} s by the clock: the clock stands still, or the call does nothing"
            )


def interleave(
    timer: Timer,
    steps: Mapping[str, Step],
    settings: Settings,
    before_sample: Callable[[str], None] = lambda name: None,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    keep: Callable[[], bool] = lambda: True,
    ready: Callable[[str], None] = lambda name: None,
) -> dict[str, Samples]:
    """Sample every step in rounds, each round in a random order, until each has enough or their time is used up.

    Drift of the machine so hits all steps alike, and none leaves early, so that what ran before a step is the same to
    the end. A step whose samples take more than its share of a round, `budget_s / least`, misses rounds until the
    others have used as much; the last rounds, until each has the fewest samples, are for all. So long calls get
    few samples and short ones many, in about the same time.

    `before_sample` is told which step is about to run, and `ready` makes it ready, untimed. `counts` are the calls of a
    sample by name, for steps that are warm; else they are found by `calibrate`. `keep` is asked after each sample
    whether it counts. A step of which most samples are thrown away is given up.
    """
    shuffle = random.Random(seed).shuffle
    samples = {}
    for name, step in steps.items():
        before_sample(name)
        samples[name] = Samples(counts[name] if counts else calibrate(timer, step, settings))
    running, share_s, closing = list(steps), 0.0, False
    while running:
        shuffle(running)
        for name in running:
            sample = samples[name]
            if sample.spent_s > share_s and not closing:
                continue
            before_sample(name)
            began = time.perf_counter()
            ready(name)
            sample.spent_s += time.perf_counter() - began
            seconds = timer(steps[name], sample.inner_count)
            sample.spent_s += seconds
            if keep():
                sample.seconds.append(seconds / sample.inner_count)
            else:
                sample.discarded += 1
        running = [name for name in running if not samples[name].hopeless(settings)]
        share_s += settings.budget_s / settings.least
        of_running = [samples[name] for name in running]
        closing = all(sample.enough(settings) for sample in of_running) or spent(of_running, settings)
        if closing and all(len(sample.seconds) >= settings.fewest for sample in of_running):
            break
    return samples


@dataclass(frozen=True)
class Measurement:
    """What `measure` found: seconds per call, and peak memory in bytes with its source."""

    samples_s: tuple[float, ...]
    inner_count: int
    peak_memory_bytes: int | None
    memory_source: str

    @property
    def median_s(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples_s)


def measure(fn: Callable[..., Any], *args: Any, device: str = "cpu", settings: Settings | None = None) -> Measurement:
    """Time `fn(*args)` and find its peak memory, as a run does. Raises what `fn` raises."""
    settings = settings or Settings()

    def step() -> object:
        return fn(*args)

    def warm(name: str) -> None:
        step()

    ready = warm if device == "cpu" else lambda name: None
    samples = interleave(timer_for(device), {"fn": step}, settings, ready=ready)["fn"]
    peak, source = peak_memory(step, device)
    return Measurement(tuple(samples.seconds), samples.inner_count, peak, source)
