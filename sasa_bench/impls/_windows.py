"""What formulations share that meet a block of queries with more keys than their windows hold.

The mask gives a key outside the window the weight 0, but 0 times Inf is NaN. So k and v are made finite, and queries
whose own window holds what was not finite get NaN afterwards. Their products may overflow, so a mask takes the place of
a logit and is not added to it: Inf less Inf is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.networks.core import Window


def finite(k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """k and v with 0 wherever the channels of a head, which are `dim`, hold what is not finite; and 0, or NaN there."""
    with torch.no_grad():
        found = (k.detach() * (v.detach() * 0)).sum(dim)
        is_finite = (found == 0).unsqueeze(dim)
    return torch.where(is_finite, k, 0.0), torch.where(is_finite, v, 0.0), found


def softmax(logits: Tensor, outside: Tensor) -> Tensor:
    """The weights [.., queries, keys] of logits but those of keys `outside`."""
    return logits.masked_fill(outside, -torch.inf).softmax(-1)


LOWEST = -80.0
"""exp of it, over the number of keys, is a normal number of float32."""


def softmax_without_underflow(logits: Tensor, outside: Tensor) -> Tensor:
    """The same for ONNX Runtime, whose exp takes 30 times as long where the result underflows, as it does for a mask.

    Logits are raised to LOWEST below the largest of their query, which changes a weight by less than 2e-35; those that
    the mask excludes get the weight 0 afterwards. float16 has no such room.
    """
    masked = logits.masked_fill(outside, -torch.inf)
    if logits.dtype == torch.float16:
        return masked.softmax(-1)
    raised = torch.maximum(masked, masked.amax(-1, keepdim=True) + LOWEST)
    return raised.softmax(-1) * (~outside).to(logits.dtype)


def add_nonfinite(window: Window, y: Tensor, found: Tensor, dim: int) -> Tensor:
    """y, with NaN in each head where the window of the query holds a NaN of `found` [B, N, H, W]; see `finite`."""
    with torch.no_grad():
        found = F.avg_pool2d(found, (window.rows, window.columns), 1, window.radii)
    return y + found.unsqueeze(dim)
