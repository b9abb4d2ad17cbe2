"""Phases inside a native kernel, counted by a build with timers that only profiles use (csrc/phases.h)."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PHASES = ("project", "interleave", "position", "logits", "softmax", "aggregate", "gradients", "write")
"""In the order of csrc/phases.h. Each is named like the stage of other implementations that does the same work;
interleave copies queries, keys and values into the layout of the kernel, write copies results out of it, gradients are
those of logits, keys and values, which one pass computes together."""


@dataclass(frozen=True)
class Phases:
    """Where the time of a call goes inside a kernel.

    seconds   phase -> seconds of a call, the mean over its threads and the median over calls; those of 0 are left out
    timed_s   median seconds of a call of the build with timers
    plain_s   the same of the build that is measured otherwise, interleaved with it
    """

    seconds: dict[str, float]
    timed_s: float
    plain_s: float

    @property
    def overhead(self) -> float:
        """Share of the plain time that the timers add."""
        return self.timed_s / self.plain_s - 1


def count(
    run: Callable[[], object],
    use: Callable[[bool], object],
    libraries: Sequence[Path],
    threads: int,
    calls: int,
) -> Phases:
    """Call `run` `calls` times with each build, interleaved, and read the clocks of the build with timers.

    `use(True)` puts the build with timers in place, whose files are `libraries`; `use(False)` the plain one, which is
    in place at the end.
    """
    use(True)
    clocks = [ctypes.CDLL(str(path)).sasa_phases for path in libraries]
    found: dict[str, list[float]] = {name: [] for name in PHASES}
    spent: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(calls + 1):  # the first one warms up
        for timed in (True, False):
            use(timed)
            before, started = _read(clocks)[1], time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            ticks, after = _read(clocks)
            if turn:
                spent[timed].append(seconds)
            if turn and timed:
                for name, count in ticks.items():
                    found[name].append(count * seconds / (after - before) / threads)
    middle = {name: statistics.median(each) for name, each in found.items()}
    return Phases(
        {name: each for name, each in middle.items() if each},
        statistics.median(spent[True]),
        statistics.median(spent[False]),
    )


def _read(clocks: Sequence[Callable[..., None]]) -> tuple[dict[str, int], int]:
    """(ticks by phase since the last reading, the time now in ticks)."""
    total: Counter[str] = Counter()
    now = ctypes.c_uint64()
    for clock in clocks:
        found = (ctypes.c_uint64 * len(PHASES))()
        clock(found, ctypes.byref(now))
        total.update(dict(zip(PHASES, found, strict=True)))
    return dict(total), now.value
