"""What else used the processors meanwhile: other processes of this system, and the hypervisor below it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Reading:
    """Counters at one moment, in seconds; those of processors are summed over all that this process may use.

    at       by the monotonic clock
    busy     of any process of this system
    stolen   that the hypervisor gave to somebody else while a process here wanted to run
    own      of the processes that are measured
    idle     of no process at all
    """

    at: float
    busy: float
    stolen: float
    own: float
    idle: float = 0.0


@dataclass(frozen=True)
class Disturbance:
    """Shares of those processors between two readings: `stolen` by the hypervisor, `others` by unrelated processes."""

    stolen: float
    others: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.stolen + self.others


PROBE_STEPS = 1000


def probe() -> float:
    """Seconds of a fixed piece of work on one core, about 20 us, that no cache and no other core takes part in."""
    started = time.perf_counter()
    for _ in range(PROBE_STEPS):
        pass
    return time.perf_counter() - started


def stolen_s() -> float:
    """Seconds that the hypervisor has given to others, over the processors that this process may use."""
    return _processor_times()[1]


def read(own: Iterable[int] = ()) -> Reading:
    """The counters now; `own` are the process ids that are measured, besides this process.

    Where the system shows no counters, they are 0 and no disturbance is ever seen.
    """
    times = _processor_times()
    used = sum(_used_by(pid) for pid in {os.getpid(), *own})
    return Reading(time.monotonic(), times[0], times[1], used, times[2])


def between(before: Reading, after: Reading, processors: int | None = None) -> Disturbance:
    """What happened between two readings, as shares of the time of the processors that this process may use."""
    whole = (after.at - before.at) * (processors or len(os.sched_getaffinity(0)))
    if whole <= 0:
        return Disturbance(0.0, 0.0)
    others = (after.busy - before.busy) - (after.own - before.own)
    return Disturbance(
        min(1.0, max(0.0, after.stolen - before.stolen) / whole),
        min(1.0, max(0.0, others) / whole),
    )


def _processor_times() -> tuple[float, float, float]:
    """(busy, stolen, idle) seconds of the lines of these processors in /proc/stat; see proc(5).

    Of all processors, the first line, where a container shows them by other numbers.
    """
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in (PROC / "stat").read_text().splitlines()]
        found = [line for line in lines if line and line[0] in usable]
        own = [[int(value) for value in line[1:9]] for line in (found if len(found) == len(usable) else lines[:1])]
        user, nice, system, idle, waiting, irq, softirq, steal = (sum(column) for column in zip(*own, strict=True))
    except (OSError, ValueError):
        return 0.0, 0.0, 0.0
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick, (idle + waiting) / tick


def _used_by(pid: int) -> float:
    """Seconds of a process and the children it has waited for: utime, stime, cutime, cstime of /proc/PID/stat."""
    try:
        # The second field is the program's name in parentheses, which may hold spaces and parentheses itself.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return 0.0
