"""Criss-cross attention of Huang et al. 2019 (arXiv 1811.11721)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, image, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def eighth(channels: int) -> int:
    """Channels of queries and keys of criss-cross attention: C / 8, at least 1."""
    return max(1, channels // 8)


def work(case: Case) -> Work:
    """Huang et al. 2019 (arXiv 1811.11721), one pass, h = C / 8.

    4 C h P + 2 C^2 P for queries, keys and values, 2 (h + C) P for each of the H + W - 1 pixels in a pixel's row and
    column, 2 C P for gamma and the sum with the input.
    """
    c, p, h = case.channels, pixels(case), eighth(case.channels)
    seen = case.height + case.width - 1
    return Work((4 * c * h + 2 * c * c + 2 * (h + c) * seen + 2 * c) * p, 2 * c * h + c * c + 1, c * p, c * p)


def shapes(case: Case) -> Shapes:
    c, h = case.channels, eighth(case.channels)
    scales = {"w_qk": ((2 * h, c), c**-0.5 * h**-0.25), "w_v": ((c, c), c**-0.5), "gamma": ((1,), 1.0)}
    return {"x": image(case), **scales}


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y = x + gamma sum over the row and column of a pixel of softmax(q . k) v, section 3.2 of Huang et al. 2019.

    The pixel itself counts once, with its column.
    """
    import torch

    x = tensors["x"]
    q, k = torch.einsum("oc,nchw->nohw", tensors["w_qk"], x).chunk(2, dim=1)
    v = torch.einsum("oc,nchw->nohw", tensors["w_v"], x)
    itself = torch.eye(case.width, dtype=torch.bool, device=x.device)
    rows = []
    for i in range(case.height):
        in_column = torch.einsum("ndj,ndaj->nja", q[:, :, i], k)
        in_row = torch.einsum("ndj,ndb->njb", q[:, :, i], k[:, :, i]).masked_fill(itself, -torch.inf)
        weights = torch.cat([in_column, in_row], dim=2).softmax(-1)
        of_column, of_row = weights.split([case.height, case.width], dim=2)
        rows.append(torch.einsum("nja,ndaj->ndj", of_column, v) + torch.einsum("njb,ndb->ndj", of_row, v[:, :, i]))
    return x + tensors["gamma"] * torch.stack(rows, dim=2)


OP = Op("criss_cross", shapes, work, reference)
