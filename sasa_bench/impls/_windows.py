"""What formulations share that meet a block of queries with more keys than their windows hold.

The mask gives a key outside the window the weight 0, but 0 times Inf is NaN. So k and v are made finite, and queries
whose own window holds what was not finite get NaN afterwards.
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


def add_nonfinite(window: Window, y: Tensor, found: Tensor, dim: int) -> Tensor:
    """y, with NaN in each head where the window of the query holds a NaN of `found` [B, N, H, W]; see `finite`."""
    with torch.no_grad():
        found = F.avg_pool2d(found, (window.rows, window.columns), 1, window.radii)
    return y + found.unsqueeze(dim)
