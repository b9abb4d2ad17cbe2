"""What a device can do at most: peak FLOP/s and bandwidth, measured."""

from __future__ import annotations

import torch

from sasa_bench.timing.timers import Step, timer_for


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
