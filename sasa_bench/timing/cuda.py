"""Timing on an NVIDIA GPU: hot and cold samples between events, throttled ones thrown away, energy of a call.

hot    calls one behind the other, replayed as a CUDA graph so that the host takes no part: the caches hold what the
       last call left. The steady figure, `samples_s`; the same calls queued one by one are `eager_s`.
cold   one call, after the L2 cache was filled with something else, behind a pause of the device in which the host
       queues it: `cold_samples_s`.

A sample during which NVML reports that heat or the hardware lowers the clocks is thrown away and counted. Lower clocks
under the power limit are normal for a large GPU at full load: these samples stay, and are counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from sasa_bench.results.fields import first_line
from sasa_bench.timing import nvml
from sasa_bench.timing.graphs import capture
from sasa_bench.timing.sampling import Samples, interleave
from sasa_bench.timing.settings import Settings
from sasa_bench.timing.timers import Step

COOL_DOWN_S = 0.1
"""Rest after a sample that was thrown away."""

FLUSH_FACTOR = 2
"""The buffers that are written and read between cold samples, in sizes of the L2 cache each."""

EAGER_SHARE = 0.25
"""Budget of the eager samples, as a share of that of the hot ones."""

SHORT_S, MANY = 1e-4, 10
"""A graph holds MANY calls where an eager call is shorter than SHORT_S, because a replay itself takes microseconds."""

PAUSE_FACTOR, LEAST_PAUSE_S = 4.0, 2e-4
"""The pause before a cold call, in times that it takes to queue a call, and at least."""

FASTEST_HZ = 2e9
"""The pause is counted in cycles; a slower clock makes it longer."""


class Event(Protocol):
    """A point of the stream, as torch.cuda.Event; elapsed_time is in milliseconds."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


@dataclass(frozen=True)
class Device:
    """What is needed of the GPU at hand.

    event        makes an event of the current stream
    flush        queues work that replaces everything in the L2 cache and leaves nothing to write back
    pause        queues a wait of at least so many seconds
    capture      a step -> what replays the work it queues; raises RuntimeError where the step cannot be captured
    synchronize  waits until all that is queued has run
    watch        the GPU in NVML, or None where that cannot be read
    """

    event: Callable[[], Event]
    flush: Callable[[], object]
    pause: Callable[[float], object]
    capture: Callable[[Step], Step]
    synchronize: Callable[[], object]
    watch: nvml.Gpu | None


