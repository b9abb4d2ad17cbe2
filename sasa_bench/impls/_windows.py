"""What formulations share that meet a block of queries with more keys than their windows hold.

The mask gives a key outside the window the weight 0, but 0 times Inf is NaN. So k and v are made finite, and queries
whose own window holds what was not finite get NaN afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_bench.networks.core import Window


def finite(t: Tensor) -> Tensor:
    """`t` with 0 in place of Inf and NaN."""
    return torch.nan_to_num(t, 0.0, 0.0, 0.0)


def add_nonfinite(window: Window, y: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y [B, C, H, W], with NaN in each head where the window of the query holds a k or v that is not finite."""
    with torch.no_grad():
        found = (k.detach() * 0 + v.detach() * 0).unflatten(1, (window.heads, -1)).sum(2)
        found = F.avg_pool2d(found, (window.rows, window.columns), 1, window.radii)
    return (y.unflatten(1, (window.heads, -1)) + found[:, :, None]).flatten(1, 2)
