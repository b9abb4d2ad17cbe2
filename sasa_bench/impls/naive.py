"""Local attention as the equation says it: one window offset at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.case import Case
from sasa_bench.impls import Attend, local_attention


def attend(case: Case) -> Attend:
    """For each offset (a, b): shift k and v, take one logit a pixel; softmax over the offsets; sum the shifted v."""
    window, half = case.kernel_size, case.head_dim // 2
    offsets = [(a, b) for a in range(window) for b in range(window)]
    inside = F.pad(torch.ones(case.height, case.width, dtype=torch.bool, device=case.device), (case.radius,) * 4)

    def shifted(padded: Tensor, a: int, b: int) -> Tensor:
        return padded[..., a : a + case.height, b : b + case.width]

    def core(q: Tensor, k: Tensor, v: Tensor, rel_row: Tensor | None, rel_col: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in (q, k, v))
        k, v = F.pad(k, (case.radius,) * 4), F.pad(v, (case.radius,) * 4)
        logits = []
        for a, b in offsets:
            logit = (q * shifted(k, a, b)).sum(2)
            if rel_row is not None and rel_col is not None:
                logit = logit + (q[:, :, :half] * rel_row[:, :, a, None, None]).sum(2)
                logit = logit + (q[:, :, half:] * rel_col[:, :, b, None, None]).sum(2)
            if case.border == "mask":
                logit = logit.masked_fill(~shifted(inside, a, b), -torch.inf)
            logits.append(logit)
        weights = torch.stack(logits).softmax(0)
        y = torch.zeros_like(q)
        for weight, (a, b) in zip(weights, offsets, strict=True):
            y = y + weight[:, :, None] * shifted(v, a, b)
        return y.flatten(1, 2)

    return core


IMPL = local_attention("naive", "one shifted slice for each window offset; the equation, transcribed", attend)
