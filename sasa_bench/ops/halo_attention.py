"""Halo attention of Vaswani et al. 2021 (arXiv 2103.12731)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops.op import Op, Shapes, Work, image, pixels

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def halo_block(case: Case) -> int:
    """S, the side of a block of queries in halo attention: the largest number up to 8 that divides height and width."""
    return max(s for s in range(1, 9) if case.height % s == 0 and case.width % s == 0)


def work(case: Case) -> Work:
    """Vaswani et al. 2021 (arXiv 2103.12731) with a halo of K // 2: every query sees h^2 keys, h = S + K - 1.

    6 C^2 P for three projections, h^2 C P times 5 for q . (k + r) and a v. Parameters: 3 C^2 and two tables of 2 h - 1
    embeddings of a head's d channels, shared by the heads.
    """
    c, p, h = case.channels, pixels(case), halo_block(case) + case.kernel_size - 1
    return Work(6 * c * c * p + 5 * h * h * c * p, 3 * c * c + 2 * (2 * h - 1) * case.head_dim, c * p, c * p)


def shapes(case: Case) -> Shapes:
    c, d, halo = case.channels, case.head_dim, halo_block(case) + case.kernel_size - 1
    embeddings = (2 * halo - 1, d), d**-0.5
    return {
        "x": image(case),
        "w_q": ((c, c, 1, 1), c**-0.5),
        "w_kv": ((2 * c, c, 1, 1), c**-0.5),
        "height_rel": embeddings,
        "width_rel": embeddings,
    }


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab / sqrt(d) + q_ij . (r_{a-i} + s_{b-j})) v_ab, block by block.

    The pixels of a block of S x S see its h x h keys, h = S + K - 1, those outside the map with k = v = 0. r is
    height_rel [2 h - 1, d] and s width_rel [2 h - 1, d], row h - 1 for a key in the first row of the halo and a query
    in the first row of the block. Vaswani et al. 2021 (arXiv 2103.12731), as timm lays out its parameters: w_kv holds
    the keys and then the values of one head after the other.
    """
    import torch
    from torch.nn import functional as F

    x, size = tensors["x"], halo_block(case)
    heads, d, halo = case.heads, case.head_dim, size + case.kernel_size - 1
    q = torch.einsum("oc,nchw->nohw", tensors["w_q"][:, :, 0, 0], x).unflatten(1, (heads, d))
    kv = torch.einsum("oc,nchw->nohw", tensors["w_kv"][:, :, 0, 0], x).unflatten(1, (heads, 2 * d))
    k, v = (F.pad(t, (case.radius,) * 4) for t in kv.split(d, dim=2))
    step = torch.arange(halo, device=x.device) - torch.arange(size, device=x.device)[:, None] + halo - 1
    rows = []
    for top in range(0, case.height, size):
        blocks = []
        for left in range(0, case.width, size):
            query = q[..., top : top + size, left : left + size]
            keys, values = (t[..., top : top + halo, left : left + halo] for t in (k, v))
            logits = torch.einsum("nhdij,nhdab->nhijab", query, keys) * d**-0.5
            by_row = torch.einsum("nhdij,iad->nhija", query, tensors["height_rel"][step])
            by_column = torch.einsum("nhdij,jbd->nhijb", query, tensors["width_rel"][step])
            logits = logits + by_row[..., None] + by_column[..., None, :]
            weights = logits.flatten(4).softmax(-1).view_as(logits)
            blocks.append(torch.einsum("nhijab,nhdab->nhdij", weights, values))
        rows.append(torch.cat(blocks, dim=4))
    return torch.cat(rows, dim=3).flatten(1, 2)


OP = Op("halo_attention", shapes, work, reference)