def current() -> Device:
    """The current CUDA device; holds two buffers of FLUSH_FACTOR times its L2 cache."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        watch = nvml.find(f"GPU-{properties.uuid}")
    except nvml.NvmlAbsentError:
        watch = None
    size = FLUSH_FACTOR * properties.L2_cache_size // 4
    written, read = (torch.zeros(size, dtype=torch.int32, device="cuda") for _ in range(2))
    least = torch.empty((), dtype=torch.int32, device="cuda")

    def flush() -> None:
        written.zero_()
        torch.amin(read, dim=0, out=least)  # what the write left in the cache has to go to memory before this is done

    def pause(seconds: float) -> None:
        torch.cuda._sleep(round(seconds * FASTEST_HZ))

    def event() -> Event:
        return torch.cuda.Event(enable_timing=True)

    return Device(event, flush, pause, capture, torch.cuda.synchronize, watch)


def broken(device: str) -> bool:
    """Whether the device has met an error that every later call of this process meets too ("sticky" in CUDA)."""
    if device != "cuda" or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # torch.AcceleratorError, RuntimeError before torch 2.8
        return True
    return False


@dataclass
class _Seen:
    """Of one implementation: why samples were thrown away, how many of those kept ran under the power limit, the clocks
    of those kept, host seconds to queue a call."""

    reasons: Counter[str] = field(default_factory=Counter)
    capped: int = 0
    clocks_mhz: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)


class _Watched:
    """A measurement.Timer whose samples are watched; `keep` says whether the last one counts."""

    def __init__(self, device: Device, cold: bool, seen: Mapping[str, _Seen], queues: bool = False) -> None:
        self.device, self.cold, self.seen, self.queues = device, cold, seen, queues
        self.at = ""
        self.held: set[str] = set()

    def __call__(self, step: Step, count: int) -> float:
        start, end = self.device.event(), self.device.event()
        self.held = set()
        if self.cold:
            self.device.flush()
            queue_s = self.seen[self.at].queue_s
            self.device.pause(max(LEAST_PAUSE_S, PAUSE_FACTOR * statistics.median(queue_s) if queue_s else 0.0))
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
        if self.queues:
            self.seen[self.at].queue_s.append(queued / count)
        return start.elapsed_time(end) / 1e3

    def _look(self) -> None:
        """Asked while the work runs, where it runs longer than it takes to queue, and when it is done."""
        if self.device.watch is not None:
            self.held |= set(self.device.watch.throttling() or ())

    def keep(self) -> bool:
        seen, watch = self.seen[self.at], self.device.watch
        if faults := self.held - {nvml.POWER_LIMIT}:
            seen.reasons.update(faults)
            time.sleep(COOL_DOWN_S)
            return False
        seen.capped += bool(self.held)
        if watch is not None and not self.cold and (clock := watch.state().get("sm_clock_mhz")):
            seen.clocks_mhz.append(clock)
        return True


def sample(
    device: Device,
    steps: Mapping[str, Step],
    settings: Settings,
    before_sample: Callable[[str], None] = lambda name: None,
    seed: int = 0,
    graphs: bool = True,
) -> dict[str, dict[str, Any]]:
    """Fields of a Record for each step: hot samples of all in interleaved rounds, then cold ones likewise.

    Without `graphs` nothing is captured: torch runs a backward pass on the stream of its forward pass.

    `extra` gets eager_s, the median time of calls that are queued one by one; queue_s, the host's seconds to queue one
    of these; replayed, how many calls the graph holds whose replays are the hot samples (a cold sample is a replay of
    one call), or 0 where the step cannot be captured, whose hot time is its eager time, with the reason in
    not_replayed; and, where NVML is read,
    throttled_samples (thrown away), power_limited_samples (kept), sm_clock_mhz (median right after hot samples) and,
    with settings.energy_s, energy_j of a hot call. Where half of the samples or more were throttled, and not just a
    few, the row has status "error" and the reason.
    """
    replays: dict[str, Step] = {}
    refused: dict[str, str] = {}
    for name, step in steps.items() if graphs else ():
        before_sample(name)
        replay, reason = _captured(device, step)
        if replay:
            replays[name] = replay
        else:
            refused[name] = reason

    def rounds(running: Mapping[str, Step], seen: dict[str, _Seen], cold: bool = False, eager: bool = False) -> Any:
        timer = _Watched(device, cold, seen, eager)

        def announce(name: str) -> None:
            timer.at = name
            before_sample(name)

        counts = dict.fromkeys(running, 1) if cold else None
        wanted = replace(settings, budget_s=EAGER_SHARE * settings.budget_s) if eager else settings
        return interleave(timer, running, wanted, announce, seed, counts, timer.keep)

    seen = {name: _Seen() for name in steps}
    eager_seen = {name: _Seen() for name in steps}
    eager = rounds(steps, eager_seen, eager=True)
    for name in steps:
        seen[name].queue_s = eager_seen[name].queue_s
    best = {name: replays.get(name, step) for name, step in steps.items()}
    many = {}
    for name in replays:
        if eager[name].seconds and statistics.median(eager[name].seconds) < SHORT_S:
            before_sample(name)
            if replay := _captured(device, partial(_repeated, steps[name]))[0]:
                many[name] = replay
    repeated = best | many
    hot = rounds(repeated, seen)
    for name in many:
        hot[name] = _of_one_call(hot[name])
    fine = {name: step for name, step in best.items() if not hot[name].hopeless(settings)}
    cold = rounds(fine, seen, cold=True)
    rows = {}
    for name in steps:
        if name in fine:
            before_sample(name)
            calls = MANY if name in many else 1
            row = _row(device, repeated[name], calls, settings, hot[name], cold[name], seen[name])
            row["extra"]["replayed"] = calls if name in replays else 0
            if name in refused:
                row["extra"]["not_replayed"] = refused[name]
            if eager[name].seconds:
                row["extra"]["eager_s"] = statistics.median(eager[name].seconds)
            rows[name] = row
        else:
            reasons = ", ".join(reason for reason, _ in seen[name].reasons.most_common())
            discarded, whole = hot[name].discarded, hot[name].discarded + len(hot[name].seconds)
            rows[name] = {
                "status": "error",
                "reason": f"the GPU lowered its clocks ({reasons}) in {discarded} of {whole} samples: let it cool, "
                "or fix lower clocks with nvidia-smi --lock-gpu-clocks",
                "extra": {"throttled_samples": discarded},
            }
    return rows


def _captured(device: Device, step: Step) -> tuple[Step | None, str]:
    """What replays the step; None where it cannot be captured, and why."""
    try:
        return device.capture(step), ""
    except RuntimeError as error:
        device.synchronize()  # an error of the device itself shows here, and counts
        return None, first_line(error)


def _repeated(step: Step) -> object:
    """What the last of MANY calls returns."""
    for _ in range(MANY - 1):
        step()
    return step()


def _of_one_call(samples: Samples) -> Samples:
    seconds = [each / MANY for each in samples.seconds]
    return replace(samples, inner_count=samples.inner_count * MANY, seconds=seconds)


def _row(
    device: Device, step: Step, calls: int, settings: Settings, hot: Samples, cold: Samples, seen: _Seen
) -> dict[str, Any]:
    """Fields of a Record; `step` makes so many calls."""
    extra: dict[str, Any] = {"queue_s": statistics.median(seen.queue_s)}
    if device.watch is not None and device.watch.throttling() is not None:
        extra |= {"throttled_samples": hot.discarded + cold.discarded, "power_limited_samples": seen.capped}
    if seen.clocks_mhz:
        extra["sm_clock_mhz"] = statistics.median(seen.clocks_mhz)
    step_s = calls * statistics.median(hot.seconds)
    if settings.energy_s and (joules := energy(device, step, settings.energy_s, step_s)):
        extra["energy_j"] = joules / calls
    kept = [] if cold.hopeless(settings) else cold.seconds
    return {"samples_s": hot.seconds, "inner_count": hot.inner_count, "cold_samples_s": kept, "extra": extra}


def energy(device: Device, step: Step, block_s: float, step_s: float) -> float | None:
    """Joules of one step, the GPU's idle power included: NVML's counter over a block of steps of at least block_s.

    The counter moves in steps of up to 0.1 s, so a block of 2 s is known to some per cent. None without the counter.
    """
    count = max(1, math.ceil(block_s / step_s))
    device.synchronize()
    before = None if device.watch is None else device.watch.energy_j()
    if device.watch is None or before is None:
        return None
    for _ in range(count):
        step()
    device.synchronize()
    after = device.watch.energy_j()
    return None if after is None else (after - before) / count
