"""What a device can do at most: peak FLOP/s and bandwidth, measured."""

from __future__ import annotations

import torch

from sasa_bench.case import Case
from sasa_bench.ops.tensors import dtype_of
from sasa_bench.timing.timers import Step, timer_for

TRIES = 3
"""Tries of each kind of work, after one that warms up: the first touches memory, packs weights, fills caches."""

FITS_CACHE = 1 << 19
"""Bytes of the buffer whose copy is timed for the caches: it fits the second level of one core."""

COPIES = 64
"""Copies of that buffer in one try, each too short for the clock alone."""

QUEUED = 16
"""Calls in one try on a GPU, one behind the other: a call alone takes the host's time to queue it too."""


def roof(device: str, dtype: str, seconds: float = 0.2) -> tuple[float, float, float]:
    """(peak FLOP/s, bandwidth bytes/s, bandwidth of the caches bytes/s) of a device, the best of TRIES or more.

    Tries go on until `seconds` have passed for each kind of work. The peak is that of large matrix products and of a
    large 3 x 3 convolution, whichever library is nearer to it; the bandwidth that of a copy, which reads and writes.
    """
    timer, kind = timer_for(device), dtype_of(Case(device=device, dtype=dtype))
    scale = 4 if device == "cuda" else 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(kind)

    def best(step: Step, calls: int = QUEUED if device == "cuda" else 1) -> float:
        step()
        times: list[float] = []
        while len(times) < TRIES or sum(times) < seconds:
            times.append(timer(step, calls))
        return min(times) / calls

    side = 768 * scale
    a, b = random(side, side), random(side, side)
    x, weight = random(2 * scale, 256, 28, 28), random(256, 256, 3, 3)
    weight = weight.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    threads = torch.get_num_threads() if device == "cpu" else 1
    small = torch.ones(threads * FITS_CACHE // 4, device=device)
    near = torch.empty_like(small)
    with torch.no_grad():
        product = 2 * side**3 / best(lambda: torch.mm(a, b))
        convolution = 2 * x.numel() * 256 * 9 / best(lambda: torch.nn.functional.conv2d(x, weight, padding=1))
        copy = 2 * source.nbytes / best(lambda: target.copy_(source))
        cached = 2 * small.nbytes / best(lambda: near.copy_(small), COPIES)
    return max(product, convolution), copy, max(copy, cached)
