"""Timing on an NVIDIA GPU: hot and cold samples between events, throttled ones thrown away, energy of a call.

hot    calls queued one behind the other: the caches hold what the last call left. The steady figure, `samples_s`.
cold   one call, after the L2 cache was filled with something else: `cold_samples_s`.

A sample during which NVML reports that heat or power lowers the clocks is thrown away and counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sasa_bench.timing import nvml
from sasa_bench.timing.sampling import Samples, interleave
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import Step

COOL_DOWN_S = 0.1
"""Rest after a sample that was thrown away."""

FLUSH_FACTOR = 2
"""The buffer that is written between cold samples, in sizes of the L2 cache."""


class Event(Protocol):
    """A point of the stream, as torch.cuda.Event; elapsed_time is in milliseconds."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


@dataclass(frozen=True)
class Device:
    """What is needed of the GPU at hand.

    event        makes an event of the current stream
    flush        queues work that replaces everything in the L2 cache
    synchronize  waits until all that is queued has run
    watch        the GPU in NVML, or None where that cannot be read
    """

    event: Callable[[], Event]
    flush: Callable[[], object]
    synchronize: Callable[[], object]
    watch: nvml.Gpu | None


def current() -> Device:
    """The current CUDA device; holds a buffer of FLUSH_FACTOR times its L2 cache."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        watch = nvml.find(f"GPU-{properties.uuid}")
    except nvml.NvmlAbsentError:
        watch = None
    buffer = torch.empty(FLUSH_FACTOR * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    return Device(lambda: torch.cuda.Event(enable_timing=True), buffer.zero_, torch.cuda.synchronize, watch)


@dataclass
class _Seen:
    """Of one implementation: why samples were thrown away, clocks of those kept, host seconds to queue a cold call."""

    reasons: Counter[str] = field(default_factory=Counter)
    clocks_mhz: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)


class _Watched:
    """A measurement.Timer whose samples are watched; `keep` says whether the last one counts."""

    def __init__(self, device: Device, cold: bool, seen: Mapping[str, _Seen]) -> None:
        self.device, self.cold, self.seen = device, cold, seen
        self.at = ""
        self.held: set[str] = set()

    def __call__(self, step: Step, count: int) -> float:
        start, end = self.device.event(), self.device.event()
        self.held = set()
        if self.cold:
            self.device.flush()
        elif count > 1:
            step()  # so that the first one timed finds what the last one left, not what another implementation left
        start.record()
        began = time.perf_counter()
        for _ in range(count):
            step()
        queued = time.perf_counter() - began
        end.record()
        self._look()
        end.synchronize()
        self._look()
        if self.cold:
            self.seen[self.at].queue_s.append(queued / count)
        return start.elapsed_time(end) / 1e3

    def _look(self) -> None:
        """Asked while the work runs, where it runs longer than it takes to queue, and when it is done."""
        if self.device.watch is not None:
            self.held |= set(self.device.watch.throttling() or ())

    def keep(self) -> bool:
        seen, watch = self.seen[self.at], self.device.watch
        if self.held:
            seen.reasons.update(self.held)
            time.sleep(COOL_DOWN_S)
            return False
        if watch is not None and not self.cold and (clock := watch.state().get("sm_clock_mhz")):
            seen.clocks_mhz.append(clock)
        return True


def sample(
    device: Device,
    steps: Mapping[str, Step],
    settings: Settings,
    before_sample: Callable[[str], None] = lambda name: None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Fields of a Record for each step: hot samples of all in interleaved rounds, then cold ones likewise.

    `extra` gets queue_s, the host's seconds to queue one call (where it is near the time of a hot call, that time is
    the launch's); and, where NVML is read, throttled_samples, sm_clock_mhz (median right after hot samples) and, with
    settings.energy_s, energy_j of a hot call. Where half of the samples or more were throttled, and not just a few,
    the row has status "error" and the reason.
    """
    seen = {name: _Seen() for name in steps}

    def rounds(cold: bool, running: Mapping[str, Step]) -> dict[str, Samples]:
        timer = _Watched(device, cold, seen)

        def announce(name: str) -> None:
            timer.at = name
            before_sample(name)

        counts = dict.fromkeys(running, 1) if cold else None
        return interleave(timer, running, settings, announce, seed, counts, timer.keep)

    hot = rounds(False, steps)
    fine = {name: step for name, step in steps.items() if not hot[name].hopeless(settings)}
    cold = rounds(True, fine)
    rows = {}
    for name in steps:
        if name in fine:
            before_sample(name)
            rows[name] = _row(device, steps[name], settings, hot[name], cold[name], seen[name])
        else:
            reasons = ", ".join(reason for reason, _ in seen[name].reasons.most_common())
            discarded, whole = hot[name].discarded, hot[name].discarded + len(hot[name].seconds)
            rows[name] = {
                "status": "error",
                "reason": f"the GPU lowered its clocks ({reasons}) in {discarded} of {whole} samples: let it cool, "
                "raise its power limit, or fix lower clocks with nvidia-smi --lock-gpu-clocks",
                "extra": {"throttled_samples": discarded},
            }
    return rows


def _row(device: Device, step: Step, settings: Settings, hot: Samples, cold: Samples, seen: _Seen) -> dict[str, Any]:
    extra: dict[str, Any] = {"queue_s": statistics.median(seen.queue_s)}
    if device.watch is not None and device.watch.throttling() is not None:
        extra["throttled_samples"] = hot.discarded + cold.discarded
    if seen.clocks_mhz:
        extra["sm_clock_mhz"] = statistics.median(seen.clocks_mhz)
    if settings.energy_s and (joules := energy(device, step, settings.energy_s, statistics.median(hot.seconds))):
        extra["energy_j"] = joules
    kept = [] if cold.hopeless(settings) else cold.seconds
    return {"samples_s": hot.seconds, "inner_count": hot.inner_count, "cold_samples_s": kept, "extra": extra}


def energy(device: Device, step: Step, block_s: float, call_s: float) -> float | None:
    """Joules of one call, the GPU's idle power included: NVML's counter over a block of calls of at least block_s.

    The counter moves in steps of up to 0.1 s, so a block of 2 s is known to some per cent. None without the counter.
    """
    count = max(1, math.ceil(block_s / call_s))
    device.synchronize()
    before = None if device.watch is None else device.watch.energy_j()
    if device.watch is None or before is None:
        return None
    for _ in range(count):
        step()
    device.synchronize()
    after = device.watch.energy_j()
    return None if after is None else (after - before) / count
