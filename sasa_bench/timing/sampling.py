"""How long and how much memory: timers, calibration, interleaved rounds, peak memory."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sasa_bench.results.statistics import half_width

Step = Callable[[], object]

MOST_CALLS = 1 << 24


class Timer(Protocol):
    """Times work on one kind of device."""

    def __call__(self, step: Step, count: int) -> float:
        """Seconds that `count` calls of `step` take together."""


def wall_clock(step: Step, count: int) -> float:
    """Seconds of `count` calls by the monotonic clock."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return time.perf_counter() - start


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


@dataclass(frozen=True)
class Settings:
    """When to stop.

    warmup_s     least time of calls before the first sample
    sample_s     time that one sample should take; short calls are repeated to fill it
    budget_s     time for the samples of one implementation of one case
    least, most  samples
    precision    stop when half the 95 % interval of the median is within this share of the median
    most_discarded  samples thrown away before an implementation is given up, if they are half of all or more
    energy_s     on CUDA, time of the block of calls whose energy is read; 0 reads none
    """

    warmup_s: float = 0.05
    sample_s: float = 0.01
    budget_s: float = 0.6
    least: int = 7
    most: int = 101
    precision: float = 0.02
    most_discarded: int = 20
    energy_s: float = 0.0


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
        """Narrow enough, out of budget or hopeless. Calls that outlast the budget many times get three samples."""
        if self.hopeless(settings):
            return True
        count = len(self.seconds)
        if count >= settings.most or (count >= 3 and self.spent_s >= 4 * settings.budget_s):
            return True
        if count < settings.least:
            return False
        return self.spent_s >= settings.budget_s or half_width(self.seconds) <= settings.precision


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
) -> dict[str, Samples]:
    """Sample every step in rounds, each round in a random order, until each has enough.

    Drift of the machine so hits all steps alike. `before_sample` is told which step is about to run. `counts` are the
    calls of a sample by name, for steps that are warm; else they are found by `calibrate`. `keep` is asked after each
    sample whether it counts.
    """
    shuffle = random.Random(seed).shuffle
    samples = {}
    for name, step in steps.items():
        before_sample(name)
        samples[name] = Samples(counts[name] if counts else calibrate(timer, step, settings))
    running = list(steps)
    while running:
        shuffle(running)
        for name in running:
            before_sample(name)
            sample = samples[name]
            seconds = timer(steps[name], sample.inner_count)
            sample.spent_s += seconds
            if keep():
                sample.seconds.append(seconds / sample.inner_count)
            else:
                sample.discarded += 1
        running = [name for name in running if not samples[name].enough(settings)]
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

    samples = interleave(timer_for(device), {"fn": step}, settings)["fn"]
    peak, source = peak_memory(step, device)
    return Measurement(tuple(samples.seconds), samples.inner_count, peak, source)


def peak_memory(step: Step, device: str) -> tuple[int | None, str]:
    """Bytes in use at the worst moment of one call above what was in use before it, and where the figure comes from.

    On the CPU: the kernel's high-water mark of resident memory, reset before the call, after the heap was trimmed of
    pages it had kept. On CUDA: torch's allocator. None where the system gives no such figure.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "CUDA allocator"
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status_bytes("VmRSS")
        result = step()
        peak = _status_bytes("VmHWM")
        del result
    except (OSError, AttributeError, KeyError):
        return None, "this system does not show a high-water mark"
    return max(0, peak - before), "high-water mark of resident memory"


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[name].split()[0]) * 1024


def roof(device: str, dtype: str, seconds: float = 0.3) -> tuple[float, float]:
    """(peak FLOP/s, bandwidth bytes/s) of a device: the best tries within `seconds` for each kind of work.

    The peak is that of large matrix products and of a large 3 x 3 convolution, whichever library is nearer to it; the
    bandwidth that of a large copy, which reads and writes.
    """
    timer, kind = timer_for(device), getattr(torch, dtype)
    scale = 4 if device == "cuda" else 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(kind)

    def best(step: Step) -> float:
        times = [timer(step, 1)]
        while sum(times) < seconds:
            times.append(timer(step, 1))
        return min(times)

    side = 768 * scale
    a, b = random(side, side), random(side, side)
    x, weight = random(2 * scale, 256, 28, 28), random(256, 256, 3, 3)
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        product = 2 * side**3 / best(lambda: torch.mm(a, b))
        convolution = 2 * x.numel() * 256 * 9 / best(lambda: torch.nn.functional.conv2d(x, weight, padding=1))
        copy = 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source))
    return max(product, convolution), copy
