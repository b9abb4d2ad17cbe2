"""Neighborhood attention of Hassani et al. 2023 (arXiv 2204.07143)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sasa_bench.case import Case
from sasa_bench.ops import local_attention
from sasa_bench.ops.op import Op, Work

if TYPE_CHECKING:
    from torch import Tensor

    from sasa_bench.ops.tensors import Tensors


def work(case: Case) -> Work:
    """Hassani et al. 2023 (arXiv 2204.07143): local attention without a position term; every window is whole."""
    return local_attention.work(case)._replace(needed=None)


def reference(case: Case, tensors: Tensors) -> Tensor:
    """y_ij = sum over ab of softmax_ab(q_ij . k_ab) v_ab over K x K pixels that lie inside the map, row by row.

    The window starts at row min(max(i - K // 2, 0), H - K), its columns likewise: section 3 of Hassani et al. 2023
    (arXiv 2204.07143), without the scale and the position bias.
    """
    import torch

    from sasa_bench.ops.tensors import project

    q, k, v = (t.unflatten(1, (case.heads, case.head_dim)) for t in project(case, tensors))
    radius, window = case.radius, case.kernel_size
    column = torch.arange(case.width, device=q.device)
    start = (column - radius).clamp(0, case.width - window)
    allowed = (column >= start[:, None]) & (column < start[:, None] + window)
    rows = []
    for i in range(case.height):
        first = min(max(i - radius, 0), case.height - window)
        logits = torch.einsum("nhdj,nhdap->nhjap", q[:, :, :, i], k[:, :, :, first : first + window])
        weights = logits.masked_fill(~allowed[:, None, :], -torch.inf).flatten(3).softmax(-1)
        weights = weights.unflatten(3, logits.shape[3:])
        rows.append(torch.einsum("nhjap,nhdap->nhdj", weights, v[:, :, :, first : first + window]))
    return torch.stack(rows, dim=3).flatten(1, 2)


OP = Op("neighborhood_attention", local_attention.shapes, work, reference)
