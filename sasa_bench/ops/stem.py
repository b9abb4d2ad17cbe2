"""The attention stem of Ramachandran et al. 2019 (arXiv 1906.05909), section 3.2 and appendix A.1, by its equations.

Shapes and cost are those of its description, networks.resnet.stem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sasa_bench.case import STEM_HEADS
from sasa_bench.networks.layers import STEM_WINDOW

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.networks.stem import Norm


def attention(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab + q_ij . r_{a-i,b-j}) v_ab over the pixels ab of the block of ij.

    x [B, C_in, H, W] -> y [B, C, H, W]; one query's place in its block at a time, for all blocks at once.
    """
    import torch
    from torch.nn import functional as F

    side, (height, width) = STEM_WINDOW, x.shape[2:]
    filling = (0, -width % side, 0, -height % side)
    places = [(a, b) for a in range(side) for b in range(side)]

    def by_place(t: Tensor) -> dict[tuple[int, int], Tensor]:
        t = F.pad(t, filling).unflatten(1, (STEM_HEADS, -1))
        return {(a, b): t[..., a::side, b::side] for a, b in places}

    q, k = map(by_place, torch.einsum("oc,nchw->nohw", parameters["w_qk"], x).chunk(2, dim=1))
    v = by_place(values(x, parameters))
    outside = F.pad(torch.zeros(height, width, dtype=torch.bool, device=x.device), filling, value=True)
    rows: list[list[Tensor]] = [[] for _ in range(side)]
    for i, j in places:
        logits = []
        for a, b in places:
            r = torch.cat([parameters["rel_row"][:, :, a - i + 3], parameters["rel_col"][:, :, b - j + 3]], dim=1)
            logit = (q[i, j] * (k[a, b] + r[:, :, None, None])).sum(2)
            logits.append(logit.masked_fill(outside[a::side, b::side], -torch.inf))
        weights = torch.stack(logits).softmax(0)
        y = sum(weight[:, :, None] * v[place] for weight, place in zip(weights, places, strict=True))
        rows[i].append(y.flatten(1, 2))
    blocks = torch.stack([torch.stack(row, dim=4) for row in rows], dim=3)  # [B, C, down, 4, across, 4]
    return blocks.flatten(4).flatten(2, 3)[:, :, :height, :width]


def values(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """v [B, C, H, W] of x [B, C_in, H, W].

    W_V x_ab; or a 4 x 4 convolution, one tap at a time; or, for a pixel at place (a, b) of its block, sum over m of
    p(a, b, m) W_V^m x with p(a, b, m) = softmax_m((emb_row(a) + emb_col(b)) . nu_m).
    """
    import torch
    from torch.nn import functional as F

    w_v, (height, width) = parameters["w_v"], x.shape[2:]
    if w_v.dim() == 4:
        before = (STEM_WINDOW - 1) // 2
        padded = F.pad(x, (before, STEM_WINDOW - 1 - before) * 2)
        taps = [(a, b) for a in range(STEM_WINDOW) for b in range(STEM_WINDOW)]
        shifted = [padded[:, :, a : a + height, b : b + width] for a, b in taps]
        return sum(  # type: ignore[return-value]
            torch.einsum("oc,nchw->nohw", w_v[:, :, a, b], t) for (a, b), t in zip(taps, shifted, strict=True)
        )
    if "nu" not in parameters:
        return torch.einsum("oc,nchw->nohw", w_v, x)
    row, column = (torch.arange(n, device=x.device) % STEM_WINDOW for n in (height, width))
    embedding = parameters["emb_row"][:, row, None] + parameters["emb_col"][:, None, column]
    share = torch.einsum("mc,chw->mhw", parameters["nu"], embedding).softmax(0)
    each = torch.einsum("moc,nchw->nmohw", w_v.unflatten(0, (len(share), -1)), x)
    return (share[:, None] * each).sum(1)


def reference(x: Tensor, parameters: Mapping[str, Tensor], norm: Norm) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The whole stem as networks.stem.StemKernel has it: attention, batch norm, relu and 4 x 4 max pool."""
    from torch.nn import functional as F

    y = attention(x, parameters)
    mean, variance = norm.mean, norm.variance
    if mean is None or variance is None:
        mean = y.mean((0, 2, 3))
        variance = (y - mean[:, None, None]).square().mean((0, 2, 3))
    scale = norm.weight / (variance + norm.eps).sqrt()
    y = ((y - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).relu()
    filled = F.pad(y, (0, -y.shape[3] % STEM_WINDOW, 0, -y.shape[2] % STEM_WINDOW))
    return filled.unflatten(3, (-1, STEM_WINDOW)).unflatten(2, (-1, STEM_WINDOW)).amax((3, 5)), mean, variance
