"""Processes that disturb measurements on purpose, as others do on a shared machine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sasa_bench.timing.process import python


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def busy() -> None:
    """One core computes without end."""
    _spin(0.1)


def bursty() -> None:
    """One core computes for 0.05 to 1 s, then sleeps for as long or as short."""
    _spin(random.uniform(0.05, 1.0))
    time.sleep(random.uniform(0.05, 1.0))


def memory() -> None:
    """One core copies 256 MiB to and fro without end, which fills the last-level cache and the memory bus."""
    there, back = _arrays()
    there[:] = back
    back[:] = there


@cache
def _arrays() -> tuple[Any, Any]:
    import numpy as np

    return np.ones(1 << 28, dtype=np.uint8), np.ones(1 << 28, dtype=np.uint8)


NEIGHBOURS: dict[str, Callable[[], None]] = {"busy": busy, "bursty": bursty, "memory": memory}
IDLE = "idle"
"""No neighbour."""


@contextmanager
def beside(kind: str) -> Iterator[None]:
    """Inside, a neighbour of that kind runs: a key of NEIGHBOURS, or IDLE for none. It ends with this process."""
    if kind == IDLE:
        yield
        return
    process = subprocess.Popen([*python("sasa_bench.gate.neighbours"), kind, str(os.getpid())])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    disturb, parent = NEIGHBOURS[sys.argv[1]], int(sys.argv[2])
    while os.getppid() == parent:
        disturb()
