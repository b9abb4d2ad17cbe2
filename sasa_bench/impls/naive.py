"""Local attention as the equation says it: one window offset at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.impls import Core, Window, local_attention
from sasa_bench.networks.core import sizes


def tables(window: Window, height: int, width: int, like: Tensor) -> Tensor:
    """Where the padded map is outside the map."""
    inside = torch.ones(height, width, dtype=torch.bool, device=like.device)
    return ~F.pad(inside, window.padding)


def run(
    window: Window, outside: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None
) -> Tensor:
    """For each offset (a, b): shift k and v, take one logit a pixel; softmax over the offsets; sum the shifted v."""
    _, channels, height, width = sizes(q)
    half = channels // window.heads // 2
    q, k, v = (t.unflatten(1, (window.heads, -1)) for t in (q, k, v))
    k, v = F.pad(k, window.padding), F.pad(v, window.padding)
    offsets = [(a, b) for a in range(window.rows) for b in range(window.columns)]

    def shifted(padded: Tensor, a: int, b: int) -> Tensor:
        return padded[..., a : a + height, b : b + width]

    logits = []
    for a, b in offsets:
        logit = (q * shifted(k, a, b)).sum(2)
        if rel_row is not None and rel_col is not None:
            logit = logit + (q[:, :, :half] * rel_row[:, :, a, None, None]).sum(2)
            logit = logit + (q[:, :, half:] * rel_col[:, :, b, None, None]).sum(2)
        if window.border == "mask":
            logit = logit.masked_fill(shifted(outside, a, b), -torch.inf)
        logits.append(logit)
    weights = torch.stack(logits).softmax(0)
    y = torch.zeros_like(q)
    for weight, (a, b) in zip(weights, offsets, strict=True):
        y = y + weight[:, :, None] * shifted(v, a, b)
    return y.flatten(1, 2)


IMPL = local_attention(
    "naive", "one shifted slice for each window offset; the equation, transcribed", core=Core(run, tables)
)
