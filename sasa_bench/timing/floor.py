"""The time below which nothing can do a case's work, whatever the machine is busy with.

It comes from what processors are built to do at most, not from what this one reached: a roof that was measured beside
other work is too low, and a time may beat it by right. Such a row keeps its time and is marked (`above_roof`).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from sasa_bench.case import Case

FEWER_PRODUCTS = 4.0
"""Winograd's F(4 x 4, 3 x 3) takes a quarter of the products of a 3 x 3 convolution (Lavin and Gray, CVPR 2016)."""


@dataclass(frozen=True)
class Unit:
    """What a core, or a multiprocessor of a GPU, does in one clock at most: operations by dtype, bytes that it moves.

    flops_per_clock holds "" for a dtype that is not named.
    """

    clock_hz: float
    flops_per_clock: dict[str, float]
    bytes_per_clock: float


X86 = Unit(6.5e9, {"float32": 64, "": 2048}, 192)
"""Two 512-bit multiply-adds; AMX: 1024 operations on bfloat16, 2048 as a bound; two loads and a store of 64 bytes."""

OTHER = Unit(6.5e9, {"": 4096}, 512)
"""Of processors whose matrix units this file does not know, generous."""

GPU = Unit(4e9, {"float32": 512, "tf32": 8192, "": 16384}, 256)
"""128 multiply-adds in float32, twice that as a bound; Blackwell's tensor cores do 8192 operations on float16."""


def least_seconds(case: Case, flops: int, least_bytes: int, units: int) -> float:
    """Least time of a call of `case` that needs so many operations and bytes, on so many cores or multiprocessors."""
    unit = GPU if case.device == "cuda" else X86 if platform.machine() in ("x86_64", "AMD64") else OTHER
    per_clock = unit.flops_per_clock.get(case.dtype, unit.flops_per_clock[""])
    work = flops / FEWER_PRODUCTS / (units * per_clock * unit.clock_hz)
    return max(work, least_bytes / (units * unit.bytes_per_clock * unit.clock_hz))
